"""The settings of `OffloadedOptimizer` that have good defaults, and checks of what it is given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as distributed
from torch import nn
from torch.distributed.tensor import DTensor

from interlace.kernels.update import CoordinateClip, UpdateRule
from interlace.offload.cores import usable_cores
from interlace.offload.lanes import Throttle
from interlace.offload.schedule import NOTHING_HIDDEN, STRATEGIES, HiddenWindow, MemoryBudget
from interlace.offload.subgroup import StateLayout, local

Overlap = Literal["none", "forward", "backward"]

SUPPORTED = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class OffloadOptions:
    """How offloading is done.

    Attributes:
        stride: With strategy `stride`: every `stride`-th subgroup is updated on the device; None
            takes the published rule.
        subgroup_elements: Parameters per subgroup, about; a larger parameter is one of its own.
        staging_slots: Sets of device buffers for staged subgroups; two let copies in, updates and
            copies out run beside each other.
        moment_dtype: float32, or bfloat16 with stochastic rounding (half the memory and traffic).
        split_master: Keep masters of bfloat16 weights as the weight and a 16-bit remainder: exact,
            2 bytes per parameter less on the device and in every copy.
        accumulation_steps: Backward passes per step; `overlap="backward"` starts an update after
            so many gradients, and more than one makes room for sums in float32 at once.
        stream_gradients: Let gradients leave the device during backward. None means yes, except
            for plain parameters in a run of several processes: they may be DDP's, whose gradients
            are not averaged yet when backward hands them over. False leaves them in `Tensor.grad`
            until `step`, for loops that look at it or change it there.
        hidden_window: Compute beside which the update may run, for the performance model.
        cpu_threads: Threads that update on the host; None means one per core of the rank's share.
        cpu_cores: Cores to bind them to; None means this rank's share of those near its GPU.
        recalibrate: Measure every step and choose homes anew when the prediction is off.
        throttle: Without a GPU: rates of simulated copies.
    """

    stride: int | None = None
    subgroup_elements: int = 100_000_000
    staging_slots: int = 2
    moment_dtype: torch.dtype = torch.float32
    split_master: bool = False
    accumulation_steps: int = 1
    stream_gradients: bool | None = None
    hidden_window: HiddenWindow = NOTHING_HIDDEN
    cpu_threads: int | None = None
    cpu_cores: Sequence[int] | None = None
    recalibrate: bool = False
    throttle: Throttle | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name, least in (
            ("stride", 1),
            ("subgroup_elements", 1),
            ("staging_slots", 1),
            ("accumulation_steps", 1),
            ("cpu_threads", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: must be {least} or more")
        wanted = set(self.cpu_cores) if self.cpu_cores is not None else usable_cores()
        if not wanted or wanted - usable_cores():
            raise ValueError(
                f"cpu_cores={sorted(wanted)}: this process may run on "
                f"{sorted(usable_cores())}; name some of these, or None for all"
            )
        if self.moment_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"moment_dtype={self.moment_dtype}: moments are kept in torch.float32 or "
                "torch.bfloat16"
            )


def layout_of(rule: UpdateRule, options: OffloadOptions) -> StateLayout:
    """Return in which precision options keep a rule's state."""
    return StateLayout(
        rule,
        options.moment_dtype,
        options.split_master,
        sums_gradients=options.accumulation_steps > 1,
    )


def check_arguments(
    rule: object,
    strategy: str,
    overlap: str,
    clip_norm: float | None,
    model: nn.Module | None,
    budget: object,
) -> None:
    """Refuse arguments of the wrong kind and settings that exclude each other."""
    if not hasattr(rule, "moments"):
        raise TypeError(
            f"rule={rule!r}: give an update rule as an object, such as AdamW(lr=1e-3) of "
            "interlace.offload"
        )
    if budget is not None and not isinstance(budget, MemoryBudget):
        raise TypeError(
            f"budget={budget!r}: give MemoryBudget(device_bytes=..., host_bytes=...), or None for "
            "what is free"
        )
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r}: must be one of {', '.join(STRATEGIES)}")
    check_overlap(overlap, clip_norm, model)
    if isinstance(rule, CoordinateClip):
        check_policy(rule, overlap)


