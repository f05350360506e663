"""ZeRO-3 gathers whole layers, and what is compiled runs inside."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch compiles: apt install g++")
def test_compiled_layers_train_under_zero_3_as_others_do(
    interlace: Callable[..., object],
    tiny: Sequence[str],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    runs = {compiled: tmp_path / compiled for compiled in ("false", "true")}
    for compiled, run in runs.items():
        words = ("parallel.engine=deepspeed", "offload.strategy=host", f"train.compile={compiled}")
        interlace("train", *tiny, *words, "train.steps=6", f"run.dir={run}", ranks=2, timeout=900)
    plain, fast = ([float.fromhex(loss) for loss in losses_of(run)] for run in runs.values())
    assert len(plain) == 6
    assert fast == pytest.approx(plain, rel=1e-5)
