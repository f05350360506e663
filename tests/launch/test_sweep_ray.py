"""Under Ray Tune a sweep gives the table that it gives here, into the same store."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sweep_cases import SMALL

from interlace.launch.cli import main
from interlace.launch.sweep.store import Store


@pytest.fixture(autouse=True)
def ray() -> Iterator[None]:
    pytest.importorskip("ray.tune", reason="pip install 'interlace[ray]'")
    yield


@pytest.mark.long
def test_trials_of_ray_tune_fill_the_same_store(
    corpus: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ("--store", str(tmp_path / "store"), "--output", str(tmp_path / "out"))
    shape = ("--widths", "16,32", "--lr", "2**-7:2**-6", "--seeds", "1", "--jobs", "2")
    line = ["sweep", "fault-drill", *SMALL, *corpus, *shape, *folders]
    status = main([*line, "--on", "ray"])
    table = (tmp_path / "out" / "sweep.csv").read_text(encoding="utf-8")
    store = Store(tmp_path / "store")
    keys = [result.key for result in store.results()]
    assert len(table.splitlines()) == 1 + len(keys) and sorted(store.starts()) == sorted(keys)
    capsys.readouterr()

    # Here there is nothing left to do, and the verdict is the same.
    assert main(line) == status
    assert (tmp_path / "out" / "sweep.csv").read_text(encoding="utf-8") == table
    assert f"{len(keys)} trials, {len(keys)} of them from the store" in capsys.readouterr().out


@pytest.mark.long
def test_a_trial_that_crashes_under_ray_is_reported(
    corpus: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERLACE_FAILPOINT", "step.update@2:eio")
    folders = ("--store", str(tmp_path / "store"), "--output", str(tmp_path / "out"))
    shape = ("--widths", "16", "--lr", "2**-7", "--seeds", "1", "--jobs", "1")
    assert main(["sweep", "fault-drill", *SMALL, *corpus, *shape, *folders, "--on", "ray"]) == 1
    text = (tmp_path / "out" / "sweep.json").read_text(encoding="utf-8")
    assert "it crashed under Ray" in text
