"""A snapshot that is read while updates go on has the bytes of one that nobody disturbed."""

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from offload_cases import Case, open_case

from interlace.kernels.update import clipped_sgd
from interlace.offload.hardware import load_profile
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.offload.schedule import Home
from interlace.offload.subgroup import SubgroupState
from interlace.trainer.checkpoint import ledger, live
from interlace.trainer.checkpoint.ledger import Ledger, Pool
from interlace.trainer.checkpoint.live import Source
from interlace.trainer.checkpoint.saves import Save
from interlace.trainer.checkpoint.snapshot import Snapshot
from interlace.trainer.checkpoint.state import TrainingState
from interlace.trainer.engines.fsdp2 import Fsdp2Engine
from interlace.trainer.world import World

CPU = torch.device("cpu")
PARTS = Case(subgroup_elements=200, groups=2, steps=3)
"""Eight parameters in some subgroups."""

MIXED = (Home.HOST, Home.STAGED, Home.RESIDENT)


class Nothing:
    """An objective that remembers nothing."""

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        assert not tensors


class Training:
    """A toy, its optimizer and how to take a step or a snapshot."""

    def __init__(self, case: Case) -> None:
        self.model, self.optimizer = open_case(case, load_profile("4xh100-pcie5"))
        self.state = TrainingState(self.model, Fsdp2Engine(self.optimizer), Nothing(), World())
        self.steps = 0

    def step(self) -> None:
        self.model(0.5 * self.steps).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def snapshot(self, folder: Path, pool: Pool) -> Snapshot:
        parts = [part for each in self.state.live() if (part := Source.of(each, 0)) is not None]
        return Snapshot(parts, pool, folder / f"step-{self.steps}.safetensors", CPU)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the toy have many chunks."""
    monkeypatch.setattr(live, "SMALL_BYTES", 4)
    monkeypatch.setattr(ledger, "CHUNK_BYTES", 256)
    monkeypatch.setattr(ledger, "LEAST_POOL_BYTES", 0)


@pytest.fixture
def slow_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the writer be slower than any update of the toy."""
    monkeypatch.setattr(ledger, "failpoint", lambda _: time.sleep(0.002))


def undisturbed(case: Case, folder: Path) -> list[str]:
    """Return the digest of the state after every step."""
    training, digests = Training(case), []
    for _ in range(case.steps):
        training.step()
        snapshot = training.snapshot(folder, Pool(0))
        snapshot.wait()
        assert snapshot.written is not None, snapshot.error
        digests.append(snapshot.written[0].sha256)
        snapshot.path.unlink()
    training.optimizer.close()
    return digests


def disturbed(case: Case, folder: Path, pool: Pool) -> list[str | None]:
    """Return the same where each step follows its snapshot at once; None for a failed one."""
    training, digests = Training(case), []
    training.step()
    for _ in range(case.steps):
        snapshot = training.snapshot(folder, pool)
        training.step()
        snapshot.wait()
        digests.append(snapshot.written[0].sha256 if snapshot.written else None)
    training.optimizer.close()
    return digests


CASES = {
    "resident": PARTS,
    "host": replace(PARTS, strategy="host"),
    "stride": replace(PARTS, strategy="stride", stride=2),
    "mixed": replace(PARTS, strategy="host", homes=MIXED),
    "bfloat16": replace(PARTS, strategy="host", homes=MIXED, dtype=torch.bfloat16),
    "split": replace(PARTS, strategy="host", homes=MIXED, dtype=torch.bfloat16, split_master=True),
    "lagged": replace(
        PARTS, strategy="host", homes=MIXED, rule=clipped_sgd(policy="lagged_quantile")
    ),
}


@pytest.mark.parametrize("overlap", ["none", "forward", "backward"])
@pytest.mark.parametrize("name", CASES)
def test_a_snapshot_beside_updates_has_the_bytes_of_a_blocking_one(
    name: str, overlap: str, slow_writer: None, tmp_path: Path
) -> None:
    case = replace(CASES[name], overlap=overlap)
    expected = undisturbed(case, tmp_path)
    # A pool that has room for everything, and one that is soon full.
    roomy = Pool(10**6)
    assert disturbed(case, tmp_path, roomy) == expected
    assert roomy.held_bytes > 0
    for path in tmp_path.iterdir():
        path.unlink()
    assert disturbed(case, tmp_path, Pool(700)) == expected


@pytest.mark.parametrize("name", CASES)
def test_without_the_gate_no_torn_snapshot_is_taken_for_whole(
    name: str, slow_writer: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Ledger, "claim", lambda *_: None)
    assert disturbed(CASES[name], tmp_path, Pool(10**6)) == [None] * 3


@pytest.mark.parametrize("name", CASES)
def test_without_gate_and_versions_snapshots_are_torn(
    name: str, slow_writer: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Ledger, "claim", lambda *_: None)
    monkeypatch.setattr(Source, "intact", True)
    expected = undisturbed(CASES[name], tmp_path)
    found = disturbed(CASES[name], tmp_path, Pool(10**6))
    assert all(one != other for one, other in zip(found, expected, strict=True))