def check_policy(rule: CoordinateClip, overlap: str) -> None:
    """Refuse a policy of thresholds that does not know them in time, or not of what is clipped."""
    if rule.policy == "global_quantile" and overlap == "backward":
        raise ValueError(
            "policy='global_quantile' with overlap='backward': the quantile of all gradients is "
            "known only after backward, so updates cannot start before; use overlap='forward', or "
            "policy='lagged_quantile' or 'fixed'"
        )
    if rule.policy != "fixed" and rule.stage == "update":
        raise ValueError(
            f"policy={rule.policy!r} with stage='update': quantiles are those of the gradient, "
            "which says nothing of how large an update is; use policy='fixed' or stage='gradient'"
        )


def check_step(closure: object, overlap: str, gradient_scale: float) -> None:
    """Refuse arguments of `step` that an update beside other work cannot serve."""
    if closure is not None:
        raise TypeError(
            "OffloadedOptimizer.step takes no closure: updates overlap with backward and "
            "forward, so the loss cannot be evaluated inside; call loss.backward() first"
        )
    if overlap == "backward" and gradient_scale != 1.0:
        raise ValueError(
            f"gradient_scale={gradient_scale}: overlap='backward' has used gradients as they "
            "came; scale the loss by its inverse no more, or use another overlap"
        )


def check_overlap(overlap: str, clip_norm: float | None, model: nn.Module | None) -> None:
    """Refuse an overlap that cannot be exact with what was given."""
    if overlap not in get_args(Overlap):
        raise ValueError(f"overlap={overlap!r}: must be 'none', 'forward' or 'backward'")
    if overlap == "forward" and model is None:
        raise ValueError(
            "overlap='forward': the forward pass has to wait for its weights layer by layer; give "
            "the module as model=..., or use overlap='none'"
        )
    if overlap == "backward" and clip_norm is not None:
        raise ValueError(
            f"overlap='backward' with clip_norm={clip_norm}: the norm is known only after "
            "backward, so updates cannot start before; use overlap='forward' or clip_norm=None"
        )
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm={clip_norm}: must be more than 0, or None for no clipping")


def listed(params: Any) -> list[Any]:
    """Return parameters or groups with every iterable read, once: generators end."""
    if isinstance(params, torch.Tensor):
        raise TypeError("params: give an iterable of parameters or groups; for one, [parameter]")

    def members(of: Any) -> Any:
        # Of sets torch says itself that they have no order.
        return of if isinstance(of, (torch.Tensor, set)) else list(of)

    return [
        {**group, "params": members(group["params"])} if isinstance(group, dict) else group
        for group in params
    ]


def device_of(groups: Sequence[Any]) -> torch.device:
    """Return the device of the first parameter; the CPU if there is none."""
    for group in groups:
        members = group["params"] if isinstance(group, dict) else [group]
        for member in [members] if isinstance(members, torch.Tensor) else members:
            tensor = member[1] if isinstance(member, tuple) else member
            if isinstance(tensor, torch.Tensor):
                return local(tensor).device
    return torch.device("cpu")


def check_parameter(parameter: torch.Tensor, device: torch.device) -> None:
    """Refuse a parameter that cannot be offloaded."""
    shape = tuple(parameter.shape)
    here = local(parameter)
    if parameter.dtype not in SUPPORTED:
        raise ValueError(
            f"a parameter of shape {shape} has dtype {parameter.dtype}; supported are "
            "torch.bfloat16 and torch.float32 (torch.float64 on a CPU)"
        )
    if here.device != device:
        raise ValueError(
            f"a parameter of shape {shape} is on {here.device}, others on {device}; one optimizer "
            "serves one device"
        )
    if not here.is_contiguous():
        raise ValueError(f"a parameter of shape {shape} is not contiguous in memory")


def streams_gradients(asked: bool | None, parameter: torch.Tensor) -> bool:
    """Whether gradients may be taken over inside backward."""
    if asked is not None:
        return asked
    several = distributed.is_initialized() and distributed.get_world_size() > 1
    return isinstance(parameter, DTensor) or not several
