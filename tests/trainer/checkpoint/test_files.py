"""A file of a checkpoint is whole or absent, and a failing disk is reported in plain words."""

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest

from interlace.trainer.checkpoint import failpoints
from interlace.trainer.checkpoint.files import require_exactly, require_space, saving, write_file
from interlace.trainer.checkpoint.manifest import FileRecord
from interlace.trainer.errors import SaveError

ROOT = Path(__file__).parents[3]
UNTOUCHED = "The checkpoints committed before are untouched."
FREE_SPACE = "Free space there, lower checkpoint.keep_last, or use another disk with  run.dir=PATH."


def arm(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    failpoints.forget_visits()
    monkeypatch.setenv(failpoints.VARIABLE, setting)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_chunks_of_any_kind_are_written_in_order_and_hashed(tmp_path: Path) -> None:
    whole = bytes(range(256)) * 1000
    wide = memoryview(whole[7 : 107_007 - 7]).cast("B")
    words = memoryview(bytearray(whole[:8000])).cast("I")
    empty = numpy.zeros((0, 3)).data
    record = write_file(tmp_path / "a", [b"", whole[:7], wide, b"x", words, empty])
    expected = whole[:107_000] + b"x" + whole[:8000]
    assert (tmp_path / "a").read_bytes() == expected
    assert record == FileRecord("a", len(expected), hashlib.sha256(expected).hexdigest())
    assert names(tmp_path) == ["a"]


def test_an_empty_file_is_a_file(tmp_path: Path) -> None:
    record = write_file(tmp_path / "a", [])
    assert record == FileRecord("a", 0, hashlib.sha256(b"").hexdigest())
    assert (tmp_path / "a").read_bytes() == b""


def test_an_existing_file_is_never_replaced(tmp_path: Path) -> None:
    write_file(tmp_path / "a", [b"first"])
    with pytest.raises(SaveError) as caught:
        write_file(tmp_path / "a", [b"second"])
    assert str(caught.value) == (
        f"Saving in {tmp_path} failed: File exists: {tmp_path / 'a'}. {UNTOUCHED} "
        "Check the file system, or use  run.dir=PATH."
    )
    assert (tmp_path / "a").read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


def test_the_half_written_file_of_another_writer_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").write_bytes(b"theirs")
    with pytest.raises(SaveError, match="File exists"):
        write_file(tmp_path / "a", [b"ours"])
    assert (tmp_path / ".a.partial").read_bytes() == b"theirs"


def test_a_removed_folder_points_to_a_newer_start(tmp_path: Path) -> None:
    folder = tmp_path / "inflight"
    with pytest.raises(SaveError) as caught:
        write_file(folder / "a", [b"x"])
    assert str(caught.value) == (
        f"Saving in {folder} failed: No such file or directory: {folder / '.a.partial'}. "
        f"{UNTOUCHED} The folder is gone. If a newer start of this run removed it, stop this one."
    )


@pytest.mark.parametrize("point", ["open", "half", "pre_fsync"])
@pytest.mark.parametrize("action", ["enospc", "eio", "raise"])
def test_a_failure_anywhere_leaves_nothing(
    point: str, action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm(monkeypatch, f"persist.{point}:{action}")
    with pytest.raises(failpoints.FailpointHit if action == "raise" else SaveError):
        write_file(tmp_path / "a", [b"x" * 100_000])
    assert names(tmp_path) == []


def test_a_chunk_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> Generator[bytes, None, None]:
        yield b"x" * 100_000
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a", chunks())
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, FREE_SPACE),
        (errno.EDQUOT, f"Your quota is used up. {FREE_SPACE}"),
        (
            errno.EFBIG,
            "Raise the limit on file size (ulimit -f), or use another disk with  run.dir=PATH.",
        ),
        (
            errno.EIO,
            "The disk may be failing: look at  dmesg  and use another with  run.dir=PATH.",
        ),
        (errno.EROFS, "Mount the disk writable, or use another with  run.dir=PATH."),
        (
            errno.EACCES,
            "Give yourself write permission on the folder, or use another with  run.dir=PATH.",
        ),
        (
            errno.EPERM,
            "Give yourself write permission on the folder, or use another with  run.dir=PATH.",
        ),
        (errno.ENOTDIR, "Check the file system, or use  run.dir=PATH."),
    ],
)
def test_every_cause_has_its_remedy(number: int, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(SaveError) as caught, saving(tmp_path):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == (
        f"Saving in {tmp_path} failed: {os.strerror(number)}. {UNTOUCHED} {remedy}"
    )


def test_lack_of_space_names_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 11 * 2**30

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    require_space(tmp_path, 40, 10 * 2**30)
    with pytest.raises(SaveError) as caught:
        require_space(tmp_path, 40, 10 * 2**30 + 1)
    assert str(caught.value) == (
        f"{tmp_path} has 11.00 GiB free, but saving step 40 needs 11.00 GiB (its size and a "
        f"tenth), so it was not begun. {UNTOUCHED} {FREE_SPACE}"
    )


def test_a_folder_must_hold_exactly_what_was_written(tmp_path: Path) -> None:
    record = write_file(tmp_path / "a", [b"12345"])
    require_exactly(tmp_path, [record])
    (tmp_path / "b").touch()
    with pytest.raises(SaveError) as caught:
        require_exactly(tmp_path, [record, FileRecord("c", 1, "0" * 64)])
    assert str(caught.value) == (
        f"{tmp_path} does not hold exactly the files that were written (b, c), so the step was "
        f"not committed. {UNTOUCHED} Make sure that nothing else writes there."
    )


@contextmanager
def file_size_limit(limit: int) -> Generator[None, None, None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_real_limit_on_file_size_is_a_save_error(tmp_path: Path) -> None:
    with file_size_limit(64 * 1024), pytest.raises(SaveError, match=r"ulimit -f"):
        write_file(tmp_path / "a", [b"x" * 50_000] * 2)
    assert names(tmp_path) == []


FULL_DISK = """
import json, sys
from pathlib import Path
from interlace.trainer.checkpoint import CheckpointStore, write_file
from interlace.trainer.errors import SaveError

store = CheckpointStore(Path(sys.argv[1]) / "checkpoints")
attempt = store.begin_attempt()


def save(step: int, size: int, needed: int) -> None:
    folder = store.reserve(step, attempt, needed)
    files = [write_file(folder / "a", [b"x" * 4096] * (size // 4096))]
    store.publish(step, attempt, files, {})


messages = []
save(1, 400 * 1024, 400 * 1024)
for step, needed in ((2, 1), (3, 800 * 1024)):
    try:
        save(step, 800 * 1024, needed)
    except SaveError as error:
        messages.append(str(error))
        store.abandon(step, attempt)
save(4, 300 * 1024, 300 * 1024)
usable, _ = store.newest_usable()
inflight = [path.name for path in (store.folder / "inflight").iterdir()]
print(json.dumps([messages, store.committed_steps(), usable, inflight]))
"""


def test_a_full_disk_fails_the_save_and_spares_the_rest(tmp_path: Path) -> None:
    """A 1 MiB tmpfs in a mount namespace of its own, which vanishes with the process."""
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1"'
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*unshare, mount, "sh", str(tmp_path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets us mount nothing")
    done = subprocess.run(
        [
            *unshare,
            f'{mount} && exec "$2" -c "$3" "$1"',
            "sh",
            str(tmp_path),
            sys.executable,
            FULL_DISK,
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    messages, committed, usable, inflight = json.loads(done.stdout)
    assert messages[0].startswith(f"Saving in {tmp_path}/checkpoints/inflight/2.1 failed: No space")
    assert messages[1].startswith(f"{tmp_path}/checkpoints has 0.")
    assert (committed, usable, inflight) == ([1, 4], 4, [])
