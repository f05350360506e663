"""Checkpoints written beside training: never torn, never silently missing, and nothing leaks."""

import gc
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_run import config_of, train_here

from interlace.kernels.update import SGD
from interlace.offload.hardware import load_profile, resident_bytes
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.offload.options import OffloadOptions
from interlace.offload.schedule import Home, MemoryBudget
from interlace.trainer.assembly import open_run
from interlace.trainer.checkpoint import ledger, saves
from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.checkpoint.failpoints import forget_visits
from interlace.trainer.checkpoint.ledger import Ledger, Pool
from interlace.trainer.checkpoint.saves import Save, Target
from interlace.trainer.checkpoint.state import Progress, TrainingState, open_checkpoint
from interlace.trainer.checkpoint.verify import verify_run
from interlace.trainer.engines.fsdp2 import Fsdp2Engine
from interlace.trainer.errors import SaveError, StorageError
from interlace.trainer.loop import finished_steps, train
from interlace.trainer.run import Run
from interlace.trainer.world import World

SCALARS = {"config": {}, "corpus_digest": "", "vocabulary_size": 1, "manifest": {}}
PARTS, ELEMENTS = 12, 40_000
SHORT = ("train.steps=12", "checkpoint.every_steps=3", "checkpoint.keep_last=9")


class Nothing:
    """An objective that remembers nothing."""

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        assert not tensors


class Stamps:
    """Weights and momentum that are stamped with the step by their update, in every home.

    Momentum 1 and gradients of 1: the momentum counts steps, the master sums the counts.
    """

    def __init__(self, overlap: str, folder: Path, pool: Pool) -> None:
        self.model = torch.nn.ParameterList(
            torch.nn.Parameter(torch.zeros(ELEMENTS)) for _ in range(PARTS)
        )
        self.optimizer = OffloadedOptimizer(
            self.model.parameters(),
            SGD(lr=1.0, momentum=1.0),
            strategy="host",
            overlap=overlap,
            budget=MemoryBudget(10**9, 10**9),
            profile=load_profile("4xh100-pcie5"),
            model=self.model if overlap != "none" else None,
            options=OffloadOptions(subgroup_elements=2 * ELEMENTS, cpu_threads=1),
        )
        count = len(self.optimizer.subgroups)
        self.optimizer.rehome([list(Home)[number % 3] for number in range(count)])
        self.state = TrainingState(self.model, Fsdp2Engine(self.optimizer), Nothing(), World())
        store = CheckpointStore(folder / "checkpoints")
        self.target = Target(store, store.begin_attempt(), SCALARS, pool)

    def update(self) -> None:
        for weight in self.model:
            weight.grad = torch.ones(ELEMENTS)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save_every_step(self, steps: int) -> Iterator[int]:
        """Save after every step, each save beside the step that follows; yield committed ones.

        Raises:
            SaveError: A save was spoilt.
        """
        self.update()
        for step in range(1, steps + 1):
            save = Save.begin(self.target, self.state, Progress(step=step))
            self.update()
            save.publish()
            yield step
            self.target.store.retain(1, 0)
        self.optimizer.close()

    def torn(self, step: int) -> list[str]:
        """Return the tensors of a checkpoint that do not bear its stamp everywhere."""
        reader = open_checkpoint(self.target.store, step).reader
        found: list[str] = []
        for name in reader.index:
            expected = float(-step * (step + 1) / 2 if name.startswith("model.") else step)
            if not bool((reader.read_whole(name) == expected).all()):
                found.append(name)
        return found


