"""`OffloadedOptimizer`: a `torch.optim.Optimizer` whose state lives where the machine serves it
best.

It takes parameters or parameter groups and an update rule, cuts them into subgroups, asks the
performance model for a home for each, and from then on behaves like any optimizer: `backward`
delivers gradients, `step` updates, schedulers change `param_groups`. Parameters stay where they
are; plain tensors, DDP's and FSDP2's `DTensor` shards all work. Reference: Deep Optimizer States
(arXiv 2410.21316).

Fastest is `clipped_sgd` with `overlap="backward"`: clipped coordinates need no norm, so a subgroup
is updated once its own gradient is complete, with half of Adam's state or none to move.
"""

import math
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from interlace.kernels.update import AdamW, UpdateRule
from interlace.offload.clipping import Clipping
from interlace.offload.cores import CpuPool
from interlace.offload.executor import Executor, Work
from interlace.offload.forward import wait_around_state_dicts, wait_in_forward
from interlace.offload.gradients import Gradients, Tap, all_finite, global_norm
from interlace.offload.hardware import HardwareProfile
from interlace.offload.homes import Homes
from interlace.offload.lanes import Lanes
from interlace.offload.memory import HostSlabs
from interlace.offload.monitor import Monitor
from interlace.offload.options import (
    OffloadOptions,
    Overlap,
    check_arguments,
    check_parameter,
    check_step,
    device_of,
    layout_of,
    listed,
    streams_gradients,
)
from interlace.offload.ownership import end, end_later, release, weakly
from interlace.offload.persistence import checked, load_state
from interlace.offload.placement import Placement
from interlace.offload.report import UpdateReport
from interlace.offload.roster import Roster
from interlace.offload.row_blocks import check_row_blocks
from interlace.offload.schedule import Home, MemoryBudget, Schedule, Strategy
from interlace.offload.step import (
    Health,
    NonFiniteGradient,
    OpenStep,
    late_gradient,
    not_finite,
    undroppable,
)
from interlace.offload.subgroup import SubgroupState, local


