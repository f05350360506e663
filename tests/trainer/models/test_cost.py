"""Activation bytes are those of the tensors that are alive between forward and backward."""

import gc
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interlace.kernels.cross_entropy import DEFAULT_CHUNK_BYTES
from interlace.trainer.config.schema import ModelSection
from interlace.trainer.models.cost import ForwardPass, activation_bytes, kept_bytes, layer_bytes
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.parallel import recompute_layers

VOCABULARY, LENGTH = 97, 64
SHAPES = {
    "plain": ModelSection(width=64, heads=4, layers=3, head_width=32),
    "grouped": ModelSection(width=64, heads=4, kv_heads=2, query_key_norm=True, layers=2),
    "mixed": ModelSection(width=64, heads=4, pattern="AFF", layers=2, tie_embeddings=True),
}
Checkpointing = Literal["none", "block", "selective"]


class LiveTensors(TorchDispatchMode):
    """Notes the memory of everything computed inside, and knows what of it is still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.noted[reference.cdata] = reference, storage.nbytes()
        return result

    def bytes(self) -> int:
        gc.collect()
        return sum(size for reference, size in self.noted.values() if not reference.expired())


def alive_bytes(model: LanguageModel, rows: int) -> int:
    tokens = torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(LENGTH) >= LENGTH // 2).long().expand(rows, -1)
    positions = torch.arange(LENGTH).expand(rows, -1)
    with LiveTensors() as tensors:
        loss = model(tokens, tokens, segments=documents, positions=positions)
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
    measured = alive_bytes(model, 3) - alive_bytes(model, 1)
    forward = ForwardPass(
        tokens=2 * LENGTH,
        sequence_length=LENGTH,
        bytes_per_element=dtype.itemsize,
        checkpointing=checkpointing,
    )
    assert kept_bytes(SHAPES[name], VOCABULARY, forward) == pytest.approx(measured, rel=0.02)


def test_recomputation_adds_one_layer_at_a_time() -> None:
    for checkpointing, layers in (("none", 0), ("block", 1), ("selective", 1)):
        forward = ForwardPass(
            tokens=LENGTH, sequence_length=LENGTH, bytes_per_element=2, checkpointing=checkpointing
        )
        kept = kept_bytes(SHAPES["plain"], VOCABULARY, forward)
        peak = activation_bytes(SHAPES["plain"], VOCABULARY, forward)
        assert peak - kept == layers * LENGTH * layer_bytes(SHAPES["plain"], forward)


def test_logits_never_count_for_more_than_one_chunk() -> None:
    vocabulary, tokens = 50_000, 100_000
    forward = ForwardPass(
        tokens=tokens, sequence_length=1000, bytes_per_element=2, checkpointing="none"
    )
    small = kept_bytes(SHAPES["plain"], 1, forward) - 4 * tokens
    logits = kept_bytes(SHAPES["plain"], vocabulary, forward) - small
    assert DEFAULT_CHUNK_BYTES - 4 * vocabulary < logits <= DEFAULT_CHUNK_BYTES
