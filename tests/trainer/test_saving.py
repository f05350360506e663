"""Saves beside training: what is committed, what is done about failures, and how a run stops."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import config_of

from interlace.trainer import saving
from interlace.trainer.assembly import open_run
from interlace.trainer.checkpoint import commit, snapshot
from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.checkpoint.failpoints import forget_visits
from interlace.trainer.checkpoint.files import sync_folder, write_file
from interlace.trainer.checkpoint.interval import Costs
from interlace.trainer.errors import Preempted, SaveError, StorageError
from interlace.trainer.exits import Exit, status_of
from interlace.trainer.loop import finished_steps, train
from interlace.trainer.run import Run
from interlace.trainer.signals import StopRequest
from interlace.trainer.world import World

SHORT = ("train.steps=12", "checkpoint.every_steps=3", "checkpoint.keep_last=9")
QUICK = ("checkpoint.retry_seconds=0.01", "checkpoint.tries=3")


def stored(run: Path) -> dict[int, list[tuple[str, str]]]:
    """Return name and digest of every file of every committed step."""
    store = CheckpointStore(run / "checkpoints")
    return {
        step: [(file.name, file.sha256) for file in store.read_manifest(step).files]
        for step in store.committed_steps()
    }


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("offload.strategy=host", "offload.overlap=backward", "optimizer.clip=0.0"),
    ],
    ids=["resident", "host"],
)
def test_a_run_that_saves_beside_training_commits_the_bytes_of_one_that_stands_still(
    words: Sequence[str],
    tiny: Sequence[str],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INTERLACE_FAILPOINT", "snap.chunk@*:delay")
    monkeypatch.setattr("interlace.trainer.checkpoint.failpoints.DELAY_SECONDS", 0.002)
    beside, still = tmp_path / "beside", tmp_path / "still"
    train(config_of(tiny, beside, *SHORT, *words, "checkpoint.copy_budget_gib=0.0"), World())
    train(config_of(tiny, still, *SHORT, *words, "checkpoint.asynchronous=false"), World())
    assert list(stored(beside)) == [3, 6, 9, 12]
    assert stored(beside) == stored(still)
    assert losses_of(beside) == losses_of(still)


class Storage:
    """A disk that can be told to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failures: Iterator[bool] = iter(())
        self.tried = 0
        monkeypatch.setattr(snapshot, "write_file", self.write)

    def write(self, path: Path, chunks: object) -> object:
        self.tried += 1
        if next(self.failures, False):
            raise SaveError("the disk is full")
        return write_file(path, chunks)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Storage:
    return Storage(monkeypatch)


