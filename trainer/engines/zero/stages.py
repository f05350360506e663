"""ZeRO's own books, stage by stage: where the parts of a parameter lie, what its gradient is, and
how weights follow from masters.

ZeRO flattens tensors and cuts them anywhere. In stages 1 and 2 each parameter group is one flat
vector, of which every rank has an equal part; in stage 3 each parameter is cut for itself, and the
parts of many lie behind each other in a subgroup. Every name read or bound anew here is private to
DeepSpeed; they are listed, and looked for before anything is trained. Source:
`deepspeed/runtime/zero/{stage3,stage_1_and_2}.py` of 0.19.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch

from interlace.trainer.errors import ConfigError

STAGE_3, STAGES_1_AND_2 = "DeepSpeedZeroOptimizer_Stage3", "DeepSpeedZeroOptimizer"
"""Classes of `engine.optimizer`."""

OF_THE_ENGINE = (
    "module",
    "optimizer",
    "backward",
    "step",
    "destroy",
    "set_gradient_accumulation_boundary",
    "_backward_prologue",
)

OF_ITS_OPTIMIZER = {
    STAGE_3: (
        "optimizer",
        "offload_optimizer",
        "fp32_partitioned_groups_flat",
        "fp16_groups",
        "grad_position",
        "get_param_id",
        "persistent_parameters",
        "clear_backward_seen_flag",
        "_get_norm_groups",
        "_reassign_or_swap_out_partitioned_parameters",
    ),
    STAGES_1_AND_2: (
        "optimizer",
        "single_partition_of_fp32_groups",
        "bit16_groups",
        "clear_backward_seen_flag",
        "scaled_global_norm",
        "check_grad_overflow",
        "check_overflow",
        "update_lp_params",
    ),
}


@dataclass(frozen=True)
class Part:
    """What this rank has of one parameter, flattened.

    Attributes:
        flat: Number of the flat partition in which it lies.
        first: Where it begins there.
        start: Where it begins in the parameter.
        count: Elements.
    """

    flat: int
    first: int
    start: int
    count: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the part's elements of a vector that lies as the flat partition does."""
        return flat.narrow(0, self.first, self.count)


class Stage(Protocol):
    """What the stages of ZeRO do in different ways."""

    @property
    def flats(self) -> Sequence[torch.Tensor]:
        """This rank's masters, float32, 1-D: the keys of the client optimizer's state."""
        ...

    def shape_of(self, parameter: Any) -> tuple[int, ...]:
        """Return the shape of the whole parameter."""
        ...

    def part_of(self, parameter: Any) -> Part | None:
        """Return what this rank has of a parameter that is trained, if anything."""
        ...

    def gradient_of(self, parameter: Any) -> torch.Tensor | None:
        """Return the gradient of that part, 1-D, reduced over the ranks and not yet clipped."""
        ...

    def norm(self) -> float:
        """Return the norm of the whole gradient, which the step after it will use; not finite, or
        negative, where the gradient is not finite.
        """
        ...

    def skipping(self) -> Any:
        """Return a context in which ZeRO's step makes no update and drops the gradients."""
        ...

    def weights_from_masters(self) -> None:
        """Make the model's weights what the masters are, on all ranks."""
        ...


def stage_of(engine: Any, rank: int) -> "Stage3 | Stages1And2":
    """Return the books of the optimizer of DeepSpeed's engine.

    Raises:
        ConfigError: This DeepSpeed keeps other books.
    """
    zero = engine.optimizer
    kind = type(zero).__name__
    if kind not in OF_ITS_OPTIMIZER:
        refuse(f"DeepSpeed steps a {kind}, whose state is not known here")
    require(engine, OF_THE_ENGINE)
    require(zero, OF_ITS_OPTIMIZER[kind])
    return Stage3(zero, rank) if kind == STAGE_3 else Stages1And2(zero)


def require(owner: Any, names: Sequence[str]) -> None:
    """Raise `ConfigError` unless something of DeepSpeed has all these names."""
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        kind = getattr(owner, "__name__", type(owner).__name__)
        refuse(f"{kind} of this DeepSpeed has no {', '.join(missing)}")


def refuse(reason: str) -> NoReturn:
    """Raise `ConfigError`."""
    remedy = "type parallel.engine=fsdp2, or  pip install deepspeed==0.19.8"
    raise ConfigError([f"parallel.engine=deepspeed: {reason}; {remedy}"])


