"""Reading what was committed: which steps there are, what each promises, and whether it keeps the
promise.

A step exists if `committed/` holds a real folder with exactly its name; nothing else is asked, no
file points at "the latest". It can be trusted after its manifest parsed and every file has the
promised size and digest. A file that the manifest does not name is never read: `verify_step`
reports it, loading ignores it.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from interlace.trainer.checkpoint.files import open_regular, regular_size
from interlace.trainer.checkpoint.manifest import (
    MANIFEST_LIMIT_BYTES,
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    parse_manifest,
)
from interlace.trainer.errors import CheckpointError

# Anchored by fullmatch: "00000100.bak" is not step 100.
_STEP_NAME = re.compile(r"[0-9]{8}|[1-9][0-9]{8,17}")


@dataclass(frozen=True)
class StepReport:
    """What `verify` found in one committed step.

    `problems` is empty for a sound checkpoint; each names its file. `bytes` is the size of all
    files that the manifest names (0 if the manifest itself cannot be read).
    """

    step: int
    problems: tuple[str, ...]
    bytes: int


def step_name(step: int) -> str:
    """Return the folder name of a committed step: the number, padded to eight digits."""
    return f"{step:08d}"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return where a committed step lies, whether it exists or not."""
    return checkpoints / "committed" / step_name(step)


def list_steps(checkpoints: Path) -> list[int]:
    """Return the committed steps in ascending order; none if nothing was ever saved there.

    Raises:
        CheckpointError: The folder exists but cannot be listed.
    """
    committed = checkpoints / "committed"
    try:
        with os.scandir(committed) as entries:
            return sorted(
                int(entry.name)
                for entry in entries
                if _STEP_NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            )
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"{committed}: cannot be listed ({error.strerror}), so no checkpoint can be found. "
            "Check that it is a folder and that you may read it."
        ) from error


def read_manifest(checkpoints: Path, step: int) -> Manifest:
    """Return the manifest of a committed step whose files all have their promised sizes.

    Raises:
        CheckpointError: The step, its manifest or one of its files is missing or not as promised;
            every problem found is named, one a line. Digests are not looked at.
    """
    try:
        manifest = _load_manifest(checkpoints, step)
    except CheckpointError as error:
        raise untrusted(checkpoints, [str(error)]) from error
    folder = step_folder(checkpoints, step)
    problems = [text for record in manifest.files if (text := _size_problem(folder, record))]
    if problems:
        raise untrusted(checkpoints, problems)
    return manifest


def verified_path(checkpoints: Path, manifest: Manifest, name: str) -> Path:
    """Return the path of one file of a committed step after checking its digest.

    Raises:
        CheckpointError: The manifest does not name the file, or its contents are not as promised.
    """
    folder = step_folder(checkpoints, manifest.step)
    record = next((record for record in manifest.files if record.name == name), None)
    if record is None:
        raise untrusted(checkpoints, [f"{folder / name}: not named by the manifest."])
    if problem := _digest_problem(folder, record, manifest.files):
        raise untrusted(checkpoints, [problem])
    return folder / name


def untrusted(checkpoints: Path, problems: Sequence[str]) -> CheckpointError:
    """Return the error for a checkpoint that must not be loaded, and where to look next."""
    return CheckpointError(
        "\n".join(problems)
        + "\nNothing was loaded from it. To see which checkpoints are sound:  "
        + f"interlace verify {checkpoints.parent}"
    )


def check_contents(checkpoints: Path, step: int) -> tuple[Manifest | None, StepReport]:
    """Check the manifest and the digest of every file it names; strays are ignored, as loading
    does.

    Returns:
        The manifest, or None where even that is broken, and the report.
    """
    try:
        manifest = _load_manifest(checkpoints, step)
    except CheckpointError as error:
        return None, StepReport(step, (str(error),), 0)
    folder = step_folder(checkpoints, step)
    problems = [
        text
        for record in manifest.files
        if (text := _digest_problem(folder, record, manifest.files))
    ]
    return manifest, StepReport(step, tuple(problems), manifest.total_bytes)


def verify_step(checkpoints: Path, step: int) -> StepReport:
    """Check one committed step completely: manifest, every digest, and files that should not be
    there.

    Args:
        checkpoints: The `checkpoints` folder of a run.
        step: The step; one that was never committed is reported as a problem.
    """
    manifest, report = check_contents(checkpoints, step)
    if manifest is None:
        # Nobody can say which file is a stray.
        return report
    known = {MANIFEST_NAME, *(record.name for record in manifest.files)}
    folder = step_folder(checkpoints, step)
    try:
        strays = sorted(path for path in folder.iterdir() if path.name not in known)
    except OSError as error:
        return StepReport(step, (*report.problems, f"{folder}: {error.strerror}."), report.bytes)
    problems = [f"{path}: not named by the manifest, so it is never loaded." for path in strays]
    return StepReport(step, (*report.problems, *problems), report.bytes)


def verify_run(checkpoints: Path) -> list[StepReport]:
    """Check every committed step of a run, oldest first.

    Args:
        checkpoints: The `checkpoints` folder of a run; an empty list means that nothing was
            committed yet.

    Raises:
        CheckpointError: There is no such folder.
    """
    if not checkpoints.is_dir():
        raise CheckpointError(
            f"{checkpoints}: no such folder, so there is nothing to verify. "
            "Name a run folder, for example  interlace verify runs/NAME"
        )
    return [verify_step(checkpoints, step) for step in list_steps(checkpoints)]


def _load_manifest(checkpoints: Path, step: int) -> Manifest:
    """Return the manifest of a committed step without looking at its files."""
    folder = step_folder(checkpoints, step)
    path = folder / MANIFEST_NAME
    if step not in list_steps(checkpoints):
        raise CheckpointError(f"{folder}: no such checkpoint. {_available(checkpoints)}")
    try:
        size = regular_size(path)
        if size > MANIFEST_LIMIT_BYTES:
            raise CheckpointError(
                f"{path}: {size:,} bytes, more than the {MANIFEST_LIMIT_BYTES:,} ever read."
            )
        with open_regular(path) as file:
            text = file.read(MANIFEST_LIMIT_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}.") from error
    return parse_manifest(text, step, path)


def _size_problem(folder: Path, record: FileRecord) -> str | None:
    path = folder / record.name
    try:
        size = regular_size(path)
    except OSError as error:
        return f"{path}: {error.strerror}."
    if size != record.bytes:
        return f"{path}: {size:,} bytes instead of {record.bytes:,}."
    return None


def _digest_problem(folder: Path, record: FileRecord, files: Sequence[FileRecord]) -> str | None:
    # The size first: a file cut short or swollen is refused without reading it.
    if problem := _size_problem(folder, record):
        return problem
    path = folder / record.name
    try:
        with open_regular(path) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{path}: {error.strerror}."
    if found == record.sha256:
        return None
    twin = next((other.name for other in files if other.sha256 == found), None)
    cause = f"the contents of {twin}" if twin else "so it changed after it was saved"
    return f"{path}: SHA-256 {found[:12]} instead of {record.sha256[:12]}, {cause}."


def _available(checkpoints: Path) -> str:
    steps = list_steps(checkpoints)
    if not steps:
        return "Nothing is committed there."
    return f"Committed steps: {', '.join(map(str, steps))}."
