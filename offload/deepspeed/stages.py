"""Where the update takes ZeRO's place, stage by stage.

Methods of one optimizer object are bound anew; DeepSpeed's classes are left alone. ZeRO's `step`
goes on deciding everything that is not the update: norms, overflow, loss scale, what is gathered
afterwards. By what gradients are scaled is asked of DeepSpeed's own code, on a gradient of one.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as distributed

from interlace.offload.deepspeed.attachment import Attachment
from interlace.offload.deepspeed.flats import Lent


class Bindings:
    """Attributes of one object that stand before what its class has, until they are taken off."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.before: dict[str, Any] = {}

    def put(self, name: str, value: Callable[..., Any]) -> None:
        """Bind a name anew."""
        self.before[name] = vars(self.target).get(name, self)
        setattr(self.target, name, value)

    def undo(self) -> None:
        """Bind every name as it was."""
        for name, value in self.before.items():
            if value is self:
                delattr(self.target, name)
            else:
                setattr(self.target, name, value)
        self.before = {}


class WithUnitGradient:
    """An optimizer in whose place DeepSpeed's own `unscale_and_clip_grads` scales a gradient of
    one, and thereby says what it scales by.
    """

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self.fp32_partitioned_groups_flat = [torch.zeros(1)]
        self.fp32_partitioned_groups_flat[0].grad = torch.ones(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.zero, name)


def idle_parts(zero: Any, params: Iterable[Any]) -> list[slice]:
    """Return where the gradients of parameters are that none came to since the last update."""
    idle = [key for key in map(zero.get_param_id, params) if key not in zero.norm_for_param_grads]
    # Places end with the offset in the partition and the number of elements, in all stages.
    places = [zero.grad_position[key][-2:] for key in idle]
    return [slice(start, start + count) for start, count in places]


class Stage3:
    """ZeRO-3: the loop of `step` over subgroups launches, and `_post_step` waits."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self.bindings = Bindings(zero)
        self.begun = False

    def lent(self) -> list[Lent]:
        """Return the subgroups of ZeRO-3."""
        zero = self.zero
        pairs = zip(
            zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True
        )
        groups = zero.sub_group_to_group_id
        return [Lent(tensor, weight, groups[n]) for n, (tensor, weight) in enumerate(pairs)]

    def relink(self) -> None:
        """Do nothing: ZeRO-3 looks its tensors up whenever it needs them."""

    def bind(self, attachment: Attachment) -> None:
        """Put the update in the place of ZeRO's."""
        own_step, own_post_step = self.zero.step, self.zero._post_step
        own_clean_up = self.zero._overflow_clean_up
        scales: dict[int, float] = {}

        def unscale_and_clip_grads(sub_group_id: int, total_norm: Any) -> None:
            if not self.begun:
                attachment.begin()
                self.begun = True
            scales[sub_group_id] = self.scale(total_norm)

        def optimizer_step(sub_group_id: int) -> None:
            flat, scale = attachment.flats[sub_group_id], scales.pop(sub_group_id)
            attachment.launch(flat, scale, self.idle(sub_group_id))

        def reassign(sub_group_id: int) -> None:
            self.zero._unflatten_partitioned_parameters(sub_group_id)

        def post_step(*arguments: Any, **named: Any) -> None:
            attachment.finish()
            own_post_step(*arguments, **named)

        def overflow_clean_up(*arguments: Any, **named: Any) -> None:
            for number, flat in enumerate(attachment.flats):
                attachment.skip(flat, self.idle(number))
            own_clean_up(*arguments, **named)

        def step(*arguments: Any, **named: Any) -> None:
            self.begun = False
            with attachment.one_step():
                own_step(*arguments, **named)

        self.bindings.put("step", step)
        self.bindings.put("unscale_and_clip_grads", unscale_and_clip_grads)
        self.bindings.put("_optimizer_step", optimizer_step)
        self.bindings.put("_reassign_or_swap_out_partitioned_parameters", reassign)
        self.bindings.put("_post_step", post_step)
        self.bindings.put("_overflow_clean_up", overflow_clean_up)

    def unbind(self) -> None:
        """Give ZeRO its own methods back."""
        self.bindings.undo()

    def idle(self, number: int) -> list[slice]:
        """Return the parts of a subgroup without new gradients."""
        return idle_parts(self.zero, self.zero.fp16_groups[number])

    def scale(self, total_norm: Any) -> float:
        """Return what ZeRO multiplies gradients by."""
        unit = WithUnitGradient(self.zero)
        type(self.zero).unscale_and_clip_grads(unit, 0, total_norm)
        gradient = unit.fp32_partitioned_groups_flat[0].grad
        assert gradient is not None
        return float(gradient)


