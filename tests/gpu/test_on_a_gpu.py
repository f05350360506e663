"""What only a GPU can show: fused attention in bf16, and the whole path compiled. Run by `make
gpu`.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.kernels import attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("documents", [True, False])
def test_fused_attention_in_bfloat16_is_near_the_fp64_reference(documents: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [
        torch.randn(2, heads, 256, 64, generator=generator, device="cuda", dtype=torch.float64)
        for heads in (4, 2, 2)
    ]
    numbers = torch.arange(256, device="cuda") // 50
    segments = numbers.expand(2, -1) if documents else None
    exact = attention(*tensors, segment_ids=segments, backend="reference")
    fused = attention(*(t.bfloat16() for t in tensors), segment_ids=segments, backend="sdpa")
    torch.testing.assert_close(fused.double(), exact, rtol=2e-2, atol=2e-2)


def test_a_compiled_bfloat16_run_learns_and_resumes_bit_for_bit(
    interlace: Callable[..., Any],
    tiny: Sequence[str],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert interlace("train", *tiny, f"run.dir={straight}").returncode == 0
    victim = {"INTERLACE_FAILPOINT": "step.backward@23:kill"}
    interlace("train", *tiny, f"run.dir={killed}", environment=victim)
    done = interlace("train", "--resume", str(killed))
    assert done.returncode == 0, done.stderr
    plan = json.loads((killed / "plan.json").read_text(encoding="utf-8"))
    assert (plan["device_type"], plan["compute_dtype"], plan["compiled"]) == (
        "cuda",
        "bfloat16",
        True,
    )
    losses = losses_of(killed)
    assert losses == losses_of(straight)
    assert float.fromhex(losses[-1]) < float.fromhex(losses[0]) - 1.0
