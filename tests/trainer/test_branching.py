"""Copying a checkpoint into the folder of a branch: whole, checked, the run left alone."""

from pathlib import Path

import pytest

from interlace.trainer.branching import copy_checkpoint
from interlace.trainer.checkpoint.commit import CheckpointStore, write_file
from interlace.trainer.errors import CheckpointError

CONTENTS = {"rank-0.bin": b"first" * 1000, "rank-1.bin": b"second" * 1000}


@pytest.fixture
def source(tmp_path: Path) -> CheckpointStore:
    """The checkpoints of a run: steps 5 and 10."""
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    attempt = store.begin_attempt()
    for step in (5, 10):
        folder = store.reserve(step, attempt, 11_000)
        files = [write_file(folder / name, [text]) for name, text in CONTENTS.items()]
        store.publish(step, attempt, files, {"progress": {"step": step}})
    return store


@pytest.fixture
def target(tmp_path: Path) -> CheckpointStore:
    """Where a branch has its checkpoints."""
    return CheckpointStore(tmp_path / "branch" / "checkpoints")


def test_a_copy_holds_the_same_files_and_scalars(
    source: CheckpointStore, target: CheckpointStore
) -> None:
    copy_checkpoint(source, 5, target)
    assert target.committed_steps() == [5]
    there, here = source.read_manifest(5), target.read_manifest(5)
    assert (here.files, here.payload) == (there.files, there.payload)
    assert target.newest_usable().step == 5
    assert source.live_attempt() == 1


def test_a_step_that_is_not_there_is_named_with_those_that_are(
    source: CheckpointStore, target: CheckpointStore
) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; it holds 5, 10"):
        copy_checkpoint(source, 7, target)
    assert target.committed_steps() == []


def test_a_broken_file_is_not_copied_and_an_older_step_still_can_be(
    source: CheckpointStore, target: CheckpointStore
) -> None:
    path = source.committed_path(10) / "rank-1.bin"
    path.write_bytes(b"sEcond" + path.read_bytes()[6:])
    with pytest.raises(CheckpointError, match=r"rank-1\.bin: is not what its manifest promises"):
        copy_checkpoint(source, 10, target)
    assert target.committed_steps() == []
    assert list((target.folder / "inflight").iterdir()) == []
    copy_checkpoint(source, 5, target)
    assert target.committed_steps() == [5]
