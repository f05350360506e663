"""Blocks by letter: a mixer of one's own needs one file and a decorator, and letters are safe."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models import registry
from interlace.trainer.models.context import BlockContext, KeyValueCache
from interlace.trainer.models.cost import flops_per_token, parameter_count
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.models.registry import (
    Flops,
    Role,
    SavedElements,
    Traits,
    channel_mixer,
    sequence_mixer,
)


class Scale(nn.Module):
    """Multiplies every channel by a weight that starts at a half: a mixer of a third party."""

    traits = Traits(decoding="nothing")

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(config.width))

    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        return x * self.scale.to(x.dtype)

    def new_cache(self, batch: int, length: int, like: torch.Tensor) -> None:
        return None

    @classmethod
    def initial_value(
        cls,
        name: str,
        shape: tuple[int, ...],
        config: ModelSection,
        generator: torch.Generator,
    ) -> torch.Tensor:
        assert name == "scale"
        return torch.full(shape, 0.5)

    @classmethod
    def roles(cls, config: ModelSection) -> dict[str, Role]:
        return {"scale": "vector"}

    @classmethod
    def cache_bytes(cls, config: ModelSection, length: int, element_bytes: int) -> int:
        return 0

    @classmethod
    def parameter_count(cls, config: ModelSection) -> int:
        return config.width

    @classmethod
    def flops_per_token(cls, config: ModelSection, sequence_length: int) -> Flops:
        return Flops(0, 0)

    @classmethod
    def saved_elements(cls, config: ModelSection, sequence_length: int) -> SavedElements:
        return SavedElements(kept=config.width, products=0)


@pytest.fixture(autouse=True)
def registered() -> Iterator[dict[str, Any]]:
    """Forget what a test registers."""
    before = dict(registry.REGISTERED)
    yield registry.REGISTERED
    registry.REGISTERED.clear()
    registry.REGISTERED.update(before)


def test_a_mixer_of_ones_own_trains_and_decodes_beside_the_others() -> None:
    channel_mixer("S", "scale")(Scale)
    shape = ModelSection(width=32, heads=2, layers=2, pattern="ASF")
    model = LanguageModel(shape, 50)
    model.initialise(0)
    parameters = dict(model.named_parameters())
    assert torch.equal(parameters["layers.1.blocks.1.mixer.scale"], torch.full((32,), 0.5))
    assert parameter_count(shape, 50) == sum(value.numel() for value in parameters.values())
    plain = shape.model_copy(update={"pattern": "AF"})
    assert flops_per_token(shape, 50, 8) == flops_per_token(plain, 50, 8)
    tokens = torch.arange(8)[None]
    model(tokens, tokens).objective.backward()
    assert all(value.grad is not None for value in parameters.values())
    caches = model.new_caches(1, 8)
    pieces = [model.logits(tokens[:, n : n + 1], caches) for n in range(8)]
    torch.testing.assert_close(torch.cat(pieces, 1), model.logits(tokens), rtol=1e-4, atol=1e-5)


def test_registered_letters_are_known_without_loading_torch() -> None:
    program = (
        "import sys; from interlace.trainer.models.registry import registered_letters; "
        "print(registered_letters(), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "{'A': 'attention', 'E': 'moe', 'F': 'swiglu', 'M': 'mamba2'} False\n"


def test_a_built_in_letter_is_taken_also_before_it_is_loaded(registered: dict[str, Any]) -> None:
    registered.pop("A", None)
    with pytest.raises(ValueError) as caught:
        sequence_mixer("A", "scale")(Scale)
    assert str(caught.value) == (
        "mixer letter A: already means attention; choose another for scale"
    )


def test_a_letter_is_registered_once() -> None:
    sequence_mixer("S", "scale")(Scale)
    namesake = type("Scale", (Scale,), {})
    for kind in (Scale, namesake):
        with pytest.raises(ValueError, match="mixer letter S: already means scale"):
            channel_mixer("S", "another scale")(kind)


@pytest.mark.parametrize("letter", ["", "s", "SS", "É", "1"])
def test_a_letter_is_one_capital(letter: str) -> None:
    with pytest.raises(ValueError, match=f"mixer letter '{letter}': must be one capital letter"):
        channel_mixer(letter, "scale")(Scale)


def test_a_full_cache_says_what_does_not_fit() -> None:
    cache = KeyValueCache(torch.empty(1, 1, 4, 2), torch.empty(1, 1, 4, 2))
    cache.append(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    with pytest.raises(ValueError) as caught:
        cache.append(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    assert str(caught.value) == (
        "the cache has room for 4 positions and holds 3; 2 more do not fit"
    )
