"""Recomputation keeps what it says; precision and compilation follow the device unless asked."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from ranks import run_on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.config.schema import ParallelSection, RunConfig, TrainSection
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.parallel import (
    EXPENSIVE_OPERATIONS,
    compile_layers,
    compiles,
    compute_dtype_of,
    recompute_layers,
    shard,
)
from interlace.trainer.world import World

TOKENS = torch.arange(32).view(2, 16)


class Operations(TorchDispatchMode):
    """Counts the operations that reach a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self.counts[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


def build(backend: str = "auto") -> LanguageModel:
    section = ModelSection.model_validate({"attention_backend": backend})
    section = section.model_copy(update={"width": 16, "heads": 2, "layers": 3})
    model = LanguageModel(section, 40)
    model.initialise(0)
    return model


def backward_operations(mode: str, backend: str = "auto") -> Counter[str]:
    model = build(backend)
    recompute_layers(list(model.layers), mode)
    loss = model(TOKENS, TOKENS).objective
    with Operations() as operations:
        loss.backward()
    return operations.counts


def expensive(counts: Counter[str]) -> int:
    return sum(counts[name] for name in EXPENSIVE_OPERATIONS)


def test_block_recomputes_every_product_and_selective_none() -> None:
    plain, block, selective = (backward_operations(mode) for mode in ("none", "block", "selective"))
    assert expensive(plain) > 0
    # Six projections and one attention in each of three layers: recomputation ends before the
    # last product, whose result backward does not need.
    assert expensive(block) - expensive(plain) == 3 * 7
    assert expensive(selective) == expensive(plain)
    # The gate computes silu in its own backward; a layer that is recomputed does so once more.
    assert [counts["silu"] - plain["silu"] for counts in (plain, block, selective)] == [0, 3, 3]


@pytest.mark.parametrize(("mode", "again"), [("none", 0), ("block", 3), ("selective", 0)])
def test_selective_recomputation_keeps_the_results_of_our_attention_too(
    mode: str, again: int
) -> None:
    assert backward_operations(mode, "chunked")["attention_forward"] == again


@pytest.mark.parametrize("mode", ["none", "block", "selective"])
def test_recomputation_keeps_the_names_of_parameters(mode: str) -> None:
    model, names = build(), list(build().state_dict())
    recompute_layers(list(model.layers), mode)
    assert list(model.state_dict()) == names


def test_compilation_keeps_the_names_of_parameters() -> None:
    model, names = build(), list(build().state_dict())
    compile_layers(list(model.layers))
    assert list(model.state_dict()) == names


def test_one_rank_is_left_unwrapped() -> None:
    model = build()
    before = {name: type(module) for name, module in model.named_modules()}
    shard(model, list(model.layers), World(), 1, torch.float32)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(type(value) is torch.nn.Parameter for value in model.parameters())


@pytest.mark.parametrize(
    ("asked", "device", "dtype"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("float32", "cuda", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_precision_is_as_asked_or_that_of_the_device(
    asked: str, device: str, dtype: torch.dtype
) -> None:
    settings = TrainSection.model_validate({"compute_dtype": asked})
    assert compute_dtype_of(settings, device) is dtype


@pytest.mark.parametrize(
    ("asked", "device", "answer"),
    [
        (None, "cpu", False),
        (None, "cuda", True),
        (False, "cuda", False),
        (True, "cpu", True),
    ],
)
def test_layers_are_compiled_as_asked_or_on_a_gpu(
    asked: bool | None, device: str, answer: bool
) -> None:
    assert compiles(RunConfig(train=TrainSection(compile=asked)), device) is answer


@pytest.mark.parametrize(("stage", "answer"), [(1, True), (2, True), (3, False)])
def test_layers_under_zero_3_are_compiled_only_as_asked(
    stage: Literal[1, 2, 3], answer: bool
) -> None:
    parallel = ParallelSection(engine="deepspeed", zero_stage=stage)
    assert compiles(RunConfig(parallel=parallel), "cuda") is answer
    asked = RunConfig(parallel=parallel, train=TrainSection(compile=True))
    assert compiles(asked, "cuda")


SHARDED = """
import torch
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.parallel import recompute_layers, shard
from interlace.trainer.world import process_group

tokens = torch.arange(32).view(2, 16)
shape = ModelSection(
    width=32, heads=2, pattern="ME AEME", layers=1, ffn_width=64, mamba_head_width=16,
    mamba_state_width=8, moe_experts=3, moe_bias_rate=0.1,
)
with process_group() as world:
    found = []
    for mode in ("none", "block", "selective"):
        model = LanguageModel(shape, 64)
        recompute_layers(model.units, mode)
        shard(model, model.units, world, 1, torch.float32)
        model.initialise(0)
        for _ in range(2):
            model(tokens, tokens).objective.backward()
        found.append([weight.grad.full_tensor() for weight in model.parameters()])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
"""


def test_layers_with_several_parts_in_fp32_are_recomputed_on_two_ranks(tmp_path: Path) -> None:
    done = run_on_ranks(SHARDED, tmp_path)
    assert done.returncode == 0, done.stderr