class Stage3:
    """ZeRO-3."""

    def __init__(self, zero: Any, rank: int) -> None:
        self.zero = zero
        self.rank = rank
        self.places = {
            id(parameter): (group, place)
            for group, parameters in enumerate(zero.fp16_groups)
            for place, parameter in enumerate(parameters)
        }
        self.own_norms: Callable[[], list[torch.Tensor]] = zero._get_norm_groups
        self.norms: list[torch.Tensor] | None = None
        zero._get_norm_groups = self.take_norms

    @property
    def flats(self) -> Sequence[torch.Tensor]:
        """One per subgroup."""
        return self.zero.fp32_partitioned_groups_flat

    def shape_of(self, parameter: Any) -> tuple[int, ...]:
        """Return the shape before it was cut."""
        return tuple(parameter.ds_shape)

    def part_of(self, parameter: Any) -> Part | None:
        """Return an equal share, shorter at the end, where ZeRO pads."""
        flat, first, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
        start = self.rank * size
        count = min(size, parameter.ds_numel - start)
        return Part(flat, first, start, count) if count > 0 else None

    def gradient_of(self, parameter: Any) -> torch.Tensor | None:
        """Return it from where it waits for the update."""
        part = self.part_of(parameter)
        if part is None:
            return None
        if self.zero.offload_optimizer:
            gradient = self.flats[part.flat].grad
            return None if gradient is None else part.of(gradient)
        group, place = self.places[id(parameter)]
        return self.zero.averaged_gradients[group][place].view(-1)[: part.count]

    def take_norms(self) -> list[torch.Tensor]:
        """Return the norms of all subgroups, to ZeRO's step those it was judged by."""
        norms, self.norms = self.norms or self.own_norms(), None
        return norms

    def norm(self) -> float:
        """Return the norm over all subgroups; ZeRO marks one that is not finite as negative."""
        self.norms = self.own_norms()
        return combined(self.norms)

    @contextmanager
    def skipping(self) -> Generator[None]:
        """Let ZeRO see a norm that is not finite."""
        self.norms = [torch.tensor(-1.0, device=self.zero.device)]
        yield
        self.norms = None

    def weights_from_masters(self) -> None:
        """Copy every subgroup, then gather anew what ZeRO keeps whole on all ranks."""
        own = type(self.zero)._reassign_or_swap_out_partitioned_parameters
        kept = self.zero.persistent_parameters
        if kept:
            kept[0].partition(kept)
        for number in range(len(self.flats)):
            own(self.zero, number)
        if kept:
            kept[0].all_gather(kept)


class Stages1And2:
    """ZeRO-1 and ZeRO-2."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self.own_norm: Callable[..., Any] = zero.scaled_global_norm
        self.known: torch.Tensor | None = None
        zero.scaled_global_norm = self.take_norm

    @property
    def flats(self) -> Sequence[torch.Tensor]:
        """One per parameter group."""
        return self.zero.single_partition_of_fp32_groups

    def shape_of(self, parameter: Any) -> tuple[int, ...]:
        """Return its own: weights are whole on every rank."""
        return tuple(parameter.shape)

    def part_of(self, parameter: Any) -> Part | None:
        """Return what of it is in this rank's share of its group."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Part(mapping.param_group_index, high.start, low.start, low.numel)

    def gradient_of(self, parameter: Any) -> torch.Tensor | None:
        """Return it as DeepSpeed shows it to `safe_get_full_grad`."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        return mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)

    def take_norm(self, norm_type: int = 2) -> Any:
        """Return the norm, to ZeRO's step the one it was judged by."""
        norm, self.known = self.known, None
        return self.own_norm(norm_type) if norm is None else norm

    def norm(self) -> float:
        """Return the norm over all groups."""
        self.known = torch.as_tensor(self.own_norm())
        return combined([self.known])

    @contextmanager
    def skipping(self) -> Generator[None]:
        """Let ZeRO find an overflow."""
        zero, looks = self.zero, self.zero.check_grad_overflow

        def overflown(*_: object, **__: object) -> None:
            zero.overflow = True

        zero.check_grad_overflow, zero.check_overflow = True, overflown
        try:
            yield
        finally:
            zero.check_grad_overflow = looks
            del zero.check_overflow
            self.known = None

    def weights_from_masters(self) -> None:
        """Copy this rank's shares and gather all."""
        self.zero.update_lp_params()


def combined(norms: Sequence[torch.Tensor]) -> float:
    """Return one norm of several; NaN if one is not finite or negative, as ZeRO marks those."""
    values = torch.stack([norm.detach().double().cpu() for norm in norms])
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        return float("nan")
    return float(values.square().sum().sqrt())