def test_a_failure_is_told_within_a_step_and_training_goes_on(
    storage: Storage,
    tiny: Sequence[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage.failures = iter([False, True])
    with running(tiny, tmp_path, *SHORT) as run:
        for step in finished_steps(run):
            if step == 5:
                assert run.saving.under_way is not None
                run.saving.under_way.snapshot.wait()
            if step == 6:
                assert "checkpoint at step 6 failed: the disk is full" in capsys.readouterr().out
                assert run.saving.under_way is None
                assert list((tmp_path / "run" / "checkpoints" / "inflight").iterdir()) == []
        run.conclude()
    assert list(stored(tmp_path / "run")) == [3, 9, 12]


def test_a_rank_that_gives_up_what_another_could_not_write_is_given_the_time_of_a_save(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []
    with running(tiny, tmp_path, *SHORT) as run:
        for step in finished_steps(run):
            if step == 2:
                break
        save = run.saving.under_way
        assert save is not None

        def give_up() -> None:
            phases.append(run.heartbeat.pulse.phase)

        monkeypatch.setattr(save.snapshot, "give_up", give_up)
        run.saving.hear({"persist_failed": 1.0})
        run.saving.save_if_due(run.progress)
    assert phases == ["publish"]


def test_two_failures_in_a_row_stop_the_run_after_some_more_tries(
    storage: Storage, tiny: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.failures = iter([False] + [True] * 9)
    with pytest.raises(StorageError) as caught:
        train(config_of(tiny, tmp_path / "run", *SHORT, *QUICK), World())
    assert status_of(caught.value) is Exit.STORAGE
    message = str(caught.value)
    assert "cannot be saved, so the run stops: the disk is full" in message
    assert "The newest checkpoint is of step 3" in message
    assert "checkpoint.tries=3 and checkpoint.retry_seconds=0.01" in message
    told = capsys.readouterr().out
    assert "checkpoint at step 6 failed" in told
    assert "checkpoint at step 9 failed" in told
    assert "try 3 of 3" in told
    # One that went well, two failures, three tries.
    assert storage.tried == 6
    assert list(stored(tmp_path / "run")) == [3]
    assert list((tmp_path / "run" / "checkpoints" / "inflight").iterdir()) == []


def test_a_storage_that_comes_back_while_the_run_waits_costs_nothing_but_time(
    storage: Storage,
    tiny: Sequence[str],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    storage.failures = iter([False, True, True, True, False])
    train(config_of(tiny, tmp_path / "run", *SHORT, *QUICK), World())
    # Steps 6 and 9 failed; the try that worked saved the step that the run had come to.
    [*steps, last] = stored(tmp_path / "run")
    assert (steps[0], last) == (3, 12)
    assert 6 not in steps
    storage.failures = iter(())
    train(config_of(tiny, tmp_path / "straight", *SHORT), World())
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "straight")


def test_a_run_that_waits_for_its_storage_stops_when_it_is_asked_to(
    storage: Storage, tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.failures = iter([True] * 99)
    stop = StopRequest(announce=False)
    # Not in `time` itself: whoever else sleeps, on a thread of its own, asks for nothing.
    clock = SimpleNamespace(
        monotonic=time.monotonic,
        perf_counter=time.perf_counter,
        sleep=lambda _: stop.ask("enough"),
    )
    monkeypatch.setattr(saving, "time", clock)
    config = config_of(tiny, tmp_path / "run", *SHORT, "checkpoint.retry_seconds=5.0")
    with pytest.raises(StorageError, match="cannot be saved"):
        train(config, World(), stop=stop)
    assert stop.received


def test_a_run_that_is_asked_to_stop_tries_again_to_save(
    storage: Storage, tiny: Sequence[str], tmp_path: Path
) -> None:
    storage.failures = iter([False, True, True, False])
    with running(tiny, tmp_path, *SHORT, *QUICK) as run:
        for step in finished_steps(run):
            if step == 3:
                run.stop.ask("notice", 600.0)
            if run.stop_requested:
                break
        run.conclude()
    assert list(stored(tmp_path / "run")) == [3, 5]


def test_a_run_that_has_no_time_to_try_again_does_not_wait(
    storage: Storage, tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.failures = iter([False] + [True] * 9)
    words = (*SHORT, "checkpoint.retry_seconds=3000.0")
    with pytest.raises(StorageError, match="after step 5"), running(tiny, tmp_path, *words) as run:
        for step in finished_steps(run):
            if step == 3:
                run.stop.ask("notice", 600.0)
            if run.stop_requested:
                break
        monkeypatch.setattr(saving.time, "sleep", lambda _: pytest.fail("it waited"))
        run.conclude()


def test_a_commit_whose_last_fsync_failed_counts_once_that_succeeds(
    tiny: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failures = iter([True, True])

    def fail_at_first(folder: Path) -> None:
        if (folder / "00000012").exists() and next(failures, False):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync_folder(folder)

    monkeypatch.setattr(commit, "sync_folder", fail_at_first)
    commits: list[int] = []
    train(config_of(tiny, tmp_path / "run", *SHORT, *QUICK), World(), on_commit=commits.append)
    assert commits == [3, 6, 9, 12] == list(stored(tmp_path / "run"))
    told = capsys.readouterr().out
    assert "checkpoint at step 12, try 1 of 3: " in told
    assert "already committed" not in told


def test_what_a_save_takes_is_not_counted_twice_where_it_is_waited_for(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, chunks: object) -> object:
        time.sleep(0.5)
        return write_file(path, chunks)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(snapshot, "write_file", write)
    with running(tiny, tmp_path, "train.steps=3") as run:
        next(finished_steps(run))
        began = time.perf_counter()
        run.saving.begin(run.progress)
        begun = time.perf_counter() - began
        run.saving.publish(run.progress)
        spent = time.perf_counter() - began
    [costs] = run.saving.pace.measured
    # The writer starts within the beginning, which is the only time that may count twice.
    assert 0.5 <= costs.persist <= spent + begun
    assert costs.stall <= spent


@contextmanager
def running(tiny: Sequence[str], folder: Path, *words: str) -> Iterator[Run]:
    """Open a run in this process."""
    stop = StopRequest(announce=False)
    with open_run(config_of(tiny, folder / "run", *words), World(), stop) as run:
        yield run


def test_asked_to_stop_a_run_saves_where_it_is_if_there_is_time(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    with running(tiny, tmp_path, *SHORT) as run:
        for step in finished_steps(run):
            if step == 4:
                run.saving.pace.learn(Costs(1.0, 20.0))
                run.stop.ask("notice", 600.0)
            if run.stop_requested:
                break
        run.conclude()
    assert list(stored(tmp_path / "run")) == [3, 6]


def test_asked_to_stop_too_late_a_run_leaves_at_its_newest_checkpoint(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    with pytest.raises(Preempted) as caught, running(tiny, tmp_path, *SHORT) as run:
        for step in finished_steps(run):
            if step == 4:
                run.saving.pace.learn(Costs(1.0, 900.0))
                run.stop.ask("notice", 600.0)
            if run.stop_requested:
                break
        run.conclude()
    assert status_of(caught.value) is Exit.PREEMPTED
    message = str(caught.value)
    assert message.startswith("stopped after step 6 without saving it: that takes about 900.0 s")
    assert "(checkpoint.notice_seconds=30)" in message
    assert "The newest checkpoint is of step 3" in message
    assert f"interlace train --resume {tmp_path / 'run'}" in message
    assert list(stored(tmp_path / "run")) == [3]
    assert list((tmp_path / "run" / "checkpoints" / "inflight").iterdir()) == []


def test_a_run_that_ends_in_an_error_gives_its_save_up(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERLACE_FAILPOINT", "snap.chunk@*:delay")
    with pytest.raises(ZeroDivisionError), running(tiny, tmp_path, *SHORT) as run:
        for step in finished_steps(run):
            if step == 3:
                assert run.saving.under_way is not None
                raise ZeroDivisionError
    assert run.saving.under_way is None
    assert "checkpoint" not in [thread.name for thread in threading.enumerate()]
    forget_visits()


def test_callers_learn_of_every_commit(tiny: Sequence[str], tmp_path: Path) -> None:
    commits: list[int] = []
    train(config_of(tiny, tmp_path / "run", *SHORT), World(), on_commit=commits.append)
    assert commits == [3, 6, 9, 12]


def test_an_automatic_run_says_how_often_it_saves(
    tiny: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train.steps=8", "checkpoint.every=auto", "checkpoint.hours_between_failures=5000.0")
    train(config_of(tiny, tmp_path / "run", *words), World())
    assert list(stored(tmp_path / "run")) == [2, 8]
    told = capsys.readouterr().out
    assert "a checkpoint every " in told
    assert "a failure is expected every 5000 h" in told
