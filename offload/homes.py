"""Where the state of every subgroup lives, from one step to the next: homes are chosen when
parameters come, and anew when predictions were wrong or the device is short of memory.

The idea is that of Deep Optimizer States (arXiv 2410.21316): who updates a subgroup follows from
where its state is, so that choosing homes is all there is to scheduling. Moving changes no number.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

from interlace.offload.executor import Executor
from interlace.offload.monitor import Monitor
from interlace.offload.ownership import claim, release
from interlace.offload.placement import Placement
from interlace.offload.roster import Roster
from interlace.offload.schedule import Home
from interlace.offload.subgroup import SubgroupState

StateOfParameters = dict[torch.Tensor, Any]
"""What torch's optimizers call `state`."""


class Homes:
    """Chooses and changes the homes of one optimizer's state.

    Args:
        roster: Whose state there is.
        placement: Chooses.
        monitor: Knows whether predictions hold.
        executor: Has the slots that staged subgroups pass through.
        state: The optimizer's `state`, which shows slabs where they are.
        synchronize: Blocks until nothing is under way.
    """

    def __init__(
        self,
        roster: Roster,
        placement: Placement,
        monitor: Monitor,
        executor: Executor,
        state: StateOfParameters,
        synchronize: Callable[[], None],
    ) -> None:
        self.roster = roster
        self.placement = placement
        self.monitor = monitor
        self.executor = executor
        self.state = state
        self.synchronize = synchronize

    @property
    def present(self) -> tuple[Home, ...]:
        """The home of every subgroup, in the order of updates."""
        return tuple(subgroup.home for subgroup in self.roster.subgroups)

    def admit(
        self,
        groups: Sequence[dict[str, Any]],
        owner: object,
        frozen: Collection[torch.Tensor] = (),
    ) -> list[torch.Tensor]:
        """Choose homes for all parameters, those without state included, before anything is
        allocated; return the parameters that are new. Frozen ones get no state but for those named.

        Raises:
            MemoryShortage: Their state does not fit.
            ValueError: Another optimizer serves one of them.
        """
        roster = self.roster
        fresh = roster.newcomers(groups, frozen)
        shapes = [subgroup.shape for subgroup in roster.with_newcomers(fresh)]
        homes = self.placement.choose(shapes, roster.shapes, self.present)
        parameters = [m.parameter for subgroup in fresh for m in subgroup.members]
        claim(parameters, owner)
        try:
            roster.enter(fresh, homes)
        except BaseException:
            release(parameters, owner)
            raise
        self.monitor.homes_changed()
        self.move_to(homes)
        return parameters

    def move_to(self, homes: Sequence[Home]) -> None:
        """Move subgroups to other homes, one per subgroup; between steps."""
        self.synchronize()
        pairs = list(zip(self.roster.subgroups, homes, strict=True))
        # What leaves the device goes first, and slots take their size before residents come.
        try:
            self.move((subgroup, home) for subgroup, home in pairs if home is not Home.RESIDENT)
        finally:
            # Where memory is refused half way, what has moved by then goes on from its new home.
            self.executor.make_slots(self.roster.subgroups)
        self.move((subgroup, home) for subgroup, home in pairs if home is Home.RESIDENT)

    def move(self, pairs: Iterable[tuple[SubgroupState, Home]]) -> None:
        """Move subgroups, one after another; `state` lets go of each one's old memory at once."""
        for subgroup, home in pairs:
            subgroup.move(home)
            for member in subgroup.members:
                self.state[member.parameter] = dict(subgroup.state_of(member))

    def reconsider(self) -> None:
        """Report the update that is finished; where updates have been off their prediction for a
        while, choose anew.
        """
        if self.monitor.finish(self.placement.schedule, self.present):
            homes = self.placement.reconsider(self.roster.shapes, self.present, self.monitor)
            self.monitor.moved(self.present, homes)
            self.move_to(homes)

    def give_back(self, device_bytes: int) -> None:
        """Free device memory, between steps, by moving state off the device."""
        homes = self.placement.give_back(self.roster.shapes, self.present, device_bytes)
        self.monitor.homes_changed()
        self.move_to(homes)

    def relieve(self) -> None:
        """Where the device was short of memory since the last call, move a quarter of what state
        holds there off it.
        """
        if self.monitor.device_is_short():
            self.give_back(self.placement.held(self.roster.shapes, self.present).device_bytes // 4)
