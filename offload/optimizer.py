"""`OffloadedOptimizer`: a `torch.optim.Optimizer` whose state lives where the machine serves it
best.

It takes parameters or parameter groups and an update rule, cuts them into subgroups, asks the
performance model for a home for each, and from then on behaves like any optimizer: `backward`
delivers gradients, `step` updates, schedulers change `param_groups`. Parameters stay where they
are; plain tensors, DDP's and FSDP2's `DTensor` shards all work. Reference: Deep Optimizer States
(arXiv 2410.21316).
"""

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from interlace.kernels.update import AdamW, UpdateRule, warm_up
from interlace.offload.executor import Executor, Work
from interlace.offload.forward import forward_order, wait_in_forward
from interlace.offload.gradients import Gradients, all_finite, global_norm
from interlace.offload.hardware import HardwareProfile
from interlace.offload.lanes import CpuPool, LaneError, Lanes
from interlace.offload.memory import HostSlabs, available_device_bytes
from interlace.offload.monitor import Monitor
from interlace.offload.options import (
    OffloadOptions,
    Overlap,
    Strategy,
    check_overlap,
    check_parameter,
    check_strategy,
    streams_gradients,
)
from interlace.offload.persistence import load_state
from interlace.offload.placement import Placement
from interlace.offload.report import UpdateReport
from interlace.offload.schedule import Home, MemoryBudget, Schedule
from interlace.offload.subgroup import Member, StateLayout, SubgroupState, cut, local, version_of


class NonFiniteGradient(ArithmeticError):
    """A gradient is infinite or NaN; the message says whether anything was updated."""