class Stages1And2:
    """ZeRO-1 and 2: `step` writes weights in the middle of its loop over groups. It is shown no
    groups there, and the update runs where the loop ends.
    """

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self.bindings = Bindings(zero)
        self.norm: Any = None
        self.hidden: list[Any] | None = None

    def lent(self) -> list[Lent]:
        """Return this rank's part of every parameter group."""
        zero = self.zero
        lent: list[Lent] = []
        for number, tensor in enumerate(zero.single_partition_of_fp32_groups):
            rank = distributed.get_rank(zero.real_dp_process_group[number])
            weight = zero.parallel_partitioned_bit16_groups[number][rank]
            lent.append(Lent(tensor, weight, number))
        return lent

    def relink(self) -> None:
        """Renew the views of single parameters that `safe_get_...` reads."""
        self.zero._link_all_hp_params()
        self.zero._hp_optimizer_states_linked = False
        self.zero._lazy_init_hp_params_optimizer_state()

    def bind(self, attachment: Attachment) -> None:
        """Put the update in the place of ZeRO's."""
        zero = self.zero
        own_norm, own_update_scale = zero.scaled_global_norm, zero._update_scale
        own_reset, own_step = zero.reset_cpu_buffers, zero.step

        def scaled_global_norm(*arguments: Any, **named: Any) -> Any:
            # Early 0.19 scales before it asks for the norm, for which it needs the groups.
            hidden = self.hidden is not None
            self.show()
            self.norm = own_norm(*arguments, **named)
            if hidden:
                self.hide()
            return self.norm

        def update_scale(has_overflow: bool = False) -> None:
            own_update_scale(has_overflow)
            if not has_overflow:
                self.hide()
                return
            for number, flat in enumerate(attachment.flats):
                attachment.skip(flat, self.idle(number))

        def reset_cpu_buffers() -> None:
            if self.hidden is not None:
                self.show()
                self.update(attachment)
            own_reset()

        def step(*arguments: Any, **named: Any) -> None:
            try:
                with attachment.one_step():
                    own_step(*arguments, **named)
            finally:
                self.show()

        self.bindings.put("scaled_global_norm", scaled_global_norm)
        self.bindings.put("_update_scale", update_scale)
        self.bindings.put("reset_cpu_buffers", reset_cpu_buffers)
        self.bindings.put("step", step)

    def unbind(self) -> None:
        """Give ZeRO its own methods back."""
        self.show()
        self.bindings.undo()

    def hide(self) -> None:
        """Let the loop of `step` find no groups."""
        self.hidden, self.zero.bit16_groups = self.zero.bit16_groups, []

    def show(self) -> None:
        """Show the groups again."""
        if self.hidden is not None:
            self.zero.bit16_groups, self.hidden = self.hidden, None

    def update(self, attachment: Attachment) -> None:
        """Update all partitions."""
        attachment.begin()
        scale = self.scale()
        for number, flat in enumerate(attachment.flats):
            attachment.launch(flat, scale, self.idle(number))
        attachment.finish()

    def idle(self, number: int) -> list[slice]:
        """Return the parts of a parameter group's partition without new gradients."""
        return idle_parts(self.zero, self.zero.params_in_partition[number])

    def scale(self) -> float:
        """Return what ZeRO multiplies gradients by."""
        unit = torch.ones(1)
        type(self.zero).unscale_and_clip_grads(self.zero, [unit], self.norm)
        return float(unit)
