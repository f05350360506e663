"""Checkpoints written beside training by two ranks together."""

from pathlib import Path

import pytest
from ranks import run_on_ranks

BESIDE_AND_STILL = """
import contextlib, io, os
from interlace.trainer.checkpoint import failpoints, snapshot
from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.checkpoint.files import write_file
from interlace.trainer.errors import SaveError
from interlace.trainer.loop import train
from interlace.trainer.world import process_group
from tiny_run import config_of
from conftest import TINY

WORDS = (*TINY, "data.source=DATA", "data.prepared_dir=PREPARED", "train.steps=9",
    "checkpoint.every_steps=2", "checkpoint.keep_last=9", "train.validate_every_steps=0",
    "offload.strategy=host", "offload.overlap=forward")


def stored(run):
    store = CheckpointStore(Path(run) / "checkpoints")
    return {
        step: [(file.name, file.sha256) for file in store.read_manifest(step).files]
        for step in store.committed_steps()
    }


def trained(world, run, *more):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train(config_of(WORDS, Path(run), *more), world)
    return said.getvalue()


from pathlib import Path

failing = iter([False, True])


def fails_once(path, chunks):
    if next(failing, False):
        raise SaveError("the disk of this rank is full")
    return write_file(path, chunks)


with process_group() as world:
    os.environ["INTERLACE_FAILPOINT"] = "snap.chunk@*:delay"
    failpoints.DELAY_SECONDS = 0.001 if world.rank else 0.004
    trained(world, "beside", "checkpoint.copy_budget_gib=0.0")
    del os.environ["INTERLACE_FAILPOINT"]
    trained(world, "still", "checkpoint.asynchronous=false")
    if world.rank:
        snapshot.write_file = fails_once
    said = trained(world, "failing")
    if world.is_main:
        beside, still, rest = map(stored, ("beside", "still", "failing"))
        assert list(beside) == [2, 4, 6, 8, 9], beside
        assert all(len(files) == 2 for files in beside.values())
        assert beside == still
        assert "checkpoint at step 4 failed: the disk of this rank is full" in said, said
        assert rest == {step: files for step, files in still.items() if step != 4}, rest
        assert os.listdir("failing/checkpoints/inflight") == []
        print("AS EXPECTED")
"""


@pytest.mark.faults
def test_c3_two_ranks_save_the_same_bytes_beside_training_and_fail_together(
    root: Path, corpus: tuple[str, str], tmp_path: Path
) -> None:
    source, prepared = (word.partition("=")[2] for word in corpus)
    paths = f"import sys\nsys.path[:0] = [{str(root / 'tests')!r}, {str(root / 'tests/cases')!r}]\n"
    script = BESIDE_AND_STILL.replace("DATA", source).replace("PREPARED", prepared)
    done = run_on_ranks(paths + script, tmp_path)
    assert "AS EXPECTED" in done.stdout, done.stdout + done.stderr
