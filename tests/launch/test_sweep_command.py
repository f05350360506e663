"""The command `interlace sweep`: its processes, pages, refusals and exit status."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweep_cases import Inline, pretended, space_of, without_seconds, words

from interlace.launch.cli import build_parser, main, parse
from interlace.launch.sweep import command
from interlace.launch.sweep.conducting import State, conduct
from interlace.launch.sweep.judging import judged
from interlace.launch.sweep.records import write_records
from interlace.launch.sweep.request import read_request
from interlace.launch.sweep.store import Store
from interlace.launch.sweep.trials import make_space

pytestmark = pytest.mark.usefixtures("one_thread")


def test_trials_share_the_cores_and_take_no_more_threads_than_the_environment_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [command.threads_of_each(jobs) for jobs in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert command.threads_of_each(2) == 1


def test_a_killed_sweep_goes_on_and_repeats_no_finished_trial(
    corpus: tuple[str, str], tmp_path: Path
) -> None:
    shape = ("--seeds", "1", "--jobs", "1", "--parametrisation", "standard", "train.steps=12")

    def line(name: str) -> list[str]:
        folders = ("--store", str(tmp_path / name), "--output", str(tmp_path / f"{name}-out"))
        return words(corpus, *shape, *folders)

    store = Store(tmp_path / "killed")
    started = [sys.executable, "-m", "interlace.launch.cli", *line("killed")]
    log = (tmp_path / "log").open("wb")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    sweep = subprocess.Popen(started, stdout=log, stderr=log, env=environment)
    deadline = time.monotonic() + 300
    while len(list(store.results())) < 3 and sweep.poll() is None:
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.01)
    sweep.send_signal(signal.SIGKILL)
    assert sweep.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    finished = {result.key for result in store.results()}
    begun = store.starts()
    assert len(begun) - len(finished) <= 1, "a kill loses only what was running"

    assert main(line("killed")) == 0
    straight = State(
        make_space(read_request(parse(build_parser(), line("straight"))), "cpu"),
        Store(tmp_path / "straight"),
    )
    conduct(straight, Inline(straight.store), lambda state: None)
    write_records(straight, judged(straight), tmp_path / "straight-out")
    assert without_seconds(tmp_path / "killed-out") == without_seconds(tmp_path / "straight-out")
    starts = store.starts()
    assert all(starts.count(key) == 1 for key in finished)
    results = list(store.results())
    assert len(finished) < len(results), "it was killed in the middle"
    assert len(starts) <= len(results) + 1


def test_a_worker_that_dies_takes_one_trial_with_it(
    corpus: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The sixth step of a process is in its second trial.
    monkeypatch.setenv("INTERLACE_FAILPOINT", "step.update@6:kill")
    folders = ("--store", str(tmp_path / "store"), "--output", str(tmp_path / "out"))
    shape = ("--seeds", "1", "--jobs", "1", "--widths", "16", "--parametrisation", "mup")
    assert main(words(corpus, *shape, *folders, lr="2**-8:2**-7")) == 1
    shown = capsys.readouterr()
    store = Store(tmp_path / "store")
    document = json.loads((tmp_path / "out" / "sweep.json").read_text(encoding="utf-8"))
    assert document["trials"] and document["crashed"]
    assert "its process died (signal 9)" in document["crashed"][0]["problem"]
    assert "log: " in document["crashed"][0]["problem"] and "CRASHED" in shown.err
    assert len(store.starts()) == len(document["trials"]) + len(document["crashed"])
    assert "trials crashed; they run again when the sweep does" in shown.out


def test_a_dry_run_lists_trials_and_runs_none(
    corpus: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = words(corpus, "--store", str(tmp_path / "store"), "--dry-run", "--jobs", "2")
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert "width 16: 9 trials, 3 learning rates from 0.00390625 to 0.015625" in shown
    assert "about 15 at width 32" in shown and "is not known" in shown
    assert not (tmp_path / "store").exists()
    pretended(space_of(corpus, tmp_path))
    assert main(line) == 0
    assert "0 are needed next" in capsys.readouterr().out


def test_the_exit_status_and_json_tell_the_verdict(
    corpus: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended(space_of(corpus, tmp_path, "--parametrisation", "both"))
    folders = ("--store", str(tmp_path / "store"), "--output", str(tmp_path / "out"))
    assert main(words(corpus, *folders, "--parametrisation", "both", "--json")) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["families"][0]["transfer"]["drift_passes"] is True
    assert document["above_standard"][0]["nats"] == pytest.approx(0, abs=1e-9)
    assert main(words(corpus, *folders, "--parametrisation", "standard")) == 0


def test_folders_that_are_files_are_refused(
    corpus: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for option in ("--output", "--store"):
        assert main(words(corpus, option, str(tmp_path / "file"))) == 2
        assert f"{option} {tmp_path / 'file'}: is a file; give a folder" in capsys.readouterr().err


def test_help_teaches_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["sweep", "--help"])
    shown = capsys.readouterr().out
    assert "--widths 64,128,256" in shown and "Exit status" in shown
