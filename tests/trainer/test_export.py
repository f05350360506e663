"""Exported folders load in transformers and compute the same logits."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

COMPARE = """
import sys, json, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from interlace.trainer.saved_model import load_saved_model
run, exported = Path(sys.argv[1]), sys.argv[2]
ours = load_saved_model(run)
theirs = AutoModelForCausalLM.from_pretrained(exported)
tokenizer = AutoTokenizer.from_pretrained(exported)
text = "def f(x):  # naïve 日本"
ids = tokenizer(text, return_tensors="pt").input_ids
with torch.no_grad():
    difference = (theirs(ids).logits - ours.model.logits(ids)).abs().max().item()
print(json.dumps({
    "class": type(theirs).__name__, "difference": difference,
    "same_ids": ids[0].tolist() == ours.tokenizer.encode(text),
    "text": tokenizer.decode(ids[0]) == text,
}))
"""


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("model.kv_heads=1", "data.tokenizer=bpe", "data.vocabulary_size=300"), "Llama"),
        (("model.tie_embeddings=true", "model.head_width=24"), "Llama"),
        (("model.query_key_norm=true",), "Qwen3"),
    ],
)
def test_transformers_computes_the_same_logits(
    words: Sequence[str],
    name: str,
    interlace: Callable[..., Any],
    tiny: Sequence[str],
    tmp_path: Path,
) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported"
    done = interlace("train", *tiny, *words, f"run.dir={run}", "train.steps=3")
    assert done.returncode == 0, done.stderr
    done = interlace("export", str(run), "--to", "hf", str(exported))
    assert done.returncode == 0, done.stderr
    assert f"wrote {name}ForCausalLM to {exported}" in done.stdout
    # From the repository's root the bare folder `kernels` would shadow a package that transformers
    # probes.
    command = [sys.executable, "-c", COMPARE, str(run), str(exported)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout.splitlines()[-1])
    assert verdict.pop("difference") < 1e-5
    assert verdict == {"class": f"{name}ForCausalLM", "same_ids": True, "text": True}
    again = interlace("export", str(run), "--to", "hf", str(exported))
    assert again.returncode == 2
    assert f"--to hf {exported}: exists and is not an empty folder; name a new one" in again.stderr


def test_a_pattern_that_is_no_llama_is_refused(
    interlace: Callable[..., Any], tiny: Sequence[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    interlace("train", *tiny, "model.pattern=AFF", f"run.dir={run}", "train.steps=1")
    done = interlace("export", str(run), "--to", "hf", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr == (
        "interlace: model.pattern=AFF: transformers' Llama is AF repeated; no class fits this one\n"
    )
