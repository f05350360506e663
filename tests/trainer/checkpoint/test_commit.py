"""The commit protocol: whole or invisible, never overwritten, one live attempt, bounded disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from interlace.trainer.checkpoint import (
    CheckpointStore,
    FileRecord,
    Superseded,
    failpoints,
    write_file,
)
from interlace.trainer.errors import CheckpointError, SaveError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints")


def write(store: CheckpointStore, step: int, attempt: int) -> list[FileRecord]:
    """Everything of a save but `publish`: two files, as two ranks would write them."""
    folder = store.reserve(step, attempt, 200)
    return [write_file(folder / f"rank-{rank}", [b"%d %d" % (step, rank)]) for rank in range(2)]


def save(store: CheckpointStore, step: int, attempt: int) -> Path:
    return store.publish(step, attempt, write(store, step, attempt), {"loss": 0.5})


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Starts the code of a child process; the store's folder is its first argument.
PRELUDE = """
import sys
from pathlib import Path
from interlace.trainer.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]))
"""


# Saving


def test_making_a_store_touches_nothing(store: CheckpointStore) -> None:
    assert store.committed_steps() == []
    assert store.live_attempt() == 0
    assert not store.folder.parent.exists()


def test_a_saved_step_is_listed_with_what_was_written(store: CheckpointStore) -> None:
    attempt = store.begin_attempt()
    folder = save(store, 100, attempt)
    assert folder == store.folder / "committed" / "00000100" == store.committed_path(100)
    assert names(folder) == ["MANIFEST.json", "rank-0", "rank-1"]
    assert (folder / "rank-1").read_bytes() == b"100 1"
    manifest = store.read_manifest(100)
    assert (manifest.step, manifest.attempt, manifest.payload) == (100, 1, {"loss": 0.5})
    assert [(record.name, record.bytes) for record in manifest.files] == [
        ("rank-0", 5),
        ("rank-1", 5),
    ]
    assert names(store.folder / "inflight") == []


def test_an_unfinished_save_is_invisible(store: CheckpointStore) -> None:
    write(store, 10, store.begin_attempt())
    assert store.committed_steps() == []
    assert names(store.folder / "inflight") == ["10.1"]


def test_a_step_is_never_saved_twice(store: CheckpointStore) -> None:
    attempt = store.begin_attempt()
    save(store, 10, attempt)
    before = snapshot(store.folder)
    with pytest.raises(CheckpointError) as caught:
        store.reserve(10, attempt, 100)
    assert str(caught.value) == (
        f"{store.committed_path(10)} is already committed, and a checkpoint is never overwritten. "
        f"Go on from the newest with  interlace train --resume {store.folder.parent}  "
        "or take a new run.dir"
    )
    assert snapshot(store.folder) == before


def test_a_step_that_was_committed_meanwhile_is_not_replaced(store: CheckpointStore) -> None:
    attempt = store.begin_attempt()
    files = write(store, 10, attempt)
    planted = store.committed_path(10)
    planted.mkdir()
    with pytest.raises(CheckpointError, match="already committed"):
        store.publish(10, attempt, files, {})
    assert names(planted) == []


def test_a_save_that_would_not_fit_is_not_begun(store: CheckpointStore) -> None:
    attempt = store.begin_attempt()
    with pytest.raises(SaveError, match=r"free, but saving step 10 needs .* so it was not begun"):
        store.reserve(10, attempt, 2**60)
    assert names(store.folder / "inflight") == []


@pytest.mark.parametrize("change", ["stray", "missing", "longer", "link"])
def test_only_exactly_what_was_written_is_published(change: str, store: CheckpointStore) -> None:
    attempt = store.begin_attempt()
    files = write(store, 10, attempt)
    file = store.inflight_path(10, attempt) / "rank-1"
    if change == "stray":
        file.with_name(".rank-2.partial").touch()
    elif change == "longer":
        file.write_bytes(b"10 1 and more")
    else:
        file.unlink()
    if change == "link":
        file.symlink_to("rank-0")
    with pytest.raises(SaveError, match="rank-"):
        store.publish(10, attempt, files, {})
    assert store.committed_steps() == []


def test_a_manifest_that_no_reader_would_accept_is_not_published(store: CheckpointStore) -> None:
    attempt = store.begin_attempt()
    folder = store.reserve(10, attempt, 100)
    files = [write_file(folder / "Rank 0", [b"x"])]
    with pytest.raises(CheckpointError, match="'Rank 0' is not a plain name"):
        store.publish(10, attempt, files, {})
    assert store.committed_steps() == []


def test_every_byte_and_name_is_on_disk_before_it_is_needed(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = store.begin_attempt()
    events = record_events(store.folder, monkeypatch)
    save(store, 10, attempt)
    sizes = {path.name: path.stat().st_size for path in store.committed_path(10).iterdir()}
    inflight, committed = "inflight/10.1", "committed/00000010"
    assert events == [
        ("fsync", "inflight", None),
        *(
            event
            for name in ("rank-0", "rank-1", "MANIFEST.json")
            for event in (
                ("fsync", f"{inflight}/.{name}.partial", sizes[name]),
                ("rename", f"{inflight}/.{name}.partial", f"{inflight}/{name}"),
            )
        ),
        ("fsync", inflight, None),
        ("rename", inflight, committed),
        ("fsync", "committed", None),
        ("fsync", "inflight", None),
    ]


def record_events(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, str, int | str | None]]:
    """Note every fsync (path, size at that instant if a file) and every rename (from, to)."""
    events: list[tuple[str, str, int | str | None]] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        size = None if path.is_dir() else os.fstat(descriptor).st_size
        events.append(("fsync", str(path.relative_to(folder)), size))
        fsync(descriptor)

    def noting_rename(source: Path, target: Path) -> None:
        events.append(
            ("rename", str(source.relative_to(folder)), str(Path(target).relative_to(folder)))
        )
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    return events


def test_the_first_start_makes_its_folders_durable(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.folder.parent.mkdir(parents=True)
    events = record_events(store.folder.parent, monkeypatch)
    store.begin_attempt()
    assert events == [
        ("fsync", ".", None),
        ("fsync", "checkpoints", None),
        ("fsync", "checkpoints/attempts", None),
    ]


# Failing


POINTS = sorted(name for name in failpoints.FAILPOINTS if name.startswith(("persist", "manifest")))
POINTS.append("publish.pre_rename")


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("action", ["enospc", "eio"])
def test_a_disk_error_fails_the_save_and_nothing_else(
    point: str, action: str, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = store.begin_attempt()
    save(store, 10, attempt)
    before = snapshot(store.folder)
    failpoints.forget_visits()
    monkeypatch.setenv(failpoints.VARIABLE, f"{point}:{action}")
    with pytest.raises(SaveError) as caught:
        save(store, 20, attempt)
    cause = {"enospc": "No space left on device", "eio": "Input/output error"}[action]
    assert str(caught.value).startswith(
        f"Saving in {store.inflight_path(20, attempt)} failed: {cause} (failpoint {point}). "
        "The checkpoints committed before are untouched. "
    )
    store.abandon(20, attempt)
    assert snapshot(store.folder) == before
    assert names(store.folder / "inflight") == []
    save(store, 20, attempt)
    assert store.newest_usable() == (20, ())


def test_an_error_after_the_rename_leaves_a_whole_checkpoint(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = store.begin_attempt()
    failpoints.forget_visits()
    monkeypatch.setenv(failpoints.VARIABLE, "publish.post_rename:eio")
    with pytest.raises(SaveError):
        save(store, 10, attempt)
    store.abandon(10, attempt)
    assert store.newest_usable() == (10, ())


def test_a_failed_save_can_be_tried_again_even_if_not_cleaned_up(store: CheckpointStore) -> None:
    attempt = store.begin_attempt()
    write(store, 10, attempt)
    save(store, 10, attempt)
    assert store.committed_steps() == [10]


def test_abandoning_what_is_not_there_is_no_error(store: CheckpointStore) -> None:
    store.abandon(10, 1)


def test_abandoning_never_raises(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(store, 10, store.begin_attempt())
    refuse_deleting(monkeypatch)
    store.abandon(10, 1)
    assert caplog.messages == [
        f"could not delete {store.inflight_path(10, 1)}: Operation not permitted"
    ]


def refuse_deleting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, os.strerror(1), str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)


def test_a_folder_that_cannot_be_made_is_a_save_error(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(SaveError) as caught:
        CheckpointStore(tmp_path / "run" / "checkpoints").begin_attempt()
    assert str(caught.value) == (
        f"Saving in {tmp_path}/run/checkpoints failed: Not a directory: {tmp_path}/run/checkpoints."
        " The checkpoints committed before are untouched. Check the file system, "
        "or use  run.dir=PATH."
    )


# Attempts


def test_attempts_count_from_1(store: CheckpointStore) -> None:
    assert [store.begin_attempt() for _ in range(12)] == list(range(1, 13))
    assert store.live_attempt() == 12


def test_names_that_are_no_attempts_are_ignored(store: CheckpointStore) -> None:
    store.begin_attempt()
    for name in ("007", "9.bak", "-3", "\u0668", "0"):
        (store.folder / "attempts" / name).touch()
    assert store.begin_attempt() == 2


def test_two_processes_never_take_the_same_number(store: CheckpointStore) -> None:
    store.begin_attempt()
    code = "print('ready', flush=True); input()\nfor _ in range(100): print(store.begin_attempt())"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code, str(store.folder)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    taken = [[int(line) for line in process.communicate()[0].split()] for process in processes]
    assert sorted(taken[0] + taken[1]) == list(range(2, 202))
    assert all(mine == sorted(mine) for mine in taken)


def test_a_new_attempt_removes_what_older_ones_left(store: CheckpointStore) -> None:
    first = store.begin_attempt()
    save(store, 10, first)
    write(store, 20, first)
    (store.folder / "trash" / "00000005").mkdir()
    (store.folder / "trash" / "00000005" / "rank-0").touch()
    (store.folder / "inflight" / "notes").mkdir()
    # Of a start that took the number after ours, but was quicker.
    (store.folder / "inflight" / "40.3").mkdir()
    second = store.begin_attempt()
    write(store, 30, second)
    assert names(store.folder / "trash") == []
    assert names(store.folder / "inflight") == ["30.2", "40.3", "notes"]
    assert store.committed_steps() == [10]


def test_what_cannot_be_removed_does_not_stop_a_start(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(store, 10, store.begin_attempt())
    with monkeypatch.context() as patch:
        refuse_deleting(patch)
        assert store.begin_attempt() == 2
    trash = store.folder / "trash"
    assert caplog.messages == [f"could not delete {trash / '10.1'}: Operation not permitted"]
    assert store.begin_attempt() == 3
    assert names(trash) == []


def superseded_message(store: CheckpointStore, attempt: int, live: int) -> str:
    return (
        f"Attempt {attempt} of the run in {store.folder.parent} is not the live one, attempt "
        f"{live} is: the run was started again, and only the newest may save. "
        "Stop this process; nothing it saved before is lost."
    )


def test_a_superseded_attempt_cannot_publish(store: CheckpointStore) -> None:
    old = store.begin_attempt()
    save(store, 10, old)
    files = write(store, 20, old)
    new = store.begin_attempt()
    before = snapshot(store.folder)
    for action in (
        lambda: store.publish(20, old, files, {}),
        lambda: store.reserve(30, old, 100),
        lambda: store.set_aside(10, old),
    ):
        with pytest.raises(Superseded) as caught:
            action()
        assert str(caught.value) == superseded_message(store, old, new)
    assert snapshot(store.folder) == before
    save(store, 20, new)


@pytest.mark.parametrize("point", ["before the last check", "after the last check"])
def test_an_attempt_superseded_while_publishing_publishes_nothing(
    point: str, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = store.begin_attempt()
    files = write(store, 20, old)
    rename = os.rename
    renames = 0

    def start_again_then_rename(source: Path, target: Path) -> None:
        nonlocal renames
        renames += 1
        # The first rename gives the manifest its name, the second publishes.
        if renames == (1 if point == "before the last check" else 2):
            monkeypatch.setattr(os, "rename", rename)
            store.begin_attempt()
        rename(source, target)

    monkeypatch.setattr(os, "rename", start_again_then_rename)
    with pytest.raises(Superseded) as caught:
        store.publish(20, old, files, {})
    assert str(caught.value) == superseded_message(store, old, 2)
    assert store.committed_steps() == []


def test_the_number_alone_fences_off_an_attempt_whose_folder_stayed(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = store.begin_attempt()
    files = write(store, 20, old)
    rename = os.rename

    def start_again_after_rename(source: Path, target: Path) -> None:
        rename(source, target)
        monkeypatch.setattr(os, "rename", refuse_rename)
        store.begin_attempt()
        monkeypatch.setattr(os, "rename", rename)

    def refuse_rename(source: Path, target: Path) -> None:
        raise PermissionError(1, os.strerror(1), str(source))

    monkeypatch.setattr(os, "rename", start_again_after_rename)
    with pytest.raises(Superseded):
        store.publish(20, old, files, {})
    assert names(store.inflight_path(20, old)) == ["MANIFEST.json", "rank-0", "rank-1"]
    assert store.committed_steps() == []


def test_a_start_takes_unfinished_folders_away_in_one_instant(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late rename of a folder that is just being deleted would publish half of it."""
    write(store, 20, store.begin_attempt())
    monkeypatch.setattr(
        "shutil.rmtree", lambda path: pytest.fail("in place") if "inflight" in str(path) else None
    )
    store.begin_attempt()
    assert names(store.folder / "inflight") == []


