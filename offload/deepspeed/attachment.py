"""The update of one attached engine: what is launched for each partition, and what is waited for.

It begins where ZeRO knows that the gradients are finite and what they are scaled by, and has ended
when ZeRO's `step` returns: until then copies in, updates on both sides and copies out of all pieces
run beside each other. Nothing of it runs beside backward or forward, since ZeRO decides only in
`step` whether there is an update at all; the gradients' way to the host does, as DeepSpeed has it.
"""

import _thread
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from interlace.kernels.update import UpdateRule, warm_up
from interlace.offload.cores import CpuPool
from interlace.offload.deepspeed.flats import Flat, Lent, State
from interlace.offload.deepspeed.homes import by_flat, choose, torn, whole
from interlace.offload.deepspeed.names import Unserved
from interlace.offload.deepspeed.rules import check_group, is_cpu_adam
from interlace.offload.executor import Executor, Work
from interlace.offload.hardware import HardwareProfile
from interlace.offload.lanes import Lanes
from interlace.offload.memory import HostSlabs
from interlace.offload.monitor import Monitor
from interlace.offload.options import OffloadOptions
from interlace.offload.placement import Placement
from interlace.offload.report import UpdateReport
from interlace.offload.schedule import Home, MemoryBudget, Schedule, Strategy
from interlace.offload.step import Health
from interlace.offload.subgroup import StateLayout, SubgroupState


class Stage(Protocol):
    """What the ZeRO stages do in different ways."""

    zero: Any

    def lent(self) -> list[Lent]:
        """Return all flat partitions of this rank, in the order of the update."""
        ...

    def relink(self) -> None:
        """Let DeepSpeed's own views of a partition follow where its tensors are now."""
        ...

    def bind(self, attachment: "Attachment") -> None:
        """Put the update in the place of ZeRO's."""
        ...

    def unbind(self) -> None:
        """Give ZeRO its own methods back."""
        ...