@pytest.fixture
def slow_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the writer be slower than the updates, and chunks small."""
    monkeypatch.setattr(ledger, "failpoint", lambda _: time.sleep(0.001))
    monkeypatch.setattr(ledger, "CHUNK_BYTES", 64 * 2**10)
    monkeypatch.setattr(ledger, "LEAST_POOL_BYTES", 0)


@pytest.mark.parametrize(
    ("overlap", "saves"), [("none", 20), pytest.param("forward", 200, marks=pytest.mark.faults)]
)
def test_b6_none_of_many_checkpoints_taken_at_every_step_is_torn(
    overlap: str, saves: int, slow_writer: None, tmp_path: Path
) -> None:
    # Room for a tenth: most updates wait, some are copied.
    stamps = Stamps(overlap, tmp_path, Pool(None))
    torn = {step: found for step in stamps.save_every_step(saves) if (found := stamps.torn(step))}
    assert torn == {}
    assert 0 < stamps.target.pool.held_bytes <= stamps.target.pool.budget_bytes


def test_b7_without_the_gate_the_first_torn_checkpoint_is_noticed_and_not_committed(
    slow_writer: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Ledger, "claim", lambda *_: None)
    stamps = Stamps("none", tmp_path, Pool(None))
    with pytest.raises(SaveError, match="was changed while it was being saved"):
        list(stamps.save_every_step(3))
    assert stamps.target.store.committed_steps() == []
    stamps.optimizer.close()


def test_b7_without_gate_and_versions_the_stamps_show_that_every_checkpoint_is_torn(
    slow_writer: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Ledger, "claim", lambda *_: None)
    monkeypatch.setattr("interlace.trainer.checkpoint.live.Source.intact", True)
    stamps = Stamps("none", tmp_path, Pool(None))
    assert all(stamps.torn(step) for step in stamps.save_every_step(3))


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def running(words: Sequence[str], folder: Path, *more: str) -> Iterator[Run]:
    """Open a run in this process."""
    with open_run(config_of(words, folder / "run", *more), World()) as run:
        yield run


def test_c1_a_full_storage_fails_the_save_spares_the_run_and_stops_it_the_second_time(
    tiny: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    quick = ("checkpoint.tries=2", "checkpoint.retry_seconds=0.01", "train.validate_every_steps=0")
    with limited_files(2**30), running(tiny, tmp_path, *SHORT, *quick) as run:
        stepping = finished_steps(run)
        for step in stepping:
            if step == 4:
                # That of step 3 is committed; files of a checkpoint do not fit any more.
                assert store.committed_steps() == [3]
                hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
            if step == 5:
                assert run.saving.under_way is not None
                run.saving.under_way.snapshot.wait()
            if step == 7:
                told = capsys.readouterr().out
                assert "checkpoint at step 6 failed: Saving in" in told
                assert "File too large" in told
                assert list((store.folder / "inflight").iterdir()) == []
                break
        with pytest.raises(StorageError, match="File too large"):
            for _ in stepping:
                assert run.progress.step < 11, "the save of step 9 has failed by now"
    assert store.committed_steps() == [3]
    assert [report.problems for report in verify_run(store.folder)] == [()]


def test_c2_a_save_without_room_is_refused_before_the_snapshot(
    tiny: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun: list[object] = []
    snapshot = saves.Snapshot
    monkeypatch.setattr(saves, "Snapshot", lambda *given: begun.append(1) or snapshot(*given))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with running(tiny, tmp_path, *SHORT) as run:
        for step in finished_steps(run):
            if step == 1:
                monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
            if step == 2:
                assert begun == []
                assert "(its size and a tenth), so it was not begun" in capsys.readouterr().out
                break


def test_c3_a_failure_in_the_background_surfaces_at_the_next_step_and_at_the_end(
    tiny: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("INTERLACE_FAILPOINT", "persist.half@*:enospc")
    more = ("train.steps=4", "checkpoint.tries=1", "checkpoint.retry_seconds=0.01")
    with (
        pytest.raises(StorageError, match="No space left on device"),
        running(tiny, tmp_path, *SHORT, *more) as run,
    ):
        for step in finished_steps(run):
            if step == 2:
                assert run.saving.under_way is not None
                run.saving.under_way.snapshot.wait()
                assert "failed" not in capsys.readouterr().out
            if step == 3:
                assert "checkpoint at step 3 failed" in capsys.readouterr().out
        run.conclude()
    forget_visits()
    assert CheckpointStore(tmp_path / "run" / "checkpoints").committed_steps() == []


def test_c3_what_another_rank_could_not_write_is_given_up_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamps = Stamps("none", tmp_path, Pool(None))
    stamps.update()
    save = Save.begin(stamps.target, stamps.state, Progress(step=1))

    def both(_: World, own: tuple[object, object]) -> list[tuple[object, object]]:
        return [own, ("the disk of rank 1 is full", own[1])]

    monkeypatch.setattr(World, "gather", both)
    with pytest.raises(SaveError, match="the disk of rank 1 is full"):
        save.publish()
    store = stamps.target.store
    assert store.committed_steps() == []
    assert list((store.folder / "inflight").iterdir()) == []
    stamps.optimizer.close()


def held() -> tuple[int, int, int]:
    """Return how many descriptors, threads and children this process has."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), len(children)


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.faults)])
def test_c7_saves_leave_no_descriptor_thread_child_or_memory_behind(
    count: int, tmp_path: Path
) -> None:
    stamps = Stamps("none", tmp_path, Pool(None))
    saving = stamps.save_every_step(count)
    for _ in range(10):
        next(saving)
    gc.collect()
    before, bytes_before = held(), resident_bytes()
    for _ in range(count - 11):
        next(saving)
    gc.collect()
    # Less, where an earlier test left something to be collected.
    assert all(now <= then for now, then in zip(held(), before, strict=True))
    # Two per cent, or what an allocator keeps for itself.
    assert resident_bytes() - bytes_before < max(0.02 * bytes_before, 8 * 2**20)
    list(saving)


def test_e8_a_second_start_goes_on_from_what_a_stopped_one_saved_in_time(
    tiny: Sequence[str], losses_of: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    with running(tiny, tmp_path, *SHORT) as run:
        for step in finished_steps(run):
            if step == 6:
                # While the save of step 6 may still be under way.
                run.stop.ask("the cluster takes this machine back", 600.0)
            if run.stop_requested:
                break
        run.conclude()
    assert CheckpointStore(tmp_path / "run" / "checkpoints").committed_steps()[-1] == 8
    train_here(tiny, tmp_path / "run", *SHORT)
    train(config_of(tiny, tmp_path / "straight", *SHORT), World())
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "straight")
