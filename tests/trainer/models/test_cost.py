"""Activation bytes are those of the tensors that are alive between forward and backward."""

import gc
from typing import Literal

import pytest
import torch

from interlace.kernels.cross_entropy import DEFAULT_CHUNK_BYTES, linear_cross_entropy
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.conformance.live_memory import LiveTensors, PeakMemory
from interlace.trainer.models.cost import (
    ForwardPass,
    activation_bytes,
    kept_bytes,
    layer_bytes,
    logits_bytes,
)
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.parallel import recompute_layers

VOCABULARY, LENGTH = 97, 64
HYBRID = ModelSection(
    width=64, heads=4, layers=1, pattern="AF MF*2", mamba_head_width=16, mamba_state_width=24
)
SHAPES = {
    "plain": ModelSection(width=64, heads=4, layers=3, head_width=32),
    "grouped": ModelSection(width=64, heads=4, kv_heads=2, query_key_norm=True, layers=2),
    "mixed": ModelSection(width=64, heads=4, pattern="AFF", layers=2, tie_embeddings=True),
    "experts": ModelSection(width=64, heads=4, pattern="AE", layers=2),
    "experts by sigmoid": ModelSection(
        width=64, heads=4, pattern="AE", layers=2, moe_router="sigmoid", moe_shared_experts=0
    ),
    "without a mask": ModelSection(width=64, heads=4, layers=3, attention_backend="chunked"),
    "hybrid": HYBRID,
    "hybrid of three chunks": HYBRID.model_copy(update={"mamba_groups": 2}),
    "hybrid of two and a half chunks": HYBRID,
}
LENGTHS = {"hybrid of three chunks": 192, "hybrid of two and a half chunks": 160}
Checkpointing = Literal["none", "block", "selective"]


def alive_bytes(model: LanguageModel, rows: int, length: int) -> int:
    tokens = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(length) >= length // 2).long().expand(rows, -1)
    positions = torch.arange(length).expand(rows, -1)
    with LiveTensors() as tensors:
        loss = model(tokens, tokens, segments=documents, positions=positions)
    gc.collect()
    alive = tensors.bytes()
    assert loss.objective.requires_grad
    return alive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
@pytest.mark.parametrize("name", SHAPES)
def test_kept_bytes_are_those_that_stay_alive(
    name: str, checkpointing: Checkpointing, dtype: torch.dtype
) -> None:
    model = LanguageModel(SHAPES[name], VOCABULARY, dtype)
    model.initialise(0)
    recompute_layers(list(model.layers), checkpointing)
    # Casts of weights live as long, but their size does not depend on the number of rows.
    length = LENGTHS.get(name, LENGTH)
    measured = alive_bytes(model, 3, length) - alive_bytes(model, 1, length)
    forward = ForwardPass(
        tokens=2 * length,
        sequence_length=length,
        bytes_per_element=dtype.itemsize,
        checkpointing=checkpointing,
    )
    assert kept_bytes(SHAPES[name], forward) == pytest.approx(measured, rel=0.02)


def test_recomputation_adds_one_layer_at_a_time() -> None:
    for checkpointing, layers in (("none", 0), ("block", 1), ("selective", 1)):
        forward = ForwardPass(
            tokens=LENGTH, sequence_length=LENGTH, bytes_per_element=2, checkpointing=checkpointing
        )
        kept = kept_bytes(SHAPES["plain"], forward)
        peak = activation_bytes(SHAPES["plain"], 1, forward)
        logits = logits_bytes(1, forward)
        layer = LENGTH * layer_bytes(SHAPES["plain"], "AF", forward)
        assert peak - kept == max(logits, layers * layer)
        # Logits of many words outweigh the layer; both are never there at once.
        many = activation_bytes(SHAPES["plain"], 10_000, forward)
        assert many - kept == logits_bytes(10_000, forward) > layer


@pytest.mark.parametrize("tokens", [40, 200])
def test_logits_bytes_are_those_that_the_head_makes(tokens: int) -> None:
    vocabulary, width = 200_000, 1
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator)
    targets = torch.zeros(tokens, dtype=torch.int64)
    with PeakMemory() as memory:
        linear_cross_entropy(hidden, weight, targets)
    forward = ForwardPass(
        tokens=tokens, sequence_length=tokens, bytes_per_element=4, checkpointing="none"
    )
    assert logits_bytes(vocabulary, forward) == pytest.approx(memory.peak, rel=0.02)
    assert logits_bytes(vocabulary, forward) <= 2 * DEFAULT_CHUNK_BYTES
