"""Norms by block are those of the gradients, on any number of ranks."""

import json
import math
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Interlace = Callable[..., subprocess.CompletedProcess[str]]
WORDS = ("observe.diagnostics=['gradient_norms']", "observe.log_every_steps=2", "train.steps=5")
PREFIX = "gradient_norm."


def records(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def norms(record: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in record.items() if key.startswith(PREFIX)}


def test_norms_of_blocks_make_up_the_norm_of_every_logged_step(
    interlace: Interlace, tiny: Sequence[str], tmp_path: Path
) -> None:
    done = interlace("train", *tiny, *WORDS, f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = records(tmp_path / "run")
    assert [record["step"] for record in found if norms(record)] == [1, 2, 4, 5]
    blocks = {f"{PREFIX}layers.{n}.blocks.{m}" for n in range(2) for m in range(2)}
    assert set(norms(found[0])) == blocks | {PREFIX + x for x in ("embedding", "norm", "head")}
    for record in found:
        if norms(record):
            total = math.hypot(*norms(record).values())
            assert total == pytest.approx(record["grad_norm"], rel=1e-6)
            assert min(norms(record).values()) > 0


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((), id="sharded"),
        pytest.param(("parallel.replicas=2",), id="replicated", marks=pytest.mark.long),
    ],
)
def test_norms_do_not_depend_on_the_number_of_ranks(
    words: tuple[str, ...], interlace: Interlace, tiny: Sequence[str], tmp_path: Path
) -> None:
    for ranks in (1, 2):
        extra = words if ranks > 1 else ()
        where = f"run.dir={tmp_path / str(ranks)}"
        done = interlace("train", *tiny, *WORDS, *extra, "train.steps=2", where, ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (norms(records(tmp_path / str(ranks))[1]) for ranks in (1, 2))
    assert two == pytest.approx(one, rel=1e-4)
