"""What every model is to the trainer, whatever its objective, and how its values start.

Initial values depend on the seed and the parameter's name only, so every number of ranks starts
from the same weights.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.context import LayerCache
from interlace.trainer.models.depth import layer_patterns
from interlace.trainer.models.initial import embedding_value, generator_of
from interlace.trainer.models.layers import RMSNorm
from interlace.trainer.models.registry import mixer_class

MIXER_PARAMETER = re.compile(r"layers\.(?P<layer>\d+)\.blocks\.(?P<block>\d+)\.mixer\.(?P<rest>.+)")


Rescale = Callable[[str, torch.Tensor], torch.Tensor]
"""Maps name and initial value of a parameter or buffer, fp32 on the CPU, to the value to use."""

Caches = Sequence[Sequence[LayerCache | None]]
"""Decoding state of a stack: one entry per layer and block."""


@runtime_checkable
class Balances(Protocol):
    """A mixer that spreads tokens over experts and corrects itself after every step."""

    def balance(self, load: torch.Tensor) -> None: ...


class Model(nn.Module):
    """What training, sampling and export ask of a model, whatever its objective."""

    config: ModelSection
    compute_dtype: torch.dtype
    embedding: nn.Embedding
    layers: nn.ModuleList
    norm: RMSNorm

    readouts: ClassVar[Mapping[str, Literal["constant", "fan_in"]]] = {"head.weight": "constant"}
    """Output matrices outside the blocks, behind `norm`, and whether the spread they start with is
    constant or falls with the root of the width.
    """

    @property
    def units(self) -> list[nn.Module]:
        """The modules that are sharded, recomputed and compiled one by one."""
        raise NotImplementedError

    @property
    def rate_factors(self) -> Mapping[str, float]:
        """Parameters, by name, whose learning rate is a multiple of the others', and the factors;
        they have no weight decay.
        """
        return {}

    def balance_experts(self, loads: Sequence[torch.Tensor]) -> None:
        """Answer to the choices of a whole step, (E,) for each block with experts."""
        raise NotImplementedError

    def logits(
        self, tokens: torch.Tensor, caches: Caches | None = None, *, last_only: bool = False
    ) -> torch.Tensor:
        """Return fp32 logits of the token after each of `tokens` (B, T): (B, T or 1, V)."""
        raise NotImplementedError

    def new_caches(self, batch: int, length: int) -> Caches:
        """Return empty decoding state for `length` positions."""
        raise NotImplementedError

    @torch.no_grad()
    def initialise(self, seed: int, rescale: Rescale | None = None) -> None:
        """Fill all parameters, also sharded ones, and buffers with their initial values for
        `seed`, rescaled as muP has it.
        """
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            value = self.initial_value(name, tuple(tensor.shape), seed)
            fill(tensor, value if rescale is None else rescale(name, value))

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        """Return the whole initial value of one parameter or buffer, fp32 on the CPU."""
        return initial_value(name, shape, seed, self.config)


def initial_value(
    name: str, shape: tuple[int, ...], seed: int, config: ModelSection
) -> torch.Tensor:
    """Return the whole initial value of one parameter, fp32 on the CPU.

    It is a function of the seed, the parameter's name and its shape only. Norm gains are 1,
    embedding and head normal with deviation 0.02; mixers say how their own parameters start.
    """
    generator = generator_of(f"{seed}/{name}", torch.device("cpu"))
    inside = MIXER_PARAMETER.fullmatch(name)
    if inside is not None:
        letter = layer_patterns(config)[int(inside["layer"])][int(inside["block"])]
        return mixer_class(letter).initial_value(inside["rest"], shape, config, generator)
    if name in {"embedding.weight", "head.weight"}:
        return embedding_value(shape, generator)
    return torch.ones(shape)


def fill(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy this rank's part of a whole value into a plain or sharded parameter."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(value)
        return
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    index = tuple(slice(first, first + n) for first, n in zip(offset, shape, strict=True))
    parameter.to_local().copy_(value[index])