def test_an_update_that_finds_no_room_waits_for_the_writer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    may_write = threading.Event()
    monkeypatch.setattr(ledger, "failpoint", lambda _: may_write.wait(60))
    training = Training(replace(PARTS, strategy="host"))
    training.step()
    snapshot = training.snapshot(tmp_path, Pool(0))
    before = [member.clone() for member in masters(training.optimizer)]
    updating = threading.Thread(target=training.step)
    updating.start()
    updating.join(0.2)
    assert updating.is_alive()
    assert all(map(torch.equal, before, masters(training.optimizer)))
    may_write.set()
    updating.join(60)
    snapshot.wait()
    assert snapshot.written is not None
    assert snapshot.ledger.claiming_seconds > 0.1
    assert snapshot.ledger.copied_bytes == 0
    assert not any(map(torch.equal, before, masters(training.optimizer)))
    training.optimizer.close()


def masters(optimizer: OffloadedOptimizer) -> list[torch.Tensor]:
    return [subgroup.slabs["master"] for subgroup in optimizer.subgroups]


def test_a_save_that_is_given_up_lets_updates_go_on_and_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reached, may_write = threading.Event(), threading.Event()

    def hold(_: str) -> None:
        reached.set()
        may_write.wait(60)

    monkeypatch.setattr(ledger, "failpoint", hold)
    training = Training(replace(PARTS, strategy="host"))
    training.step()
    snapshot = training.snapshot(tmp_path, Pool(0))
    assert reached.wait(60)
    updating = threading.Thread(target=training.step)
    updating.start()
    snapshot.ledger.close()
    updating.join(60)
    assert not updating.is_alive()
    may_write.set()
    snapshot.give_up()
    assert snapshot.written is None
    assert snapshot.error == "this save was given up"
    assert list(tmp_path.iterdir()) == []
    assert all(subgroup.before_change is None for subgroup in training.optimizer.subgroups)
    training.optimizer.close()


def test_a_save_may_end_just_when_an_update_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[SubgroupState] = []
    answers = iter([told.append, None])
    subgroup = Training(PARTS).optimizer.subgroups[0]
    monkeypatch.setattr(
        SubgroupState, "before_change", property(lambda _: next(answers)), raising=False
    )
    subgroup.about_to_change()
    assert told == [subgroup]


def test_a_writer_that_cannot_even_begin_says_so_and_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(_: torch.device) -> torch.cuda.Stream:
        raise RuntimeError("the device has no stream left")

    monkeypatch.setattr(torch.cuda, "Stream", refuse)
    training = Training(PARTS)
    training.step()
    parts = [part for each in training.state.live() if (part := Source.of(each, 0)) is not None]
    snapshot = Snapshot(parts, Pool(0), tmp_path / "file", torch.device("cuda"))
    snapshot.wait()
    assert snapshot.error == "RuntimeError: the device has no stream left"
    assert all(subgroup.before_change is None for subgroup in training.optimizer.subgroups)
    training.optimizer.close()


def test_state_may_move_while_it_is_saved(slow_writer: None, tmp_path: Path) -> None:
    case = replace(PARTS, strategy="host", homes=MIXED)
    expected = undisturbed(replace(case, steps=1), tmp_path)
    training = Training(case)
    training.step()
    snapshot = training.snapshot(tmp_path, Pool(10**6))
    homes = training.optimizer.homes
    training.optimizer.rehome([*homes[1:], homes[0]])
    training.step()
    snapshot.wait()
    assert snapshot.written is not None, snapshot.error
    assert [snapshot.written[0].sha256] == expected
    training.optimizer.close()


def test_somebody_who_writes_weights_without_asking_spoils_the_snapshot(
    slow_writer: None, tmp_path: Path
) -> None:
    training = Training(PARTS)
    training.step()
    snapshot = training.snapshot(tmp_path, Pool(10**6))
    with torch.no_grad():
        for weight in training.model.parameters():
            weight.add_(1.0)
    snapshot.wait()
    assert snapshot.written is None
    assert snapshot.error is not None
    assert "was changed while it was being saved" in snapshot.error
    training.optimizer.close()


def test_a_pool_stays_within_its_budget_and_uses_memory_again() -> None:
    pool = Pool(100)
    first = pool.take(60)
    assert first is not None
    assert pool.take(60) is None
    small = pool.take(40)
    assert small is not None
    pool.give_back(first)
    assert pool.take(60) is first
    pool.give_back(first)
    # Memory of another size makes room.
    other = pool.take(50)
    assert other is not None
    assert pool.held_bytes == 90


def test_a_tenth_of_what_is_saved_may_be_copied_unless_somebody_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free, fixed = Pool(None), Pool(5)
    for pool in (free, fixed):
        pool.provide_for(1000)
    assert (free.budget_bytes, fixed.budget_bytes) == (100, 5)
    monkeypatch.setattr(ledger, "LEAST_POOL_BYTES", 300)
    free.provide_for(1000)
    assert free.budget_bytes == 300
    # Half of what is free is the limit, for those who said nothing.
    monkeypatch.setattr(ledger, "available_host_bytes", lambda: 50)
    for pool in (free, fixed):
        pool.provide_for(1000)
    assert (free.budget_bytes, fixed.budget_bytes) == (25, 5)


def test_of_several_ranks_the_one_that_failed_says_why() -> None:
    class Ranks(World):
        def gather(self, value: object) -> list[object]:
            given_up = (ledger.GIVEN_UP, None)
            return [given_up, ("the disk of rank 1 is full", None), given_up]

    save = Save.__new__(Save)
    save.world, save.random_state = Ranks(rank=0, size=1), None
    save.snapshot = SimpleNamespace(written=None, error=ledger.GIVEN_UP)
    save.target = SimpleNamespace(attempt=1, store=SimpleNamespace(require_live=lambda _: None))
    assert str(save._publish()) == "the disk of rank 1 is full"