class Attachment:
    """The update of one engine.

    Args:
        stage: The engine's optimizer.
        rule: The rule that its client optimizer means.
        strategy: See `OffloadedOptimizer`.
        budget: Likewise.
        profile: Likewise.
        options: Likewise; those of gradients and of the form of state do not apply.

    Raises:
        MemoryShortage: State does not fit, or cannot be pinned.
    """

    def __init__(
        self,
        stage: Stage,
        rule: UpdateRule,
        strategy: Strategy,
        budget: MemoryBudget | None,
        profile: HardwareProfile | None,
        options: OffloadOptions,
    ) -> None:
        lent = stage.lent()
        device = lent[0].weight.device
        self.stage, self.rule = stage, rule
        pool = CpuPool(options.cpu_threads, options.cpu_cores, device)
        self._lanes = Lanes(device, pool, options.throttle)
        self._end = weakref.finalize(self, close_later, self._lanes)
        self._end.atexit = False
        try:
            host = HostSlabs(pool, pin=device.type == "cuda")
            layout = StateLayout(rule, sums_gradients=True, lent=True)
            self.flats = [
                Flat(each, self.groups[each.group], layout, host, options.subgroup_elements)
                for each in lent
            ]
            for number, piece in enumerate(self.subgroups):
                piece.index = number
            self._health = Health(self._settle)
            self._under_way = False
            self.placement = Placement(device, strategy, budget, profile, options)
            self.monitor = Monitor(self._lanes, self.placement.profile, options.recalibrate)
            self._executor = Executor(self._lanes, options.staging_slots)
            for dtype in {each.weight.dtype for each in lent}:
                warm_up(rule, torch.float32 if dtype is torch.float16 else dtype, torch.float32)
            self._place(choose(self.placement, self.flats, self._held()))
        except BaseException:
            self._lanes.close()
            raise

    # ---- what DeepSpeed has -----------------------------------------------------------------

    @property
    def client(self) -> torch.optim.Optimizer:
        """The optimizer that ZeRO was given, whose groups and state count."""
        return self.stage.zero.optimizer

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Its parameter groups, as they are now."""
        return self.client.param_groups

    @property
    def state(self) -> State:
        """Its state, as it is now."""
        return self.client.state  # pyright: ignore[reportReturnType]

    def _held(self) -> MemoryBudget:
        """Return the host memory that DeepSpeed's tensors give back."""
        tensors: list[torch.Tensor] = []
        for flat in self.flats:
            values = self.state.get(flat.lent.tensor, {}).values()
            of_one = (flat.lent.tensor, flat.lent.tensor.grad, *values)
            tensors += [each for each in of_one if isinstance(each, torch.Tensor)]
        return MemoryBudget(0, sum(each.numel() * each.element_size() for each in tensors))

    # ---- homes ------------------------------------------------------------------------------

    @property
    def subgroups(self) -> Sequence[SubgroupState]:
        """All pieces of all partitions, in the order of the update."""
        return [piece for flat in self.flats for piece in flat.pieces]

    @property
    def homes(self) -> tuple[Home, ...]:
        """The home of every piece."""
        return tuple(piece.home for piece in self.subgroups)

    @property
    def schedule(self) -> Schedule | None:
        """Homes and times as the performance model expects them; None where it was not asked."""
        return self.placement.schedule

    def rehome(self, homes: Sequence[Home]) -> None:
        """Move pieces to other homes, between steps; numbers do not change.

        Raises:
            ValueError: There are more or fewer pieces, or a part of a partition were resident.
        """
        if len(homes) != len(self.subgroups):
            raise ValueError(f"{len(homes)} homes for {len(self.subgroups)} subgroups")
        placed = by_flat(self.flats, homes)
        if any(torn(of_one) for of_one in placed):
            raise ValueError(
                "a partition of DeepSpeed is resident as a whole or not at all; its pieces are "
                f"{[len(flat.pieces) for flat in self.flats]}"
            )
        self.monitor.homes_changed()
        self._place(placed)

    def _place(self, homes: Sequence[Sequence[Home]]) -> None:
        """Take all partitions home, those that leave the device first."""
        pairs = list(zip(self.flats, homes, strict=True))
        # Where memory is refused half way, what has moved by then goes on from its new home.
        try:
            try:
                for flat, of_one in pairs:
                    if of_one[0] is not Home.RESIDENT:
                        self._place_one(flat, of_one)
            finally:
                self._executor.make_slots(self.subgroups)
            for flat, of_one in pairs:
                if of_one[0] is Home.RESIDENT:
                    self._place_one(flat, of_one)
        finally:
            self.stage.relink()

    def _place_one(self, flat: Flat, homes: Sequence[Home]) -> None:
        """Take one partition home; its state is complete afterwards, also for DeepSpeed."""
        flat.place(homes, self.state)
        self._count(flat)

    # ---- the step ---------------------------------------------------------------------------

    @contextmanager
    def one_step(self) -> Generator[None]:
        """Remember, around ZeRO's `step`, that it ended before the update did: some of a step is
        not the step.
        """
        try:
            yield
        except BaseException:
            if not self._under_way:
                raise
            with self._health.uninterrupted():
                raise

    def begin(self) -> None:
        """Look at what DeepSpeed has now; once per step, before anything is launched.

        Raises:
            LaneError: An earlier update failed.
            ValueError: A parameter group asks for another update than it did.
        """
        self._health.check()
        for group in self.groups:
            try:
                check_group(self.rule, self.client, group)
            except Unserved as reason:
                raise ValueError(f"{reason}, which it had not before: detach(engine)") from reason
        adopted = False
        for flat, lent in zip(self.flats, self.stage.lent(), strict=True):
            flat.follow(lent, self.groups[lent.group])
            adopted = flat.adopt(self.state) or adopted
        if adopted:
            self.stage.relink()
        # Schedulers of torch warn unless their optimizer has stepped; now it does.
        vars(self.client)["_opt_called"] = True
        self.monitor.begin()

    @torch.no_grad()
    def launch(self, flat: Flat, scale: float, idle: Sequence[slice]) -> None:
        """Submit the update of one partition.

        Args:
            flat: Which.
            scale: Its gradients are multiplied by this first.
            idle: The parts of it to which no gradient came since the last update.
        """
        flat.about_to_change()
        before = self._count(flat)
        self._under_way = True
        flat.scale_idle(idle)
        flat.scaled_by = scale
        for piece in flat.pieces:
            (member,) = piece.members
            member.step.fill_(before)
            member.arrivals = 1
            # Gradients may still be on their way on the caller's stream.
            member.arriving = self._lanes.current_work()
            self._executor.launch(Work.of(piece, scale))
            self.monitor.launched(piece, [], before + 1)
        self._count(flat, before + 1)

    def skip(self, flat: Flat, idle: Sequence[slice]) -> None:
        """Make no update: gradients that came stay as they are; others are what they were for
        DeepSpeed.
        """
        flat.scale_idle(idle)
        flat.scaled_by = 1.0

    def finish(self) -> None:
        """Wait until the update is complete, its state on the host too.

        Raises:
            LaneError: It failed; the state is not to be trusted any more.
        """
        with self.monitor.waiting(), self._health.watched():
            for piece in self.subgroups:
                piece.wait()
        self._under_way = False
        self._forget()
        self._reconsider()

    def _reconsider(self) -> None:
        """Report the update; where updates are off their prediction, choose homes anew."""
        if self.monitor.finish(self.placement.schedule, self.homes):
            shapes = [piece.shape for piece in self.subgroups]
            homes = self.placement.reconsider(shapes, self.homes, self.monitor)
            placed = whole(self.placement, self.flats, homes)
            self.monitor.moved(self.homes, tuple(home for of_one in placed for home in of_one))
            self._place(placed)

    def _count(self, flat: Flat, number: int | None = None) -> int:
        """Return how many updates a partition has had, written in DeepSpeed's way; set it first."""
        entry = self.state[flat.lent.tensor]
        if self.rule.name != "adamw":
            return 0
        if "step" not in entry:
            entry["step"] = 0 if is_cpu_adam(self.client) else torch.zeros((), dtype=torch.float32)
        if number is not None:
            if isinstance(entry["step"], torch.Tensor):
                entry["step"].fill_(number)
            else:
                entry["step"] = number
        return int(entry["step"])

    @property
    def last_report(self) -> UpdateReport | None:
        """Times of the newest update."""
        return self.monitor.last

    def _settle(self) -> None:
        """Block until nothing is under way, whether it failed or not."""
        for piece in self.subgroups:
            piece.settle()

    def _forget(self) -> None:
        """Forget what was under way; nothing is any more."""
        for piece in self.subgroups:
            piece.updating, piece.weights_ready = [], None
            for member in piece.members:
                member.arriving, member.arrivals = None, 0

    def close(self) -> None:
        """Bring all state to the host, give ZeRO its methods back and end the threads."""
        if self._end.detach() is None:
            return
        try:
            self._settle()
            self._forget()
            for flat in self.flats:
                flat.scale_idle([slice(None)])
            self._place([(Home.HOST,) * len(flat.pieces) for flat in self.flats])
        finally:
            self.stage.unbind()
            self._lanes.close()


def close_later(lanes: Lanes) -> None:
    """End the threads of an engine that was dropped, without waiting: see `ownership.end_later`."""
    _thread.start_new_thread(lanes.close, ())
