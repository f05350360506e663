"""Who is served: parameters, their subgroups, their order of use and their names."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from interlace.kernels.update import warm_up
from interlace.kernels.update.histogram import magnitude_histogram
from interlace.offload.forward import forward_order
from interlace.offload.memory import HostSlabs
from interlace.offload.schedule import Home, Subgroup
from interlace.offload.step import OpenStep
from interlace.offload.subgroup import Member, StateLayout, SubgroupState, cut, local


class Roster:
    """The parameters of one optimizer.

    Args:
        model: Tells order of use and names; without one, parameters come as they are given.
        layout: In which precision state is kept.
        host: Memory for state on the host.
        subgroup_elements: About how many elements share a subgroup.

    Attributes:
        subgroups: In the order of updates: that in which the forward pass needs them.
        members: Where each parameter's state is.
    """

    def __init__(
        self, model: nn.Module | None, layout: StateLayout, host: HostSlabs, subgroup_elements: int
    ) -> None:
        named = model.named_parameters() if model is not None else ()
        self.names: dict[torch.Tensor, str] = {p: name for name, p in named}
        self.order = forward_order(model) if model is not None else {}
        self.layout = layout
        self.host = host
        self.subgroup_elements = subgroup_elements
        self.subgroups: list[SubgroupState] = []
        self.members: dict[torch.Tensor, tuple[SubgroupState, Member]] = {}

    @property
    def shapes(self) -> list[Subgroup]:
        """The subgroups as the performance model sees them."""
        return [subgroup.shape for subgroup in self.subgroups]

    def newcomers(
        self, groups: Sequence[dict[str, Any]], frozen: Collection[torch.Tensor] = ()
    ) -> list[SubgroupState]:
        """Return new subgroups, without memory, of all parameters that have none; frozen ones are
        left out but for those named.
        """

        def is_new(parameter: torch.Tensor) -> bool:
            needed = parameter.requires_grad or any(parameter is each for each in frozen)
            return needed and parameter not in self.members

        fresh = cut(groups, self.layout, self.host, self.subgroup_elements, is_new, self.subgroups)
        for subgroup in fresh:
            for member in subgroup.members:
                self.order.setdefault(member.parameter, len(self.order))
        return fresh

    def with_newcomers(self, fresh: Sequence[SubgroupState]) -> list[SubgroupState]:
        """Return all subgroups there are to be, in their order."""

        def first_use(subgroup: SubgroupState) -> int:
            return min(self.order[member.parameter] for member in subgroup.members)

        return sorted([*self.subgroups, *fresh], key=first_use)

    def enter(self, fresh: Sequence[SubgroupState], homes: Sequence[Home]) -> None:
        """Give new subgroups memory; `homes` are those of all, old ones included. Nothing has
        changed if that fails.
        """
        together = self.with_newcomers(fresh)
        for subgroup, home in zip(together, homes, strict=True):
            if subgroup in fresh:
                rule, layout = self.layout.rule, self.layout
                warm_up(rule, subgroup.weight_dtype, layout.moment_dtype, subgroup.splits)
                if layout.learns_thresholds:
                    for dtype in {subgroup.weight_dtype, subgroup.gradient_dtype}:
                        magnitude_histogram(torch.zeros(1, dtype=dtype, device="cpu"))
                subgroup.begin(home)
        self.subgroups = together
        for index, subgroup in enumerate(together):
            subgroup.index = index
        for subgroup in fresh:
            for member in subgroup.members:
                self.members[member.parameter] = (subgroup, member)

    def pending(self, parameters: Iterable[torch.Tensor]) -> list[Callable[[], None]]:
        """Return how to wait for those new weights that are not there yet."""
        waits: list[Callable[[], None]] = []
        subgroups = {self.members[p][0]: None for p in parameters if p in self.members}
        for subgroup in subgroups:
            ticket = subgroup.weights_ready
            if ticket is not None and not ticket.complete:
                # FSDP2 gathers shards on streams of its own, which must not run ahead.
                sharded = isinstance(subgroup.members[0].parameter, DTensor)
                waits.append(ticket.wait if sharded else ticket.wait_on_stream)
        return waits

    def gradients(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield every parameter whose gradient came and the gradient, once all of it is there."""
        for subgroup in self.subgroups:
            subgroup.wait()
            for member in subgroup.members:
                if member.arrivals:
                    piece = subgroup.gradient[member.start : member.stop]
                    yield member.parameter, piece.view(local(member.parameter).shape)

    def not_finite(self, groups: Sequence[dict[str, Any]]) -> list[str]:
        """Return the names of those parameters whose gradient came and is not finite."""
        return [
            self.name_of(parameter, groups)
            for parameter, gradient in self.gradients()
            if not torch.isfinite(gradient).all()
        ]

    def wait_on_stream(self) -> None:
        """Let everything that follows on the current stream see the update."""
        for subgroup in self.subgroups:
            for ticket in subgroup.updating:
                ticket.wait_on_stream()

    def settle(self) -> None:
        """Block until nothing is under way, whether it failed or not."""
        for subgroup in self.subgroups:
            subgroup.settle()

    def forget_work(self) -> None:
        """Forget what was under way; nothing is any more."""
        for subgroup in self.subgroups:
            subgroup.updating, subgroup.weights_ready = [], None
            for member in subgroup.members:
                member.arriving = None

    def next_step(self, launched: Collection[SubgroupState] = ()) -> OpenStep:
        """Return a new step; the next gradient of every parameter is its first.

        Args:
            launched: Subgroups whose update waits for their gradients, so that nobody else needs to
                know when these are there.
        """
        for subgroup, member in self.members.values():
            used = member.arrivals > 0 and subgroup in launched
            # A copy that failed once is no reason to fail for ever.
            failed = member.arriving is not None and member.arriving.error is not None
            if used or failed:
                member.arriving = None
            member.arrivals = 0
            member.square = None
        return OpenStep()

    def name_of(self, parameter: torch.Tensor, groups: Sequence[dict[str, Any]]) -> str:
        """Return a parameter's name in the model, or its number over all groups."""
        if parameter in self.names:
            return self.names[parameter]
        every = [p for group in groups for p in group["params"]]
        return f"parameter {next(n for n, p in enumerate(every) if p is parameter)}"
