"""The commit protocol: a checkpoint is whole and visible, or it is invisible.

Under RUN/checkpoints/ lie

    attempts/N              an empty file for every start of the run; the largest is live
    inflight/STEP.ATTEMPT/  a checkpoint being written; never looked at by a reader
    committed/STEP/         a checkpoint: its files and MANIFEST.json; never changed again
    broken/STEP.ATTEMPT/    a committed one that failed its digests and was set aside
    trash/                  on its way out

A save is: `reserve`, then every rank writes its own files with `write_file`, then one rank calls
`publish` with all records. The rename at the end of `publish` is the only instant at which anything
becomes visible; every byte was fsynced before it. The number of the attempt is a fencing token: a
process that was thought dead and wakes up after the run was started again finds a larger number and
may not publish; and since `begin_attempt` moves unfinished folders away with one rename, a rename
that such a process was just about to make finds nothing. Processes killed anywhere leave at worst a
folder in `inflight` or `trash`, which the next attempt removes.

The rename needs one POSIX file system; object stores are not supported.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from interlace.trainer.checkpoint import verify
from interlace.trainer.checkpoint.acknowledgements import acknowledge
from interlace.trainer.checkpoint.failpoints import failpoint
from interlace.trainer.checkpoint.files import (
    PRIVATE_FILE,
    PRIVATE_FOLDER,
    require_exactly,
    require_space,
    saving,
    sync_folder,
    write_durably,
    write_file,
)
from interlace.trainer.checkpoint.manifest import (
    MANIFEST_NAME,
    FileRecord,
    JsonValue,
    Manifest,
    encode_manifest,
    parse_manifest,
)
from interlace.trainer.checkpoint.retention import (
    Retention,
    discard,
    remove_all,
    remove_old,
)
from interlace.trainer.errors import CheckpointError, SaveError

__all__ = [
    "CheckpointStore",
    "FileRecord",
    "Manifest",
    "Retention",
    "Superseded",
    "Usable",
    "write_file",
]

_LOG = logging.getLogger(__name__)
_ATTEMPT_NAME = re.compile(r"[1-9][0-9]{0,17}")
_INFLIGHT_NAME = re.compile(r"[0-9]+\.([1-9][0-9]{0,17})")


class Superseded(CheckpointError):
    """Another start of the run took over; this process must stop and must not save."""


class Usable(NamedTuple):
    """The checkpoint to resume from, as `step, broken = store.newest_usable()`.

    `broken` holds the newer steps that were passed over, newest first. Hand each to
    `CheckpointStore.set_aside` before training reaches it again: a broken step still counts as
    committed, so it could neither be saved again nor make way for newer ones in retention.
    """

    step: int
    broken: tuple[verify.StepReport, ...]


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run. Making one touches nothing.

    Args:
        folder: RUN/checkpoints; `begin_attempt` creates it.
    """

    folder: Path

    def inflight_path(self, step: int, attempt: int) -> Path:
        """Return where the files of an unfinished checkpoint are written; it need not exist."""
        return self.folder / "inflight" / f"{step}.{attempt}"

    def committed_path(self, step: int) -> Path:
        """Return where a committed step lies; it need not exist."""
        return verify.step_folder(self.folder, step)

    def begin_attempt(self) -> int:
        """Take the next attempt number, which fences off every process that holds an older one.

        Called once per start of the run, by one rank; the others are told the number. Also removes
        what older attempts left unfinished; what cannot be removed is logged and left for the next
        time.

        Raises:
            SaveError: The folder cannot be written.
        """
        with saving(self.folder):
            self.folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
            for name in ("attempts", "inflight", "committed", "trash"):
                (self.folder / name).mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
            sync_folder(self.folder.parent)
            sync_folder(self.folder)
            attempt = self._take_number()
            sync_folder(self.folder / "attempts")
            leftovers = [
                path
                for path in (self.folder / "inflight").iterdir()
                if (match := _INFLIGHT_NAME.fullmatch(path.name)) and int(match[1]) < attempt
            ]
        _log_problems(discard(self.folder, leftovers))
        return attempt

    def live_attempt(self) -> int:
        """Return the largest attempt number; 0 before the first start."""
        try:
            names = [path.name for path in (self.folder / "attempts").iterdir()]
        except FileNotFoundError:
            return 0
        return max((int(name) for name in names if _ATTEMPT_NAME.fullmatch(name)), default=0)

    def require_live(self, attempt: int) -> None:
        """Do nothing if `attempt` is the live one.

        Raises:
            Superseded: It is not.
        """
        live = self.live_attempt()
        if attempt != live:
            raise Superseded(
                f"Attempt {attempt} of the run in {self.folder.parent} is not the live one, "
                f"attempt {live} is: the run was started again, and only the newest may save. "
                "Stop this process; nothing it saved before is lost."
            )

    def reserve(self, step: int, attempt: int, needed_bytes: int) -> Path:
        """Create the empty folder into which the files of a new checkpoint are written.

        Args:
            step: Optimizer steps done.
            attempt: The number from `begin_attempt`.
            needed_bytes: Size of all files together.

        Raises:
            CheckpointError: The step is already committed.
            Superseded: The attempt is not the live one.
            SaveError: Less than 1.1 times the needed space is free, or the folder cannot be
                created.
        """
        folder = self.inflight_path(step, attempt)
        with saving(folder):
            self.require_live(attempt)
            self._refuse_committed(step, attempt)
            require_space(self.folder, step, needed_bytes)
            # Left by an earlier save of this attempt that failed and could not be cleaned away.
            _log_problems(remove_all([folder]))
            folder.mkdir(mode=PRIVATE_FOLDER)
            sync_folder(folder.parent)
        return folder

    def publish(
        self, step: int, attempt: int, files: Sequence[FileRecord], payload: Mapping[str, JsonValue]
    ) -> Path:
        """Make a completely written folder a checkpoint.

        When this returns, the checkpoint is visible and survives a power cut. If it raises, the
        step is normally not visible; only when the disk fails in the very last fsync is it visible
        and whole, but not yet known to survive a power cut.

        Args:
            step: As given to `reserve`.
            attempt: As given to `reserve`.
            files: What every `write_file` of every rank returned.
            payload: Anything to keep in the manifest, as JSON without NaN.

        Returns:
            The folder under committed/.

        Raises:
            Superseded: The run was started again in the meantime.
            CheckpointError: The step is already committed, or a file's name is not allowed.
            SaveError: The folder does not hold exactly `files`, or the disk failed.
        """
        source, target = self.inflight_path(step, attempt), self.committed_path(step)
        self.require_live(attempt)
        try:
            with saving(source):
                require_exactly(source, files)
                _write_manifest(source, step, attempt, files, payload)
                sync_folder(source)
                failpoint("publish.pre_rename")
                # As late as possible: this is the check that a process which slept until now fails.
                self.require_live(attempt)
                self._refuse_committed(step, attempt)
                source.rename(target)
                failpoint("publish.post_rename")
                sync_folder(target.parent)
                sync_folder(source.parent)
            acknowledge(step, attempt)
        except SaveError:
            # A newer start takes our folder away: that is not an error of the disk.
            self.require_live(attempt)
            raise
        return target

    def settle(self, step: int, attempt: int) -> bool:
        """Return whether `publish` had made the step visible before it failed, and make sure then
        that it survives a power cut. Otherwise such a step could neither be saved again nor be told
        as saved.

        Raises:
            Superseded: The attempt is not the live one.
            SaveError: The disk still fails.
        """
        self.require_live(attempt)
        try:
            if self.read_manifest(step).attempt != attempt:
                return False
        except CheckpointError:
            return False
        with saving(self.folder):
            sync_folder(self.folder / "committed")
            sync_folder(self.folder / "inflight")
            acknowledge(step, attempt)
        return True

    def abandon(self, step: int, attempt: int) -> None:
        """Remove what a failed save wrote, if anything; a problem is logged, never raised."""
        _log_problems(remove_all([self.inflight_path(step, attempt)]))

    def retain(self, keep_last: int, keep_every_steps: int) -> Retention:
        """Remove the committed steps that need not stay.

        Call it between saves. A process killed in the middle leaves whole checkpoints and something
        in trash/, never a checkpoint with some files missing.

        Args:
            keep_last: The newest so many stay; at least 1.
            keep_every_steps: Multiples of this stay for good; 0 for none.
        """
        retention = remove_old(self.folder, keep_last, keep_every_steps)
        _log_problems(retention.problems)
        return retention

    def set_aside(self, step: int, attempt: int) -> Path:
        """Move a broken committed step out of the way, so that the step can be saved again.

        It goes to broken/STEP.ATTEMPT and is never deleted, since parts of it may be worth
        rescuing.

        Raises:
            Superseded: The attempt is not the live one.
            SaveError: It cannot be moved.
        """
        target = self.folder / "broken" / f"{verify.step_name(step)}.{attempt}"
        self.require_live(attempt)
        with saving(target.parent):
            target.parent.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
            self.committed_path(step).rename(target)
            for folder in (self.folder / "committed", target.parent, self.folder):
                sync_folder(folder)
        return target

    def committed_steps(self) -> list[int]:
        """Return the committed steps in ascending order.

        Raises:
            CheckpointError: The folder exists but cannot be listed.
        """
        return verify.list_steps(self.folder)

    def read_manifest(self, step: int) -> Manifest:
        """Return the manifest of a committed step whose files all have their promised sizes.

        Raises:
            CheckpointError: The step, its manifest or one of its files is missing or not as
                promised.
        """
        return verify.read_manifest(self.folder, step)

    def verified_path(self, step: int, name: str, manifest: Manifest) -> Path:
        """Return the path of one file of a committed step for reading, after checking its digest.

        Args:
            step: The committed step.
            name: The plain name of one of the files.
            manifest: What `read_manifest` returned for this step.

        Raises:
            CheckpointError: The manifest does not name the file, or it is not as promised.
        """
        assert manifest.step == step, f"the manifest of step {manifest.step} used for {step}"
        return verify.verified_path(self.folder, manifest, name)

    def newest_usable(self) -> Usable:
        """Return the newest committed step of which every digest is right. Reads all of it.

        Raises:
            CheckpointError: There is none; every problem of every step is listed.
        """
        broken: list[verify.StepReport] = []
        for step in reversed(self.committed_steps()):
            _, report = verify.check_contents(self.folder, step)
            if not report.problems:
                return Usable(step, tuple(broken))
            broken.append(report)
        raise _none_usable(self.folder, broken)

    def _take_number(self) -> int:
        while True:
            attempt = self.live_attempt() + 1
            try:
                (self.folder / "attempts" / str(attempt)).touch(PRIVATE_FILE, exist_ok=False)
            except FileExistsError:
                # Another start took this number between the two lines.
                continue
            return attempt

    def _refuse_committed(self, step: int, attempt: int) -> None:
        target = self.committed_path(step)
        if os.path.lexists(target):
            # A newer start may have committed it since the last look: then that is the reason.
            self.require_live(attempt)
            run = self.folder.parent
            raise CheckpointError(
                f"{target} is already committed, and a checkpoint is never overwritten. "
                f"Go on from the newest with  interlace train --resume {run}  or take a new run.dir"
            )


def _write_manifest(
    folder: Path,
    step: int,
    attempt: int,
    files: Sequence[FileRecord],
    payload: Mapping[str, JsonValue],
) -> None:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    text = encode_manifest(Manifest(step, attempt, created, tuple(files), payload))
    path = folder / MANIFEST_NAME
    # Nothing that a reader would refuse may be published.
    parse_manifest(text, step, path)
    failpoint("manifest.pre")
    write_durably(path, [text], "manifest")


def _none_usable(folder: Path, broken: Sequence[verify.StepReport]) -> CheckpointError:
    if not broken:
        return CheckpointError(
            f"{folder} holds no committed checkpoint, so there is nothing to resume from. "
            "Start the run without --resume, or name another run folder"
        )
    problems = "\n".join(problem for report in broken for problem in report.problems)
    return CheckpointError(
        f"Every checkpoint in {folder} is broken:\n{problems}\n"
        "Restore one from a copy, or start again with a new run.dir"
    )


def _log_problems(problems: Sequence[str]) -> None:
    for problem in problems:
        _LOG.warning("%s", problem)
