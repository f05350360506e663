"""Files that are complete or absent, even after a power cut, and errors of the disk in plain words.

A file is written under a temporary name, hashed, flushed, fsynced at its final size, and only then
given its name. It is hashed as it is read back from the system's memory, before it goes to the
disk: whoever waits for its contents to be taken waits for a copy and not for the digest. Its name
survives a power cut once the folder is fsynced as well, which the committer does once for all
files. Reading opens regular files only and never follows a link.
"""

import errno
import hashlib
import io
import os
import shutil
import stat
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from interlace.trainer.checkpoint.failpoints import failpoint
from interlace.trainer.checkpoint.manifest import FileRecord
from interlace.trainer.errors import SaveError

PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600
"""Modes of whatever is made here, whatever the umask allows."""

_UNTOUCHED = "The checkpoints committed before are untouched."
_FREE_SPACE = "Free space there, lower checkpoint.keep_last, or use another disk with  run.dir=PATH"
_PERMISSION = "Give yourself write permission on the folder, or use another with  run.dir=PATH"
_REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: "Your quota is used up. " + _FREE_SPACE,
    errno.EFBIG: "Raise the limit on file size (ulimit -f), or use another disk with  run.dir=PATH",
    errno.EIO: "The disk may be failing: look at  dmesg  and use another with  run.dir=PATH",
    errno.EROFS: "Mount the disk writable, or use another with  run.dir=PATH",
    errno.ENOENT: "The folder is gone. If a newer start of this run removed it, stop this one",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
}


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write one file of a checkpoint so that it is complete or absent.

    Several processes may write different files of one folder at the same time.

    Args:
        path: A new file in the folder that `CheckpointStore.reserve` returned.
        chunks: The contents in order; contiguous, of any size.

    Returns:
        The file's name, size and SHA-256, for `CheckpointStore.publish`.

    Raises:
        SaveError: The disk is full, read-only or failing, or the file exists. Nothing of it is
            left.
    """
    with saving(path.parent):
        return write_durably(path, chunks, "persist")


@contextmanager
def saving(folder: Path) -> Generator[None, None, None]:
    """Turn an `OSError` inside the context into a `SaveError` that says what to do.

    Args:
        folder: What was being written, for the message.
    """
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error)
        if error.filename is not None:
            cause += f": {error.filename}"
        remedy = _REMEDIES.get(error.errno or 0, "Check the file system, or use  run.dir=PATH")
        raise SaveError(f"Saving in {folder} failed: {cause}. {_UNTOUCHED} {remedy}.") from error


def write_durably(path: Path, chunks: Iterable[bytes | memoryview], stage: str) -> FileRecord:
    """Do the work of `write_file` for the failpoints `stage`.*, leaving `OSError` as it is."""
    partial = path.with_name(f".{path.name}.partial")
    # New: another writer of the same name is a defect; its half-written file must not be touched.
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(partial, flags, PRIVATE_FILE)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            failpoint(f"{stage}.open")
            size = _copy(chunks, file, f"{stage}.half")
            file.flush()
            file.seek(0)
            record = FileRecord(path.name, size, hashlib.file_digest(file, "sha256").hexdigest())
            failpoint(f"{stage}.pre_fsync")
            os.fsync(file.fileno())
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        partial.rename(path)
        failpoint(f"{stage}.post_rename")
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    return record


def _copy(chunks: Iterable[bytes | memoryview], file: BinaryIO, halfway: str) -> int:
    """Write all chunks; return their size in bytes."""
    size = 0
    for chunk in chunks:
        view = memoryview(chunk)
        if not view.nbytes:
            continue
        view = view.cast("B")
        # Two writes, so that a failure can be placed inside a chunk.
        file.write(view[: view.nbytes // 2])
        failpoint(halfway)
        file.write(view[view.nbytes // 2 :])
        size += view.nbytes
    return size


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; a link, a device or a pipe raises `OSError`."""
    # Without O_NONBLOCK a planted pipe would make the reader wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def regular_size(path: Path) -> int:
    """Return the size in bytes of a regular file; a link, a device or a pipe raises `OSError`."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return found.st_size


def require_space(folder: Path, step: int, needed_bytes: int) -> None:
    """Do nothing if a file system has room for a checkpoint and a tenth more.

    Raises:
        SaveError: It has not.
    """
    free = shutil.disk_usage(folder).free
    if free * 10 < needed_bytes * 11:
        raise SaveError(
            f"{folder} has {_size(free)} free, but saving step {step} needs "
            f"{_size(needed_bytes * 11 // 10)} (its size and a tenth), so it was not begun. "
            f"{_UNTOUCHED} {_FREE_SPACE}."
        )


def require_exactly(folder: Path, files: Sequence[FileRecord]) -> None:
    """Do nothing if a folder holds these regular files at these sizes and nothing else.

    Raises:
        SaveError: It does not.
        OSError: It cannot be listed, or holds something that is not a regular file.
    """
    expected = {record.name: record.bytes for record in files}
    found = {path.name: regular_size(path) for path in folder.iterdir()}
    differing = sorted(dict(found.items() ^ expected.items()))
    if differing:
        raise SaveError(
            f"{folder} does not hold exactly the files that were written "
            f"({', '.join(differing)}), so the step was not committed. {_UNTOUCHED} "
            "Make sure that nothing else writes there."
        )


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> str | None:
    """Delete a folder with all it holds; return what went wrong instead of raising."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        # Another process is deleting the same folder.
        return None
    except OSError as error:
        return f"could not delete {path}: {error.strerror or error}"
    return None


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"