class OffloadedOptimizer(torch.optim.Optimizer):
    """Any update rule over offloaded state.

    Args:
        params: Parameters or parameter groups, as torch's optimizers take them: float32 or bfloat16
            (float64 on a CPU), plain or `DTensor`, all on one device.
        rule: The update rule with the defaults of its hyperparameters.
        strategy: `optimal` asks the performance model, `none` keeps all state on the device, `host`
            all on the host, `stride` stages every k-th subgroup.
        budget: Memory that state may occupy; None means what is free now, with a margin.
        profile: What the machine can do; None means the profile on record, measured if need be.
        overlap: What the update runs beside: `none`, the next `forward` (needs `model`), or already
            `backward` (needs `clip_norm=None`).
        clip_norm: Largest global gradient norm; longer gradients are scaled down.
        model: The module whose forward waits for its weights layer by layer.
        options: Everything that has a good default; see `OffloadOptions`.

    Raises:
        ValueError: Settings that exclude each other, or parameters of unsupported kinds.
        MemoryShortage: State does not fit; nothing was allocated.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        rule: UpdateRule | None = None,
        *,
        strategy: Strategy = "optimal",
        budget: MemoryBudget | None = None,
        profile: HardwareProfile | None = None,
        overlap: Overlap = "none",
        clip_norm: float | None = None,
        model: nn.Module | None = None,
        options: OffloadOptions | None = None,
    ) -> None:
        self.rule: UpdateRule = rule if rule is not None else AdamW()
        self.strategy: Strategy = strategy
        self.overlap: Overlap = overlap
        self.clip_norm = clip_norm
        self.options = options or OffloadOptions()
        self.subgroups: list[SubgroupState] = []
        self._members: dict[torch.Tensor, tuple[SubgroupState, Member]] = {}
        self._handles: list[RemovableHandle] = []
        self._norm: float | None = None
        self._begun = False
        self._launched: set[SubgroupState] = set()
        self._failure: str | None = None
        self._order: dict[torch.Tensor, int] = {}
        check_strategy(strategy)
        check_overlap(overlap, clip_norm, model)
        groups: list[Any] = list(params)
        self._lanes = self._open_lanes(groups)
        self._host = HostSlabs(self._lanes.pool, pin=self._lanes.device.type == "cuda")
        self._layout = StateLayout(self.rule, self.options.moment_dtype, self.options.split_master)
        self.placement = Placement(self._lanes.device, strategy, budget, profile, self.options)
        self.monitor = Monitor(self._lanes, self.placement.profile, self.options.recalibrate)
        self._gradients = Gradients(self._lanes, self._host, self._gradient_came)
        self._executor = Executor(self._lanes, self.options.staging_slots)
        if model is not None:
            self._order = forward_order(model)
        super().__init__(groups, dict(self.rule.hyperparameters()))
        self._adopt(self.param_groups)
        if model is not None and overlap != "none":
            self._handles += wait_in_forward(model, self.wait_for)

    def _open_lanes(self, groups: Sequence[Any]) -> Lanes:
        """Start the threads and streams for the device of the first parameter."""
        first = groups[0] if groups else None
        if isinstance(first, dict):
            members = first["params"]
            first = members if isinstance(members, torch.Tensor) else next(iter(members))
            groups[0]["params"] = members if isinstance(members, torch.Tensor) else list(members)
        if isinstance(first, tuple):
            first = first[1]
        device = local(first).device if isinstance(first, torch.Tensor) else torch.device("cpu")
        pool = CpuPool(self.options.cpu_threads, self.options.cpu_cores, device)
        return Lanes(device, pool, self.options.throttle)

    # ---- parameter groups -------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, also during training; homes are chosen anew."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            check_parameter(parameter, self._lanes.device)
        if self.subgroups:
            self._adopt([group])

    def _adopt(self, groups: Sequence[dict[str, Any]]) -> None:
        """Cut new groups into subgroups, choose homes for all, and make room before anything is
        allocated.
        """
        fresh = cut(groups, self._layout, self._host, self.options.subgroup_elements)
        for subgroup in fresh:
            for member in subgroup.members:
                self._order.setdefault(member.parameter, len(self._order))
        together = sorted([*self.subgroups, *fresh], key=self._first_use)
        for subgroup in fresh:
            warm_up(self.rule, subgroup.weight_dtype, self._layout.moment_dtype)
        homes = self.placement.choose([subgroup.shape for subgroup in together])
        self.subgroups = together
        for index, subgroup in enumerate(self.subgroups):
            subgroup.index = index
        for subgroup, home in zip(self.subgroups, homes, strict=True):
            if subgroup in fresh:
                subgroup.settle(home)
                self._take_members(subgroup)
        self.rehome(homes)

    def _first_use(self, subgroup: SubgroupState) -> int:
        return min(self._order[member.parameter] for member in subgroup.members)

    def _take_members(self, subgroup: SubgroupState) -> None:
        """Register where each parameter's state is and take over its gradients."""
        if self.options.accumulation_steps > 1:
            subgroup.widen_gradient()
        for member in subgroup.members:
            self._members[member.parameter] = (subgroup, member)
            streams = streams_gradients(self.options.stream_gradients, member.parameter)
            if streams and member.parameter.requires_grad:
                hook = member.parameter.register_post_accumulate_grad_hook(self._take)
                self._handles.append(hook)

    def rehome(self, homes: Sequence[Home]) -> None:
        """Move subgroups to other homes, between steps; numbers do not change.

        Args:
            homes: One per subgroup, in their order.
        """
        self.synchronize()
        # What leaves the device goes first, so that both never need the room at once.
        for leaving in (True, False):
            for subgroup, home in zip(self.subgroups, homes, strict=True):
                if (home is not Home.RESIDENT) == leaving:
                    subgroup.move(home)
        self._executor.make_slots(self.subgroups)
        for subgroup in self.subgroups:
            for member in subgroup.members:
                self.state[member.parameter] = dict(subgroup.state_of(member))

    def finish_report(self) -> UpdateReport | None:
        """Wait for the update under way and return its report, or the newest one there is.

        When updates have been off their prediction for a while, homes are chosen anew here.
        """
        self.synchronize()
        if self.monitor.finish(self.schedule) and self.monitor.corrected is not None:
            shapes = [subgroup.shape for subgroup in self.subgroups]
            self.rehome(self.placement.reconsider(shapes, self.homes, self.monitor.corrected))
        return self.monitor.last

    def give_back(self, device_bytes: int) -> None:
        """Free device memory, between steps, by moving state off the device."""
        shapes = [subgroup.shape for subgroup in self.subgroups]
        self.rehome(self.placement.give_back(shapes, self.homes, device_bytes))

    @property
    def schedule(self) -> Schedule | None:
        """Homes and times as the performance model expects them; None where it was not asked."""
        return self.placement.schedule

    @property
    def homes(self) -> tuple[Home, ...]:
        """The home of every subgroup, in the order of updates."""
        return tuple(subgroup.home for subgroup in self.subgroups)

    # ---- gradients --------------------------------------------------------------------------

    @torch.no_grad()
    def _take(self, parameter: torch.Tensor) -> None:
        """Take a gradient over; the hook that backward calls."""
        self._raise_failure()
        subgroup, member = self._members[parameter]
        self._begin()
        self._norm = None
        self._gradients.take(subgroup, member)

    def _begin(self) -> None:
        """Once per step, before its first gradient: notice weights that others have written."""
        if self._begun:
            return
        self._begun = True
        self.finish_report()
        if self.monitor.device_is_short():
            self.give_back(available_device_bytes(self._lanes.device) // 20)
        self.monitor.begin()
        for subgroup in self.subgroups:
            for ticket in subgroup.updating:
                ticket.wait_issued()
            if any(version_of(m.parameter) != m.version for m in subgroup.members):
                subgroup.wait()
                subgroup.read_weights()

    def _gradient_came(self, subgroup: SubgroupState) -> None:
        """With `overlap="backward"`: update a subgroup as soon as its gradients are complete."""
        if self.overlap != "backward" or subgroup in self._launched:
            return
        needed = self.options.accumulation_steps
        complete = all(member.arrivals == needed for member in subgroup.members)
        if complete and all_finite(subgroup):
            self._launch(subgroup, 1.0)

    def gradient_norm(self) -> float:
        """Return the global 2-norm of the gradients that came since the last step, over all shards;
        NaN if it is not finite. Every rank must call it.
        """
        self._take_remaining()
        if self._norm is None:
            self._norm = global_norm(self.subgroups)
        return self._norm

    def _take_remaining(self) -> None:
        """Take gradients over that no hook took: without streaming, or set by hand."""
        for parameter in self._members:
            if parameter.grad is not None:
                self._take(parameter)

    def gradients(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield every parameter whose gradient came and the gradient: this rank's part, summed."""
        self._take_remaining()
        for subgroup in self.subgroups:
            subgroup.wait()
            for member in subgroup.members:
                if member.arrivals:
                    piece = subgroup.gradient[member.start : member.stop]
                    yield member.parameter, piece.view(local(member.parameter).shape)

    @property
    def update_begun(self) -> bool:
        """Whether gradients of this step have led to updates already (`overlap="backward"`)."""
        return bool(self._launched)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients that came since the last step."""
        super().zero_grad(set_to_none)
        for subgroup in self.subgroups:
            if subgroup not in self._launched:
                self._forget(subgroup)
        self._norm = None
        self._begun = bool(self._launched)

    def _forget(self, subgroup: SubgroupState) -> None:
        for member in subgroup.members:
            member.arrivals = 0
            member.square = None

    # ---- the step ---------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: None = None, *, gradient_scale: float = 1.0) -> None:  # pyright: ignore
        """Update all parameters whose gradients came.

        Args:
            closure: Refused: an update that evaluates the loss again cannot overlap with it.
            gradient_scale: Gradients are multiplied by this first (one over a loss scale).

        Raises:
            NonFiniteGradient: Some gradient is infinite or NaN.
            LaneError: A copy or an update failed; the state is not to be trusted any more.
        """
        if closure is not None:
            raise TypeError(
                "OffloadedOptimizer.step takes no closure: updates overlap with backward and "
                "forward, so the loss cannot be evaluated inside; call loss.backward() first"
            )
        self._raise_failure()
        self._begin()
        factor = gradient_scale * self._clip_factor(gradient_scale)
        with self.monitor.waiting():
            for subgroup in self.subgroups:
                if subgroup not in self._launched:
                    self._launch(subgroup, factor)
            self._finish_step()
            if self.overlap == "none":
                self._wait_all()

    def _clip_factor(self, gradient_scale: float) -> float:
        """Return by what clipping scales gradients; raise, on all ranks alike, if one is not
        finite.
        """
        norm = self.gradient_norm() * gradient_scale
        if not math.isfinite(norm):
            raise NonFiniteGradient(self._describe_non_finite())
        if self.clip_norm is None or norm <= self.clip_norm:
            return 1.0
        return self.clip_norm / (norm + 1e-6)

    def _describe_non_finite(self) -> str:
        """Say which gradients are not finite and what was updated."""
        bad = [
            number
            for number, (_, gradient) in enumerate(self.gradients())
            if not bool(torch.isfinite(gradient).all())
        ]
        shown = ", ".join(str(number) for number in bad[:8]) + (", ..." if len(bad) > 8 else "")
        where = f"gradient of parameter {shown}" if bad else "gradient on another rank"
        if not self._launched:
            return f"{where} is not finite; nothing was updated; zero_grad() drops the gradients"
        self._failure = (
            f"{where} is not finite, and overlap='backward' had updated {len(self._launched)} of "
            f"{len(self.subgroups)} subgroups; continue from the last checkpoint"
        )
        return self._failure

    def _launch(self, subgroup: SubgroupState, scale: float) -> None:
        work = Work.of(subgroup, scale)
        if work.arrived:
            gradients = subgroup.arriving
            self._executor.launch(work)
            for member in work.arrived:
                member.step += 1
            self.monitor.launched(subgroup, gradients, int(work.arrived[0].step))
        self._launched.add(subgroup)

    def _finish_step(self) -> None:
        """Be ready for the next step's gradients."""
        for subgroup in self.subgroups:
            self._forget(subgroup)
        self._launched.clear()
        self._norm = None
        self._begun = False

    def wait_for(self, parameters: Iterable[torch.Tensor]) -> None:
        """Wait until these parameters have their new weights; the rest of the update goes on."""
        with self.monitor.waiting(), self._noting_failure():
            for subgroup in {self._members[p][0]: None for p in parameters if p in self._members}:
                ticket = subgroup.weights_ready
                if ticket is None:
                    continue
                if isinstance(subgroup.members[0].parameter, DTensor):
                    # FSDP2 gathers shards on streams of its own, which must not run ahead.
                    ticket.wait()
                else:
                    ticket.wait_on_stream()

    def _wait_all(self) -> None:
        """Let everything that follows on the current stream see the update."""
        with self._noting_failure():
            for subgroup in self.subgroups:
                for ticket in subgroup.updating:
                    ticket.wait_on_stream()

    def synchronize(self) -> None:
        """Block until no update and no gradient is under way; state may then be read or written.

        Raises:
            LaneError: Some of it failed.
        """
        self._raise_failure()
        with self._noting_failure():
            for subgroup in self.subgroups:
                subgroup.wait()

    @contextmanager
    def _noting_failure(self) -> Generator[None]:
        """Remember that an update failed: nothing may build on its state."""
        try:
            yield
        except LaneError as error:
            self._failure = f"{error}; the state is half updated: continue from a checkpoint"
            raise LaneError(self._failure) from error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise LaneError(self._failure)

    # ---- saving and loading -----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return torch's usual state dict, after waiting for the update under way.

        Its tensors are views of the live state, as with any torch optimizer.
        """
        self.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore
        """Load what `state_dict` returned, also under another strategy, and also what the same rule
        in torch.optim returned. Load the model's weights first.

        Raises:
            ValueError: The groups or shapes differ, or a moment is missing.
        """
        self.synchronize()
        load_state(self.param_groups, self.place_of, state_dict)

    def master(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return a parameter's weights in full precision, in its shape and sharded like it.

        A view of the live state where there is one; with a split master a copy.
        """
        subgroup, member = self._members[parameter]
        subgroup.wait()
        return member.shaped(subgroup.master_of(member).view(-1))

    def set_master(self, parameter: torch.Tensor, master: torch.Tensor) -> None:
        """Write a parameter's weights, in full precision (this rank's part, float32)."""
        subgroup, member = self._members[parameter]
        subgroup.wait()
        subgroup.set_master(member, local(master))

    def place_of(self, parameter: torch.Tensor) -> tuple[SubgroupState, Member]:
        """Return where a parameter's state is."""
        return self._members[parameter]

    def close(self) -> None:
        """Take all hooks off and end the threads; the optimizer cannot be used afterwards."""
        for handle in self._handles:
            handle.remove()
        self.synchronize()
        self._lanes.close()