# Setting aside


def test_a_broken_step_can_be_set_aside_and_saved_again(store: CheckpointStore) -> None:
    attempt = store.begin_attempt()
    save(store, 10, attempt)
    save(store, 20, attempt)
    (store.committed_path(20) / "rank-0").write_bytes(b"damage")
    step, broken = store.newest_usable()
    assert (step, [report.step for report in broken]) == (10, [20])
    aside = store.set_aside(20, attempt)
    assert aside == store.folder / "broken" / "00000020.1"
    assert (aside / "rank-0").read_bytes() == b"damage"
    assert store.committed_steps() == [10]
    save(store, 20, attempt)
    assert store.newest_usable() == (20, ())


def test_setting_aside_what_is_not_there_is_a_save_error(store: CheckpointStore) -> None:
    attempt = store.begin_attempt()
    with pytest.raises(SaveError, match="No such file or directory"):
        store.set_aside(20, attempt)


def test_a_step_that_a_newer_start_has_committed_is_a_matter_of_the_newer_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    old = store.begin_attempt()
    look = CheckpointStore.require_live
    looks: list[int] = []

    def overtaken_after_the_first_look(self: CheckpointStore, attempt: int) -> None:
        look(self, attempt)
        looks.append(attempt)
        if len(looks) == 1:
            new = store.begin_attempt()
            monkeypatch.setattr(CheckpointStore, "require_live", look)
            record = write_file(store.reserve(5, new, 1) / "rank-0", [b"x"])
            store.publish(5, new, [record], {})

    monkeypatch.setattr(CheckpointStore, "require_live", overtaken_after_the_first_look)
    with pytest.raises(Superseded, match="is not the live one"):
        store.reserve(5, old, 1)


def test_nobody_else_may_read_a_checkpoint_whatever_the_umask(store: CheckpointStore) -> None:
    store.folder.parent.mkdir()
    before = os.umask(0)
    try:
        save(store, 1, store.begin_attempt())
        store.set_aside(1, 1)
    finally:
        os.umask(before)
    modes = {path: path.stat().st_mode & 0o777 for path in (store.folder, *store.folder.rglob("*"))}
    assert len(modes) > 8
    for path, mode in modes.items():
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_every_commit_is_acknowledged_in_a_log_outside_the_run(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "acks"
    monkeypatch.setenv("INTERLACE_ACK_LOG", str(log))
    for _ in range(2):
        attempt = store.begin_attempt()
        save(store, 5 * attempt, attempt)
    with pytest.raises(Superseded):
        save(store, 99, 1)
    expected = "step 5 attempt 1 committed\nstep 10 attempt 2 committed\n"
    assert log.read_text(encoding="ascii") == expected
