"""Blocks by letter: sequence mixers and channel mixers register themselves, one small file each.

A mixer is a class built from the recipe's `[model]` table. It maps (B, T, D) to (B, T, D), declares
what may be relied on (`Traits`), and says what it costs, in class methods next to the layers they
count; `interlace conform mixer NAME` holds every declaration against what the mixer does. This
module needs no torch, so that recipes can be checked before anything heavy is loaded: the built-in
mixers are named here and imported when one is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from interlace.trainer.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from interlace.trainer.config.model_section import ModelSection
    from interlace.trainer.models.context import BlockContext, LayerCache, Routed


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
    """What stays of one block for one token between forward and backward, in elements.

    The block's norm is not part of it; it is the same for all mixers.

    Attributes:
        kept: Elements in the compute dtype.
        kept_wide: Elements in fp32 whatever the compute dtype.
        products: Results of matrix products and attention in the compute dtype, which selective
            recomputation keeps instead.
        products_wide: The same in fp32.
    """

    kept: int
    products: int
    kept_wide: int = 0
    products_wide: int = 0


Role = Literal["hidden", "residual", "readout", "vector"]
"""What a parameter is for (Yang et al. 2022, arXiv 2203.03466, table 8): a matrix between widths,
such a matrix that writes into the residual stream, a matrix from the width to a fixed number of
outputs, or anything with at most one side that grows. Which sides do, `interlace.trainer.mup` sees
in the shapes themselves.
"""

RowBlocks = Sequence[tuple[str, int]]
"""Names and numbers of rows of the parts that one fused tensor is made of, from the first row."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What may be relied on of a mixer.

    Attributes:
        causal: No position sees a later one.
        order: How often it can be differentiated; `any` where plain torch does all of it.
        resets: Nothing crosses a document boundary where `BlockContext.segments` marks them.
        decoding: What is remembered between tokens: keys and values, a state of fixed size, or
            nothing because every position is worked on alone.
    """

    causal: bool = True
    order: int | Literal["any"] = "any"
    resets: bool = True
    decoding: Literal["keys and values", "state", "nothing"]


class Mixer(Protocol):
    """What a block brings; an `nn.Module` that also satisfies this."""

    traits: ClassVar[Traits]

    def __init__(self, config: ModelSection) -> None: ...

    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor | Routed:
        """Map (B, T, D) to (B, T, D)."""
        ...

    def new_cache(self, batch: int, length: int, like: torch.Tensor) -> LayerCache | None:
        """Return empty decoding state for `length` positions in dtype and device of `like`."""
        ...

    @classmethod
    def initial_value(
        cls,
        name: str,
        shape: tuple[int, ...],
        config: ModelSection,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Return the fp32 start of the parameter or buffer that is called `name` inside the mixer,
        on the CPU, drawn from `generator` only.
        """
        ...

    @classmethod
    def roles(cls, config: ModelSection) -> Mapping[str, Role]:
        """Return how each parameter scales with the width, by its name inside the mixer."""
        ...

    @classmethod
    def parameter_count(cls, config: ModelSection) -> int:
        """Return the number of the mixer's parameters."""
        ...

    @classmethod
    def flops_per_token(cls, config: ModelSection, sequence_length: int) -> Flops:
        """Return the matrix FLOPs of one token in a row of `sequence_length`."""
        ...

    @classmethod
    def saved_elements(cls, config: ModelSection, sequence_length: int) -> SavedElements:
        """Return what stays of one token in a row of `sequence_length`."""
        ...

    @classmethod
    def cache_bytes(cls, config: ModelSection, length: int, element_bytes: int) -> int:
        """Return what decoding keeps of one sequence of `length` positions, in bytes."""
        ...


@runtime_checkable
class Fused(Protocol):
    """A mixer class with tensors whose rows are several things side by side, which scale each in
    its own way.
    """

    def row_blocks(self, config: ModelSection) -> Mapping[str, RowBlocks]:
        """Return the parts of each such tensor, by its name inside the mixer."""
        ...


@runtime_checkable
class Sparse(Protocol):
    """A mixer class whose tokens meet a part of its parameters only."""

    def active_parameter_count(self, config: ModelSection) -> int:
        """Return the number of the mixer's parameters that one token meets."""
        ...


BUILT_IN = {
    "A": ("attention", "interlace.trainer.models.mixers.attention"),
    "E": ("moe", "interlace.trainer.models.channel.moe"),
    "F": ("swiglu", "interlace.trainer.models.channel.swiglu"),
    "M": ("mamba2", "interlace.trainer.models.mixers.mamba2"),
}
"""Letter to name and module of the mixers that come with the project."""

REGISTERED: dict[str, tuple[str, type[Mixer]]] = {}

SEQUENCE_LETTERS: set[str] = {"A", "M"}
"""Letters of mixers that move information between positions; plug-ins add theirs."""

MixerClass = TypeVar("MixerClass", bound=type[Mixer])


def sequence_mixer(letter: str, name: str) -> Callable[[MixerClass], MixerClass]:
    """Register a class that moves information between positions under a capital letter."""

    def note(kind: MixerClass) -> MixerClass:
        registered = register(letter, name, kind)
        SEQUENCE_LETTERS.add(letter)
        return registered

    return note


def channel_mixer(letter: str, name: str) -> Callable[[MixerClass], MixerClass]:
    """Register a class that works on every position alone under a capital letter."""
    return lambda kind: register(letter, name, kind)


def register(letter: str, name: str, kind: MixerClass) -> MixerClass:
    """Note a mixer; a letter means one thing only.

    Raises:
        ValueError: The letter is no single capital, or taken.
    """
    if not (len(letter) == 1 and letter.isascii() and letter.isupper()):
        raise ValueError(f"mixer letter {letter!r}: must be one capital letter, A to Z")
    built_in = letter in BUILT_IN and BUILT_IN[letter][1] != kind.__module__
    if built_in or letter in REGISTERED:
        taken = registered_letters()[letter]
        raise ValueError(f"mixer letter {letter}: already means {taken}; choose another for {name}")
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


def letter_of(name: str) -> str:
    """Return the letter of a mixer that is given by name or by letter.

    Raises:
        ConfigError: There is no such mixer.
    """
    letters = registered_letters()
    if name in letters:
        return name
    found = [letter for letter, known in letters.items() if known == name]
    if not found:
        known = ", ".join(f"{known} ({letter})" for letter, known in sorted(letters.items()))
        raise ConfigError([f"mixer {name}: there is no such mixer; known: {known}"])
    return found[0]
