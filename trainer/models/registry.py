"""Blocks by letter: sequence mixers and channel mixers register themselves, one small file each.

A mixer is a class built from the recipe's `[model]` table. It maps (B, T, D) to (B, T, D) and says
what it costs, in class methods next to the layers they count. This module needs no torch, so that
recipes can be checked before anything heavy is loaded: the built-in mixers are named here and
imported when one is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from interlace.trainer.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from interlace.trainer.config.schema import ModelSection
    from interlace.trainer.models.context import BlockContext, LayerCache


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one token, counting matrix products (2 per multiply-add)."""

    forward: int
    backward: int

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def times(self, count: int) -> Flops:
        """Return the cost of `count` such blocks."""
        return Flops(self.forward * count, self.backward * count)


@dataclass(frozen=True)
class SavedElements:
    """What autograd keeps of one block for one token, in elements.

    Attributes:
        expensive: Results of matrix products and attention (what selective checkpointing keeps).
        cheap: Everything else in the compute dtype.
        wide: Elements that are fp32 whatever the compute dtype.
    """

    expensive: int
    cheap: int
    wide: int = 0


class Mixer(Protocol):
    """What a block brings; an `nn.Module` that also satisfies this."""

    residual_output: str
    """Name of the parameter that writes into the residual stream, which is initialised smaller."""

    def __init__(self, config: ModelSection) -> None: ...

    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor: ...

    def new_cache(self, batch: int, length: int, like: torch.Tensor) -> LayerCache | None: ...

    @classmethod
    def parameter_count(cls, config: ModelSection) -> int: ...

    @classmethod
    def flops_per_token(cls, config: ModelSection, sequence_length: int) -> Flops: ...

    @classmethod
    def saved_elements(cls, config: ModelSection) -> SavedElements: ...


BUILT_IN = {
    "A": ("attention", "interlace.trainer.models.mixers.attention"),
    "F": ("SwiGLU feed-forward", "interlace.trainer.models.channel.swiglu"),
}
"""Letter to name and module of the mixers that come with the project."""

REGISTERED: dict[str, tuple[str, type[Mixer]]] = {}

MixerClass = TypeVar("MixerClass", bound=type[Mixer])


def sequence_mixer(letter: str, name: str) -> Callable[[MixerClass], MixerClass]:
    """Register a class that moves information between positions under a capital letter."""
    return lambda kind: register(letter, name, kind)


def channel_mixer(letter: str, name: str) -> Callable[[MixerClass], MixerClass]:
    """Register a class that works on every position alone under a capital letter."""
    return lambda kind: register(letter, name, kind)


def register(letter: str, name: str, kind: MixerClass) -> MixerClass:
    """Note a mixer; a letter means one thing only.

    Raises:
        ValueError: The letter is no single capital, or taken by another class.
    """
    if not (len(letter) == 1 and letter.isascii() and letter.isupper()):
        raise ValueError(f"mixer letter {letter!r}: must be one capital letter, A to Z")
    taken = REGISTERED.get(letter)
    if taken is not None and taken[1].__qualname__ != kind.__qualname__:
        raise ValueError(
            f"mixer letter {letter}: already means {taken[0]}; choose another for {name}"
        )
    REGISTERED[letter] = (name, kind)
    return kind


def registered_letters() -> dict[str, str]:
    """Return every known letter and what it stands for."""
    names = {letter: name for letter, (name, _) in BUILT_IN.items()}
    return names | {letter: name for letter, (name, _) in REGISTERED.items()}


def mixer_class(letter: str) -> type[Mixer]:
    """Return the class behind a letter, importing a built-in one if need be.

    Raises:
        ConfigError: Nothing is registered under the letter.
    """
    if letter not in REGISTERED and letter in BUILT_IN:
        importlib.import_module(BUILT_IN[letter][1])
    if letter not in REGISTERED:
        known = ", ".join(
            f"{known} ({name})" for known, name in sorted(registered_letters().items())
        )
        raise ConfigError([f"model.pattern={letter}: no such block; known letters: {known}"])
    return REGISTERED[letter][1]
