"""Damage to the files of a real run's checkpoint is found before a tensor reaches the model.

The checkpoint is one that two ranks wrote. Unlike the tests of the commit layer, which know nothing
of tensors, these go the way a start of the run goes: `load_newest` into a live state.
"""

import pickle
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_run import bit_flipped, digest_of, state_of

from interlace.trainer.checkpoint import CheckpointStore
from interlace.trainer.checkpoint.state import TrainingState, load_newest
from interlace.trainer.checkpoint.verify import verify_step
from interlace.trainer.errors import CheckpointError

FLIPS = 200


@pytest.fixture(scope="module")
def saved(
    interlace: Callable[..., Any], tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run folder of a run on two ranks with checkpoints of steps 5 and 10."""
    run = tmp_path_factory.mktemp("saved") / "run"
    done = interlace("train", *tiny, "train.steps=10", f"run.dir={run}", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.fixture(scope="module")
def live(tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> TrainingState:
    """A live state with fresh weights, as a start of the run has it before it loads."""
    return state_of(tiny, tmp_path_factory.mktemp("live") / "run")


@pytest.fixture
def store(saved: Path, tmp_path: Path) -> CheckpointStore:
    """A copy of the run's checkpoints of which only the one of step 10 is there."""
    copy = tmp_path / "run" / "checkpoints"
    shutil.copytree(saved / "checkpoints", copy)
    shutil.rmtree(copy / "committed" / "00000005")
    return CheckpointStore(copy)


def shards_of(store: CheckpointStore, step: int = 10) -> list[Path]:
    shards = sorted(store.committed_path(step).glob("*.safetensors"))
    assert len(shards) == 2
    return shards


def refusal(store: CheckpointStore, live: TrainingState) -> str:
    """Load, which must fail and leave the live state as it was; return the message."""
    before = digest_of(live.tensors())
    with pytest.raises(CheckpointError) as caught:
        load_newest(store, live)
    assert digest_of(live.tensors()) == before
    (problem, *_) = verify_step(store.folder, 10).problems
    assert problem in str(caught.value)
    return str(caught.value)


def test_a_sound_checkpoint_changes_the_state(store: CheckpointStore, live: TrainingState) -> None:
    """Without this, a loader that refuses everything would pass the tests below."""
    before = {name: tensor.clone() for name, tensor in live.tensors().items()}
    assert load_newest(store, live).scalars.progress.step == 10
    after = live.tensors()
    assert digest_of(after) != digest_of(before)
    for name, tensor in after.items():
        tensor.detach().copy_(before[name])
    live.adopt(after)
    assert digest_of(live.tensors()) == digest_of(before)


def test_b1_every_one_of_200_flipped_bits_of_the_shards_is_found_and_the_file_named(
    store: CheckpointStore, live: TrainingState
) -> None:
    choice = random.Random(1)
    shards = shards_of(store)
    for _ in range(FLIPS):
        shard = choice.choice(shards)
        with bit_flipped(shard, choice.randrange(8 * shard.stat().st_size)):
            assert f"{shard}: SHA-256 " in refusal(store, live)


def test_b2_every_one_of_200_flipped_bits_of_the_manifest_is_found_and_nothing_unpickled(
    store: CheckpointStore, live: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpickle(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, unpickle)
    manifest = store.committed_path(10) / "MANIFEST.json"
    choice = random.Random(2)
    for _ in range(FLIPS):
        with bit_flipped(manifest, choice.randrange(8 * manifest.stat().st_size)):
            assert str(manifest) in refusal(store, live)


@pytest.mark.parametrize("size", ["0", "1", "half", "size - 1", "size + 1"])
def test_b3_a_shard_of_another_size_is_refused_without_being_read(
    size: str, store: CheckpointStore, live: TrainingState, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shards_of(store)[1]
    whole = shard.read_bytes()
    lengths = {"0": 0, "1": 1, "half": len(whole) // 2, "size - 1": len(whole) - 1}
    length = lengths.get(size, len(whole) + 1)
    shard.write_bytes((whole + b"\0")[:length])
    expected = f"{shard}: {length:,} bytes instead of {len(whole):,}."
    assert expected in refusal(store, live)
    monkeypatch.delattr("hashlib.file_digest")
    with pytest.raises(CheckpointError, match="bytes instead of"):
        load_newest(store, live)


def test_b4_a_shard_that_is_missing_is_named(store: CheckpointStore, live: TrainingState) -> None:
    shard = shards_of(store)[0]
    shard.unlink()
    assert f"{shard}: No such file or directory." in refusal(store, live)


def test_b4_two_shards_that_changed_places_are_refused(
    store: CheckpointStore, live: TrainingState
) -> None:
    """These differ in size; `test_verify.py` has two of equal size."""
    first, second = shards_of(store)
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents)
    message = refusal(store, live)
    assert f"{first}: {first.stat().st_size:,} bytes instead of {len(contents):,}." in message
    assert f"{second}: {len(contents):,} bytes instead of" in message


def test_b4_a_stray_file_is_reported_and_not_loaded(
    store: CheckpointStore, live: TrainingState
) -> None:
    load_newest(store, live)
    sound = digest_of(live.tensors())
    stray = store.committed_path(10) / "rank-00002-of-00002.safetensors"
    shutil.copy(shards_of(store)[0], stray)
    assert verify_step(store.folder, 10).problems == (
        f"{stray}: not named by the manifest, so it is never loaded.",
    )
    load_newest(store, live)
    assert digest_of(live.tensors()) == sound


def test_b5_a_shard_of_step_5_inside_step_10_is_refused(
    saved: Path, store: CheckpointStore, live: TrainingState
) -> None:
    shard = shards_of(store)[1]
    older = saved / "checkpoints" / "committed" / "00000005" / shard.name
    assert older.stat().st_size == shard.stat().st_size, "else the size would tell"
    shutil.copy(older, shard)
    assert f"{shard}: SHA-256 " in refusal(store, live)