class OffloadedOptimizer(torch.optim.Optimizer):
    """Any update rule over offloaded state.

    Args:
        params: Parameters or parameter groups, as torch's optimizers take them: float32 or bfloat16
            (float64 on a CPU), plain or `DTensor`, all on one device. Frozen parameters get state
            when they no longer are.
        rule: The update rule with the defaults of its hyperparameters.
        strategy: `optimal` asks the performance model, `none` keeps all state on the device, `host`
            all on the host, `stride` stages every k-th subgroup.
        budget: Memory that state may occupy; None means what is free now, with a margin.
        profile: What the machine can do; None means the profile on record, measured if need be.
        overlap: What the update runs beside: `none`, the next `forward` (needs `model`), or already
            `backward` (needs `clip_norm=None`; goes on beside the next forward if `model` is
            given).
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
        check_arguments(self.rule, strategy, overlap, clip_norm, model, budget)
        self.strategy: Strategy = strategy
        self.overlap: Overlap = overlap
        self.clip_norm = clip_norm
        self.options = options or OffloadOptions()
        self._waits_in_forward = model is not None and overlap != "none"
        self._handles: list[RemovableHandle] = []
        self._step = OpenStep()
        self._constructed = False
        groups = listed(params)
        device = device_of(groups)
        pool = CpuPool(self.options.cpu_threads, self.options.cpu_cores, device)
        self._lanes = Lanes(device, pool, self.options.throttle)
        try:
            self._build(groups, model, budget, profile)
        except BaseException:
            self._lanes.close()
            raise
        # Hooks hold it weakly: an optimizer that is dropped ends what it began and is gone.
        self._end = weakref.finalize(self, end_later, self._roster, self._lanes, self._handles)
        self._end.atexit = False
        if model is not None and self._waits_in_forward:
            self._handles += wait_in_forward(model, weakly(self.wait_for))
            settle = weakly(self._roster.settle)
            self._handles += wait_around_state_dicts(model, weakly(self.synchronize), settle)

    def _build(
        self,
        groups: list[Any],
        model: nn.Module | None,
        budget: MemoryBudget | None,
        profile: HardwareProfile | None,
    ) -> None:
        """Make the engine's parts and place the state of all groups."""
        options, lanes = self.options, self._lanes
        host = HostSlabs(lanes.pool, pin=lanes.device.type == "cuda")
        layout = layout_of(self.rule, options)
        self._roster = Roster(model, layout, host, options.subgroup_elements)
        self._health = Health(self._roster.settle)
        self._clipping = Clipping(self.rule, self._roster)
        self.placement = Placement(lanes.device, self.strategy, budget, profile, options)
        self.monitor = Monitor(lanes, self.placement.profile, options.recalibrate)
        self._gradients = Gradients(lanes, host, weakly(self._gradient_came))
        self._executor = Executor(lanes, options.staging_slots)
        super().__init__(groups, dict(self.rule.hyperparameters()))
        parts = (self._roster, self.placement, self.monitor, self._executor)
        self._homes = Homes(*parts, self.state, weakly(self.synchronize))
        self._adopt()
        self._constructed = True

    # ---- parameter groups -------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, also during training; homes are chosen anew.

        Raises:
            ValueError: It cannot be served; the optimizer is as it was.
            MemoryShortage: Its state does not fit; likewise.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for parameter in group["params"]:
                check_parameter(parameter, self._lanes.device)
                check_row_blocks(group, parameter)
            # While the optimizer is constructed all groups are placed together afterwards.
            if self._constructed:
                self._adopt()
        except BaseException:
            self.param_groups.pop()
            raise

    def _adopt(self, frozen: Collection[torch.Tensor] = ()) -> None:
        """Give state to all parameters without any; frozen ones get none but for those named."""
        for parameter in self._homes.admit(self.param_groups, self, frozen):
            streams = streams_gradients(self.options.stream_gradients, parameter)
            if streams and parameter.requires_grad:
                hook = weakly(self._take)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def rehome(self, homes: Sequence[Home]) -> None:
        """Move subgroups to other homes, between steps; numbers do not change.

        Args:
            homes: One per subgroup, in their order.

        Raises:
            LaneError: The update under way failed.
            MemoryShortage: The system refuses the memory.
        """
        self._homes.move_to(homes)

    def finish_report(self) -> UpdateReport | None:
        """Wait for the update under way and return its report, or the newest one there is. When
        updates have been off their prediction for a while, homes are chosen anew here.
        """
        self.synchronize()
        self._homes.reconsider()
        return self.monitor.last

    def give_back(self, device_bytes: int) -> None:
        """Free device memory, between steps, by moving state off the device."""
        self._homes.give_back(device_bytes)

    @property
    def subgroups(self) -> Sequence[SubgroupState]:
        """All state, in the order of updates."""
        return self._roster.subgroups

    @property
    def schedule(self) -> Schedule | None:
        """Homes and times as the performance model expects them; None where it was not asked."""
        return self.placement.schedule

    @property
    def homes(self) -> tuple[Home, ...]:
        """The home of every subgroup, in the order of updates."""
        return self._homes.present

    # ---- gradients --------------------------------------------------------------------------

    @torch.no_grad()
    def _take(self, parameter: torch.Tensor) -> None:
        """Take a gradient over; the hook that backward calls."""
        self._health.check()
        subgroup, member = self._roster.members[parameter]
        if subgroup in self._step.launched:
            name = self._roster.name_of(parameter, self.param_groups)
            self._health.failure = late_gradient(name, self.options.accumulation_steps)
            raise RuntimeError(self._health.failure)
        self._begin()
        self._step.norm = None
        self._gradients.take(subgroup, member)

    def _begin(self) -> None:
        """Once per step, before its first gradient: finish the last one."""
        if self._step.begun:
            return
        self._step.begun = True
        self.finish_step()
        self.finish_report()
        self._homes.relieve()
        self.monitor.begin()

    def _gradient_came(self, subgroup: SubgroupState) -> None:
        """With `overlap="backward"`: update a subgroup as soon as its gradients are complete."""
        if self.overlap != "backward":
            return
        needed = self.options.accumulation_steps
        complete = all(
            member.arrivals == needed
            for member in subgroup.members
            if member.parameter.requires_grad
        )
        # What guards itself need not be looked at, which waits for the device.
        if complete and (self.guards or all_finite(subgroup)):
            self._launch(subgroup, 1.0)

    def gradient_norm(self) -> float:
        """Return the global 2-norm of the gradients that came since the last step, over all shards;
        NaN if it is not finite. Every rank must call it.
        """
        self._take_remaining()
        if self._step.norm is None:
            self._step.norm = global_norm(self.subgroups, self.param_groups)
        return self._step.norm

    def _take_remaining(self) -> None:
        """Take gradients over that no hook took: without streaming, set by hand, or of parameters
        that were frozen until now.
        """
        thawed = (
            parameter.requires_grad and parameter not in self._roster.members
            for group in self.param_groups
            for parameter in group["params"]
        )
        if any(thawed):
            self._adopt()
        for parameter, (_, member) in self._roster.members.items():
            if parameter.grad is not None:
                self._take(parameter)
                if member.arriving is not None:
                    # Whose buffer it is may fill it anew: DDP its buckets, a loop its own.
                    member.arriving.wait_on_stream()

    def gradients(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield every parameter whose gradient came and the gradient: this rank's part, summed."""
        self._take_remaining()
        yield from self._roster.gradients()

    def tapping(self, tap: Tap) -> AbstractContextManager[None]:
        """Show every gradient that comes inside the context to `tap`, which may drop it."""
        return self._gradients.tapping(tap)

    @property
    def update_begun(self) -> bool:
        """Whether gradients of this step have led to updates already (`overlap="backward"`)."""
        return bool(self._step.launched)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients that came since the last step.

        Raises:
            RuntimeError: Some of them have led to updates already.
        """
        super().zero_grad(set_to_none)
        if self._step.launched:
            self._health.check()
            raise RuntimeError(undroppable(len(self._step.launched), len(self.subgroups)))
        self._step = self._roster.next_step()

    @property
    def guards(self) -> bool:
        """Whether updates need no norm, and take coordinates that are not finite as 0: where a
        `CoordinateClip` is not given a `clip_norm` as well.
        """
        return self._clipping.clip is not None and self.clip_norm is None

    # ---- the step ---------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: None = None, *, gradient_scale: float = 1.0) -> None:  # pyright: ignore
        """Update all parameters whose gradients came.

        Args:
            closure: Refused: an update that evaluates the loss again cannot overlap with it.
            gradient_scale: Gradients are multiplied by this first (one over a loss scale).

        Raises:
            NonFiniteGradient: Some gradient is infinite or NaN, and the rule does not guard.
            LaneError: A copy or an update failed; the state is not to be trusted any more.
        """
        check_step(closure, self.overlap, gradient_scale)
        self._health.check()
        self._begin()
        factor = gradient_scale * self._clip_factor(gradient_scale)
        threshold = self._clipping.threshold_of(self.param_groups, factor)
        with self.monitor.waiting(), self._health.uninterrupted():
            for subgroup in self.subgroups:
                if subgroup not in self._step.launched:
                    self._launch(subgroup, factor, threshold)
            self._step = self._roster.next_step(self._step.launched)
            self._clipping.due = True
            if not self._waits_in_forward:
                with self._health.watched():
                    self._roster.wait_on_stream()

    def _clip_factor(self, gradient_scale: float) -> float:
        """Return by what clipping by norm scales gradients; raise, on all ranks alike, if one is
        not finite.
        """
        if self.guards:
            self._take_remaining()
            return 1.0
        norm = self.gradient_norm() * gradient_scale
        if not math.isfinite(norm):
            raise NonFiniteGradient(self._describe_non_finite())
        if self.clip_norm is None or norm <= self.clip_norm:
            return 1.0
        return self.clip_norm / (norm + 1e-6)

    def _describe_non_finite(self) -> str:
        """Say which gradients are not finite and what was updated."""
        bad, launched = self._roster.not_finite(self.param_groups), len(self._step.launched)
        message = not_finite(bad, launched, len(self.subgroups))
        if launched:
            self._health.failure = message
        return message

    def _launch(
        self, subgroup: SubgroupState, scale: float, threshold: float | None = None
    ) -> None:
        subgroup.notice_other_writers()
        work = Work.of(subgroup, scale, threshold)
        # Before the work itself: an interruption must not lead to a second update.
        self._step.launched[subgroup] = None
        if work.arrived:
            gradients = subgroup.arriving
            self._executor.launch(work)
            self._clipping.launched(work)
            for member in work.arrived:
                member.step += 1
            self.monitor.launched(subgroup, gradients, int(work.arrived[0].step))

    def wait_for(self, parameters: Iterable[torch.Tensor]) -> None:
        """Wait until these parameters have their new weights; the rest of the update goes on."""
        pending = self._roster.pending(parameters)
        if pending:
            with self.monitor.waiting(), self._health.watched():
                for wait in pending:
                    wait()

    def synchronize(self) -> None:
        """Block until no update and no gradient is under way; weights and state may then be read or
        written. With overlap it belongs before everything that touches weights between steps other
        than the model's forward and its `state_dict` and `load_state_dict`: averaging them,
        clamping them.

        Raises:
            LaneError: Some of it failed.
        """
        self._health.check()
        with self._health.watched():
            for subgroup in self.subgroups:
                subgroup.wait()

    def finish_step(self) -> None:
        """Wait for the update under way and learn from it what the next one needs; the next step
        does so by itself. Where thresholds are lagged quantiles every rank must call it, before
        `state` is read.
        """
        self.synchronize()
        self._clipping.finish(self.param_groups)

    def clip_fractions(self) -> dict[torch.Tensor, float]:
        """Return what share of its coordinates was clipped, or not finite, for every parameter that
        the newest finished update changed, over all shards. Every rank must call it. Once gradients
        of a step have come that is the update of the step before.
        """
        return self._clipping.fractions(self.param_groups)

    # ---- saving and loading -----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return torch's usual state dict, after waiting for the update under way. With thresholds
        that are lagged quantiles every rank must call it.

        Its tensors are views of the live state, as with any torch optimizer.
        """
        self.finish_step()
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore
        """Load what `state_dict` returned, also under another strategy, and what the same rule in
        torch.optim returned. Load the model's weights first. Gradients that came are forgotten, and
        an optimizer whose update failed is sound again.

        Raises:
            ValueError: The groups or shapes differ, a moment is missing, or a setting of the saved
                groups (`amsgrad`, `maximize`) asks for another update.
        """
        if not self._end.alive:
            self._health.check()
        for adapt in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = adapt(self, dict(state_dict)) or state_dict
        saved = checked(self.rule, self.param_groups, state_dict)
        self._roster.settle()
        parts = (self._roster, self._gradients, self._executor, self.monitor, self._clipping)
        for part in parts:
            part.forget_work()
        self._step = self._roster.next_step()
        failure, self._health.failure = self._health.failure, None
        frozen = [p for p, state in saved if state and p not in self._roster.members]
        try:
            if frozen:
                self._adopt(frozen)
            load_state(self.param_groups, self._roster.members, saved, state_dict)
        except BaseException:
            self._health.failure = failure
            raise
        for notify in self._optimizer_load_state_dict_post_hooks.values():
            notify(self)

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "an OffloadedOptimizer can be neither copied nor pickled; save its state_dict()"
        )

    def master(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return a parameter's weights in full precision, in its shape and sharded like it.

        A view of the live state where there is one; with a split master a copy.
        """
        subgroup, member = self._roster.members[parameter]
        subgroup.wait()
        return member.shaped(subgroup.master_of(member).view(-1))

    def set_master(self, parameter: torch.Tensor, master: torch.Tensor) -> None:
        """Write a parameter's weights, in full precision (this rank's part, float32)."""
        subgroup, member = self._roster.members[parameter]
        subgroup.wait()
        subgroup.set_master(member, local(master))

    def close(self) -> None:
        """Finish what is under way, take all hooks off and end the threads; the optimizer cannot be
        used afterwards, and another may serve its parameters.

        Raises:
            LaneError: The last update failed, and nobody knew it yet.
        """
        if self._end.detach() is None:
            return
        try:
            if self._health.failure is None:
                self.synchronize()
        finally:
            self._health.failure = self._health.failure or "the optimizer is closed"
            release(self._roster.members, self)
            end(self._roster, self._lanes, self._handles)
