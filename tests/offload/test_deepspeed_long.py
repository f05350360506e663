"""More ways to train under DeepSpeed with our update: every stage, clipped and not, odd and even
numbers of subgroups, every home and dtype.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest
from deepspeed_runs import HEAD, Shown, shown_by

pytestmark = pytest.mark.long

PARITY = (
    HEAD
    + """
import itertools

shown = {}
for clip, elements, steps in itertools.product((0.0, 0.5), (200, 300, 400, 10**9), (1, 3)):
    case = Case(STAGE, clip=clip, elements=elements, accumulation=steps)
    shown[str((clip, elements, steps))] = lambda case=case: compare(case)
for optimizer in ("adam", "sgd"):
    case = Case(STAGE, optimizer, **USUAL)
    shown[optimizer] = lambda case=case: compare(case)
report(shown)
"""
)

HOMES = (
    HEAD
    + """
import itertools

shown = {}
for homes, dtype in itertools.product(
    ((Home.HOST,), (Home.STAGED,), MIXED, (Home.RESIDENT,)), ("fp32", "bf16", "fp16")
):
    whole = 10**9 if homes == (Home.RESIDENT,) else 300
    case = Case(STAGE, dtype=dtype, clip=1.0, elements=whole, homes=homes, idle=True, **HALF)
    same = replace(case, torchs_arithmetic=True)
    shown[str((homes, dtype))] = lambda same=same: compare(same)
for ours, homes in itertools.product((True, False), ((Home.RESIDENT,), MIXED)):
    elements = 10**9 if homes == (Home.RESIDENT,) else 300
    saved = Case(STAGE, clip=0.5, elements=elements, homes=homes, steps=8, torchs_arithmetic=True)
    folder = f"saved-{ours}-{len(homes)}"
    shown[folder] = lambda saved=saved, ours=ours, folder=folder: resume(
        saved, folder, ours_saves=ours
    )
report(shown)
"""
)


def shown_for(script: str, stage: int, folder: Path) -> Shown:
    return shown_by(f"STAGE = {stage}\n{script}", folder)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_thirty_steps_are_those_of_deepspeed(stage: int, tmp_path: Path) -> None:
    shown = shown_for(PARITY, stage, tmp_path)
    assert len(shown) == 18
    apart = {name: max(each["numbers"], each["tensors"]) for name, each in shown.items()}
    assert {name: worst for name, worst in apart.items() if not worst < 1e-6} == {}
    # Powers of two leave no room for rounding in another order.
    assert shown["sgd"]["same bits"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_homes_and_dtypes_change_no_bit(stage: int, tmp_path: Path) -> None:
    shown = shown_for(HOMES, stage, tmp_path)
    assert len(shown) == 16
    saved = {name: each for name, each in shown.items() if name.startswith("saved")}
    assert all(max(each["numbers"], each["tensors"]) == 0.0 for each in saved.values())
    trained = {name: each for name, each in shown.items() if name not in saved}
    assert [name for name, each in trained.items() if not each["same bits"]] == []


OWN_ADAM = (
    HEAD
    + """
shown = {}
for stage in (2, 3):
    case = Case(stage, "cpu_adam", clip=0.5, elements=400, homes=MIXED)
    shown[f"parity {stage}"] = lambda case=case: compare(case)
    shown[f"over {stage}"] = lambda case=case: change_over(replace(case, steps=6))
report(shown)
"""
)


@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles it: apt install g++")
def test_deepspeeds_own_adam_is_followed_and_can_go_on_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It is compiled at first use, and a lock that a killed start left would be waited for. What was
    # compiled with another ninja than that of this environment would be compiled again.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    shown = shown_by(OWN_ADAM, tmp_path)
    for stage in (2, 3):
        parity = shown[f"parity {stage}"]
        assert max(parity["numbers"], parity["tensors"]) < 1e-6
        assert shown[f"over {stage}"]["left"] == []
