"""Retention keeps what it promises, and removes the rest whole."""

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from interlace.trainer.checkpoint import CheckpointStore, failpoints, verify_run, write_file
from interlace.trainer.checkpoint.retention import steps_to_remove

ROOT = Path(__file__).parents[3]
RETAIN = """
import sys
from pathlib import Path
from interlace.trainer.checkpoint import CheckpointStore
CheckpointStore(Path(sys.argv[1])).retain(2, 0)
"""


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


def save(store: CheckpointStore, step: int, attempt: int) -> None:
    folder = store.reserve(step, attempt, 200)
    files = [write_file(folder / f"rank-{rank}", [b"%d %d" % (step, rank)]) for rank in range(2)]
    store.publish(step, attempt, files, {})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refuse_deleting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, os.strerror(1), str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)


def plain_retention(steps: Sequence[int], keep_last: int, every: int) -> list[int]:
    """The steps that stay, found one by one."""
    stay: list[int] = []
    for step in steps:
        newer = len([other for other in steps if other > step])
        if newer < keep_last or (every > 0 and step % every == 0):
            stay.append(step)
    return stay


@pytest.mark.parametrize("keep_last", [1, 2, 3, 50])
@pytest.mark.parametrize("every", [0, 1, 7, 20])
def test_the_newest_and_every_nth_stay(keep_last: int, every: int) -> None:
    for steps in ([], [0], [5, 10], list(range(0, 100, 5))):
        removed = steps_to_remove(steps, keep_last, every)
        stay = plain_retention(steps, keep_last, every)
        assert sorted([*removed, *stay]) == steps
        assert list(removed) == sorted(removed)


def test_keeping_none_is_a_defect_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="the newest checkpoint always stays"):
        steps_to_remove([1, 2], 0, 0)


def test_retention_removes_whole_checkpoints(store: CheckpointStore) -> None:
    attempt = store.begin_attempt()
    for step in (10, 15, 20, 25, 30):
        save(store, step, attempt)
    retention = store.retain(keep_last=2, keep_every_steps=20)
    assert (retention.removed, retention.problems) == ((10, 15), ())
    assert store.committed_steps() == [20, 25, 30]
    assert names(store.folder / "trash") == []
    assert store.retain(keep_last=2, keep_every_steps=20).removed == ()


def test_what_lies_in_the_trash_is_not_in_the_way(store: CheckpointStore) -> None:
    attempt = store.begin_attempt()
    for step in (10, 20):
        save(store, step, attempt)
    (store.folder / "trash" / "00000010").mkdir()
    (store.folder / "trash" / "00000010" / "rank-0").touch()
    assert store.retain(keep_last=1, keep_every_steps=0).removed == (10,)
    assert names(store.folder / "trash") == []


def test_the_removal_is_durable_before_anything_is_deleted(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = store.begin_attempt()
    for step in (10, 20, 30):
        save(store, step, attempt)
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def noting_rename(source: Path, target: Path) -> None:
        events.append(("rename", f"{Path(target).parent.name}/{source.name}"))
        rename(source, target)

    def noting_delete(path: Path) -> None:
        events.append(("delete", path.name))

    monkeypatch.setattr("os.fsync", noting_fsync)
    monkeypatch.setattr("os.rename", noting_rename)
    monkeypatch.setattr("shutil.rmtree", noting_delete)
    store.retain(keep_last=1, keep_every_steps=0)
    assert events == [
        ("rename", "trash/00000010"),
        ("rename", "trash/00000020"),
        ("fsync", "committed"),
        ("fsync", "trash"),
        ("delete", "00000010"),
        ("delete", "00000020"),
    ]


def test_what_retention_cannot_delete_is_told_not_raised(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = store.begin_attempt()
    for step in (10, 20):
        save(store, step, attempt)
    problem = f"could not delete {store.folder / 'trash' / '00000010'}: Operation not permitted"
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        refuse_deleting(patch)
        retention = store.retain(keep_last=1, keep_every_steps=0)
    assert (retention.removed, retention.problems) == ((10,), (problem,))
    assert caplog.messages == ["removed the checkpoints of steps [10]", problem]
    assert store.newest_usable() == (20, ())


def test_what_retention_cannot_move_is_told_and_stays(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = store.begin_attempt()
    for step in (10, 20, 30):
        save(store, step, attempt)
    failpoints.forget_visits()
    monkeypatch.setenv(failpoints.VARIABLE, "retain.mid:eio")
    retention = store.retain(keep_last=1, keep_every_steps=0)
    assert retention.removed == (10,)
    assert retention.problems == (
        f"could not move old checkpoints to {store.folder / 'trash'}: "
        "[Errno 5] Input/output error (failpoint retain.mid)",
    )
    assert store.committed_steps() == [20, 30]


def test_checkpoints_that_cannot_be_listed_just_now_stay_and_stop_nobody(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = store.begin_attempt()
    for step in (10, 20):
        save(store, step, attempt)

    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", refuse)
        retention = store.retain(keep_last=1, keep_every_steps=0)
    assert retention.removed == ()
    assert "cannot be listed (Input/output error)" in caplog.text
    assert store.committed_steps() == [10, 20]


@pytest.mark.parametrize("visit", [1, 2, 3])
def test_a_kill_in_the_middle_of_retention_loses_nothing_that_stays(
    visit: int, store: CheckpointStore
) -> None:
    attempt = store.begin_attempt()
    for step in (10, 20, 30, 40):
        save(store, step, attempt)
    died = subprocess.run(
        [sys.executable, "-c", RETAIN, str(store.folder)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            failpoints.VARIABLE: f"retain.mid@{visit}:kill",
        },
    )
    assert died.returncode == -9
    assert store.committed_steps() == [10, 20, 30, 40][min(visit, 2) :]
    assert all(report.problems == () for report in verify_run(store.folder))
    assert len(names(store.folder / "trash")) == min(visit, 2)
    store.begin_attempt()
    store.retain(2, 0)
    assert names(store.folder / "trash") == []
    assert store.committed_steps() == [30, 40]
