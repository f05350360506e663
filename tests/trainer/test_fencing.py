"""What a start of a run may still do that a newer one has overtaken: nothing that can be seen."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_run import config_of, train_here

from interlace.trainer.assembly import open_run
from interlace.trainer.checkpoint.commit import CheckpointStore, Superseded
from interlace.trainer.exits import Exit, status_of
from interlace.trainer.heartbeat import Heartbeat
from interlace.trainer.observe.metrics import MetricsWriter, StepRecord, read_metrics
from interlace.trainer.run_folder import RunFolder
from interlace.trainer.world import World


def contents(run: Path) -> dict[str, bytes]:
    """Return what lies in a run folder, but for the numbers of its starts."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and path.parent.name != "attempts"
    }


def overtaken(folder: RunFolder, attempt: int) -> Heartbeat:
    """Let a newer start begin while an older one is being built."""
    assert folder.store.begin_attempt() > attempt
    return Heartbeat()


def test_a_start_that_is_overtaken_while_it_is_built_touches_nothing(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_here(tiny, run, "train.steps=10")
    before = contents(run)
    config = config_of(tiny, run, "train.steps=20", "optimizer.peak_lr=0.001")
    with pytest.raises(Superseded) as raised, open_run(config, World(), None, overtaken):
        pass
    assert status_of(raised.value) == Exit.SUPERSEDED
    assert contents(run) == before


def test_a_start_that_is_overtaken_in_its_steps_leaves_no_pictures(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = config_of(tiny, run)
    with pytest.raises(RuntimeError), open_run(config, World()) as older:
        CheckpointStore(run / "checkpoints").begin_attempt()
        before = contents(run)
        older.console.note("the peers are gone")
        raise RuntimeError("Connection closed by peer")
    after = contents(run)
    assert "loss.png" not in after
    changed = {name for name in after if after[name] != before.get(name)}
    assert not [name for name in changed if not name.startswith("tensorboard/")]


def test_records_of_an_older_start_do_not_reach_those_of_the_newer(tmp_path: Path) -> None:
    older = MetricsWriter(tmp_path, 0)
    older.write(StepRecord(step=1, tokens=10))
    older.write(StepRecord(step=2, tokens=20))
    with MetricsWriter(tmp_path, 1) as newer:
        newer.write(StepRecord(step=2, tokens=20, loss=2.0))
        # The older one wakes up and goes on as if nothing had happened.
        older.write(StepRecord(step=3, tokens=30))
        newer.write(StepRecord(step=3, tokens=30, loss=3.0))
        older.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record.step, record.loss) for record in records] == [(1, None), (2, 2.0), (3, 3.0)]
