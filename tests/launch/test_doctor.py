"""`interlace doctor`: what it says of this machine and of a recipe's attention."""

import importlib.util
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.kernels.attention import backends
from interlace.kernels.attention.measurements import rows_of, user_path
from interlace.launch import doctor_page
from interlace.launch.cli import main


@pytest.fixture(autouse=True)
def nothing_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("INTERLACE_ATTENTION", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows_of.cache_clear()


def page(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["doctor", *words]) == 0
    return capsys.readouterr().out


def document(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    return json.loads(page(capsys, *words, "--json"))


def test_without_a_recipe_it_speaks_of_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    lines = page(capsys).splitlines()
    assert lines[0] == "This machine"
    assert any(line.startswith("  torch  ") and torch.__version__ in line for line in lines)
    assert "Attention of" not in "\n".join(lines)
    assert document(capsys)["attention"] is None


def test_it_says_whether_deepspeed_can_be_the_engine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version("deepspeed")
    assert f"  DeepSpeed            {version}, usable" in page(capsys).splitlines()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = " ".join(page(capsys).split())
    assert "DeepSpeed not usable: deepspeed is not installed; type pip install" in said
    assert document(capsys)["machine"]["deepspeed"] is None


def test_a_recipe_s_attention_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(page(capsys, "quickstart").split())
    assert "8 rows of 256, 4 heads (2 of keys) 64 wide, float32 on cpu" in said
    assert "mask causal, inside documents (packed)" in said
    assert "choice sdpa: torch's scaled_dot_product_attention" in said
    assert "because chosen because it is the fastest of sdpa, chunked in the nearest" in said
    assert re.search(r"chunked: takes \d+\.\d\d times as long in that cell", said)
    assert "flex: cannot serve this call: it has no backward on a CPU" in said
    assert all(len(line) <= 100 for line in page(capsys, "quickstart").splitlines())


def test_settings_change_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    long = document(capsys, "quickstart", "data.sequence_length=2048")["attention"]
    assert (long["backend"], long["request"]["mask"]) == ("chunked", "packed")
    blind = ("quickstart", "data.sequence_length=2048", "data.respect_documents=false")
    other = document(capsys, *blind)["attention"]
    assert (other["backend"], other["request"]["mask"]) == ("sdpa", "causal")
    compiled = document(capsys, "quickstart", "train.compile=true")["attention"]
    assert compiled["request"]["compiled"] is True


def test_a_recipe_s_name_wins_over_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERLACE_ATTENTION", "reference")
    assert document(capsys, "quickstart")["attention"]["reasons"] == [
        "forced by INTERLACE_ATTENTION=reference"
    ]
    named = document(capsys, "quickstart", "model.attention_backend=chunked")["attention"]
    assert named["backend"] == "chunked"
    assert "  INTERLACE_ATTENTION  reference" in page(capsys)


@pytest.mark.parametrize(
    ("setting", "environment", "message"),
    [
        (
            "model.attention_backend=flex",
            "",
            "model.attention_backend=flex: cannot serve this recipe here: it has no backward on a "
            "CPU; type model.attention_backend=auto",
        ),
        (
            "model.attention_backend=auto",
            "flex",
            "INTERLACE_ATTENTION=flex: cannot serve this recipe here: it has no backward on a CPU; "
            "type unset INTERLACE_ATTENTION",
        ),
        (
            "model.attention_backend=auto",
            "cudnn",
            "INTERLACE_ATTENTION=cudnn: must be one of auto, reference, chunked, sdpa, flex, "
            "flash_attn, triton; type unset INTERLACE_ATTENTION",
        ),
    ],
)
@pytest.mark.parametrize("command", ["doctor", "train"])
def test_a_back_end_that_cannot_serve_is_refused_before_anything_is_trained(
    command: str,
    setting: str,
    environment: str,
    message: str,
    corpus: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("INTERLACE_ATTENTION", environment)
    words = ["fault-drill", setting, f"run.dir={tmp_path / 'run'}", *corpus]
    assert main([command, *words]) == 2
    assert capsys.readouterr().err == f"interlace: {message}\n"


def test_a_recipe_that_cannot_be_read_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "no-such-recipe"]) == 2
    assert "no-such-recipe" in capsys.readouterr().err


def test_a_recipe_without_attention_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("quickstart", "model.pattern=F")
    assert page(capsys, *words).splitlines()[-2:] == ["Attention of quickstart", "  it has none"]
    assert document(capsys, *words)["attention"] is None


def test_missing_triton_is_said_with_what_to_type(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = "Triton cannot be imported; type  pip install 'triton>=3.6'"
    monkeypatch.setattr(doctor_page, "why_no_triton", lambda: problem)
    monkeypatch.setattr(backends, "why_no_triton", lambda: problem)
    found = document(capsys, "quickstart")
    assert found["machine"]["triton_problem"] == problem
    assert found["attention"]["others"]["triton"] == f"cannot serve this call: {problem}"
    monkeypatch.setattr(doctor_page, "why_no_triton", lambda: None)
    there = document(capsys)["machine"]["triton_problem"]
    assert there.startswith("there is no GPU that torch can use")


def test_a_table_that_cannot_be_read_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    user_path("cpu").parent.mkdir(parents=True)
    user_path("cpu").write_text("{}", encoding="utf-8")
    found = document(capsys, "quickstart")
    assert found["machine"]["measured"][0].startswith(f"not counted: {user_path('cpu')}: ")
    assert found["attention"]["reasons"][-1].startswith("not counted: ")
