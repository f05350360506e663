"""Whatever happens to a committed checkpoint, `verify` and the read path both see it."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from interlace.trainer.checkpoint import (
    CheckpointStore,
    StepReport,
    verify_run,
    verify_step,
    write_file,
)
from interlace.trainer.errors import CheckpointError

NAMES = ("rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors", "scalars.bin")


def contents(step: int, name: str) -> bytes:
    """Different for every step and name, of equal size for the two ranks."""
    size = 70 if name == "scalars.bin" else 3_000
    return random.Random(f"{step} {name}").randbytes(size)


def save(store: CheckpointStore, step: int) -> Path:
    attempt = store.live_attempt() or store.begin_attempt()
    folder = store.reserve(step, attempt, 10_000)
    files = [write_file(folder / name, [contents(step, name)]) for name in NAMES]
    return store.publish(step, attempt, files, {"tensors": {"weight": [2, 3]}, "loss": 0.25})


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    for step in (10, 15):
        save(store, step)
    return store


def load(store: CheckpointStore, step: int) -> dict[str, bytes]:
    """The read path: the manifest, then every file through its digest."""
    manifest = store.read_manifest(step)
    return {
        record.name: store.verified_path(step, record.name, manifest).read_bytes()
        for record in manifest.files
    }


def load_refusal(store: CheckpointStore, step: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(store, step)
    message, hint = str(caught.value).rsplit("\n", 1)
    assert hint == (
        "Nothing was loaded from it. To see which checkpoints are sound:  "
        f"interlace verify {store.folder.parent}"
    )
    return message


def assert_broken(store: CheckpointStore, step: int, expected: str) -> None:
    """`verify`, the read path and the choice of a checkpoint all see exactly this problem."""
    assert verify_step(store.folder, step).problems == (expected,)
    assert load_refusal(store, step) == expected
    usable, broken = store.newest_usable()
    assert usable == 10
    assert [(report.step, report.problems) for report in broken] == [(step, (expected,))]


def digits(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def test_a_sound_checkpoint_has_no_problems_and_loads(store: CheckpointStore) -> None:
    assert verify_run(store.folder) == [StepReport(10, (), 6_070), StepReport(15, (), 6_070)]
    assert load(store, 15) == {name: contents(15, name) for name in NAMES}
    assert store.newest_usable() == (15, ())


def test_every_one_of_300_single_byte_flips_is_seen(store: CheckpointStore) -> None:
    folder = store.committed_path(15)
    choice = random.Random(0)
    files = sorted(folder.iterdir())
    assert len(files) == 4
    for trial in range(300):
        path = files[trial % len(files)]
        sound = path.read_bytes()
        place = choice.randrange(len(sound))
        flipped = bytearray(sound)
        flipped[place] ^= choice.randrange(1, 256)
        path.write_bytes(flipped)
        where = f"trial {trial}: byte {place} of {path.name}"
        (problem,) = verify_step(store.folder, 15).problems
        assert problem.startswith(f"{path}: "), where
        assert load_refusal(store, 15) == problem, where
        assert store.newest_usable().step == 10, where
        path.write_bytes(sound)
    assert verify_step(store.folder, 15).problems == ()


def test_every_byte_of_the_manifest_counts(store: CheckpointStore) -> None:
    path = store.committed_path(15) / "MANIFEST.json"
    sound = path.read_bytes()
    choice = random.Random(1)
    for place in range(len(sound)):
        flipped = bytearray(sound)
        flipped[place] ^= choice.randrange(1, 256)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            store.read_manifest(15)


def test_a_digest_mismatch_names_both_digests(store: CheckpointStore) -> None:
    path = store.committed_path(15) / NAMES[0]
    changed = contents(15, NAMES[0])[:-1] + b"!"
    path.write_bytes(changed)
    assert_broken(
        store,
        15,
        f"{path}: SHA-256 {digits(changed)} instead of {digits(contents(15, NAMES[0]))}, "
        "so it changed after it was saved.",
    )


@pytest.mark.parametrize("size", [0, 1, 1_500, 2_999, 3_001])
def test_a_file_of_another_size_is_refused_without_reading_it(
    size: int, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.committed_path(15) / NAMES[1]
    path.write_bytes((contents(15, NAMES[1]) + b"x")[:size])
    with monkeypatch.context() as patch:
        patch.delattr("hashlib.file_digest")
        with pytest.raises(CheckpointError, match=r"bytes instead of 3,000\."):
            store.read_manifest(15)
    assert_broken(store, 15, f"{path}: {size:,} bytes instead of 3,000.")


@pytest.mark.parametrize("size", ["0", "1", "half", "size - 1", "size + 1"])
def test_a_manifest_of_another_size_is_refused(size: str, store: CheckpointStore) -> None:
    path = store.committed_path(15) / "MANIFEST.json"
    whole = path.read_bytes()
    length = {"0": 0, "1": 1, "half": len(whole) // 2, "size - 1": len(whole) - 1}
    path.write_bytes((whole + b"\n")[: length.get(size, len(whole) + 1)])
    (problem,) = verify_step(store.folder, 15).problems
    assert problem.startswith(f"{path}: not ")
    assert_broken(store, 15, problem)


@pytest.mark.parametrize("name", ["MANIFEST.json", *NAMES])
def test_a_missing_file_is_named(name: str, store: CheckpointStore) -> None:
    path = store.committed_path(15) / name
    path.unlink()
    assert_broken(store, 15, f"{path}: No such file or directory.")


def test_two_files_that_changed_places_are_recognised(store: CheckpointStore) -> None:
    first, second = (store.committed_path(15) / name for name in NAMES[:2])
    first.write_bytes(contents(15, second.name))
    second.write_bytes(contents(15, first.name))
    expected = (
        f"{first}: SHA-256 {digits(contents(15, second.name))} instead of "
        f"{digits(contents(15, first.name))}, the contents of {second.name}.",
        f"{second}: SHA-256 {digits(contents(15, first.name))} instead of "
        f"{digits(contents(15, second.name))}, the contents of {first.name}.",
    )
    assert verify_step(store.folder, 15).problems == expected
    assert load_refusal(store, 15) == expected[0]


def test_a_file_of_step_10_inside_step_15_is_refused(store: CheckpointStore) -> None:
    path = store.committed_path(15) / NAMES[0]
    path.write_bytes(contents(10, NAMES[0]))
    assert_broken(
        store,
        15,
        f"{path}: SHA-256 {digits(contents(10, NAMES[0]))} instead of "
        f"{digits(contents(15, NAMES[0]))}, so it changed after it was saved.",
    )


def test_the_whole_of_step_10_in_the_folder_of_step_15_is_refused(store: CheckpointStore) -> None:
    for path in store.committed_path(10).iterdir():
        (store.committed_path(15) / path.name).write_bytes(path.read_bytes())
    path = store.committed_path(15) / "MANIFEST.json"
    assert_broken(store, 15, f"{path}: says step 10, but lies in the folder of step 15.")


def test_a_stray_file_is_reported_but_never_loaded(store: CheckpointStore) -> None:
    stray = store.committed_path(15) / "optimizer.pt"
    stray.write_bytes(b"pickle")
    problem = f"{stray}: not named by the manifest, so it is never loaded."
    assert verify_step(store.folder, 15) == StepReport(15, (problem,), 6_070)
    assert set(load(store, 15)) == set(NAMES)
    assert store.newest_usable() == (15, ())
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: not named by the manifest\."):
        store.verified_path(15, "optimizer.pt", store.read_manifest(15))


def replace_by_link(path: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    path.rename(moved)
    path.symlink_to(moved)


def replace_by_pipe(path: Path, tmp_path: Path) -> None:
    del tmp_path
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path, tmp_path: Path) -> None:
    del tmp_path
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("replace", [replace_by_link, replace_by_pipe, replace_by_folder])
@pytest.mark.parametrize("name", ["MANIFEST.json", NAMES[0]])
def test_what_is_not_a_regular_file_is_not_opened(
    name: str, replace: Callable[[Path, Path], None], store: CheckpointStore, tmp_path: Path
) -> None:
    path = store.committed_path(15) / name
    replace(path, tmp_path)
    assert_broken(store, 15, f"{path}: Not a regular file.")


@pytest.mark.parametrize(
    ("replace", "problem"),
    [
        (replace_by_link, "Too many levels of symbolic links"),
        (replace_by_pipe, "Not a regular file"),
    ],
)
def test_what_is_planted_after_the_check_of_the_size_is_not_read(
    replace: Callable[[Path, Path], None],
    problem: str,
    store: CheckpointStore,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = store.committed_path(15) / NAMES[0]
    manifest = store.read_manifest(15)
    open_file = os.open

    def plant_then_open(target: Path, flags: int) -> int:
        if path.is_file() and not path.is_symlink():
            replace(path, tmp_path)
        return open_file(target, flags)

    monkeypatch.setattr("os.open", plant_then_open)
    with pytest.raises(CheckpointError, match=problem):
        store.verified_path(15, NAMES[0], manifest)


def test_a_manifest_cannot_lead_out_of_its_folder(store: CheckpointStore, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "secret").write_bytes(b"secret")
    path = store.committed_path(15) / "MANIFEST.json"
    for name in ("../../secret", str(tmp_path / "run" / "checkpoints" / "secret"), ".."):
        document = json.loads(path.read_bytes())
        del document["self_digest"]
        document["files"][0] = {
            "name": name,
            "bytes": 6,
            "sha256": hashlib.sha256(b"secret").hexdigest(),
        }
        # Signed again, as somebody with write access would.
        text = json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n"
        document["self_digest"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n")
        assert_broken(
            store, 15, f"{path}: file name {name!r} is not a plain name of a-z 0-9 . _ -."
        )


def test_a_huge_manifest_is_refused_without_reading_it(store: CheckpointStore) -> None:
    path = store.committed_path(15) / "MANIFEST.json"
    os.truncate(path, 2**40)
    assert_broken(
        store, 15, f"{path}: 1,099,511,627,776 bytes, more than the 67,108,864 ever read."
    )


def test_only_real_folders_with_exact_names_are_steps(
    store: CheckpointStore, tmp_path: Path
) -> None:
    committed = store.folder / "committed"
    for name in ("00000020.bak", "20", "step-00000020", "0000000020", "00000020 ", "\u0660" * 8):
        (committed / name).mkdir()
    (committed / "00000030").touch()
    (committed / "00000040").symlink_to(committed / "00000010")
    (committed / "100000000").mkdir()
    assert store.committed_steps() == [10, 15, 100_000_000]
    for step in (30, 40):
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            store.read_manifest(step)


def test_a_step_that_is_not_there_lists_those_that_are(store: CheckpointStore) -> None:
    folder = store.committed_path(20)
    expected = f"{folder}: no such checkpoint. Committed steps: 10, 15."
    assert load_refusal(store, 20) == expected
    assert verify_step(store.folder, 20) == StepReport(20, (expected,), 0)


def test_an_empty_store_has_nothing_to_resume_from(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.committed_steps() == []
    with pytest.raises(CheckpointError) as caught:
        store.newest_usable()
    assert str(caught.value) == (
        f"{store.folder} holds no committed checkpoint, so there is nothing to resume from. "
        "Start the run without --resume, or name another run folder"
    )
    with pytest.raises(CheckpointError, match=r"Nothing is committed there\."):
        store.read_manifest(1)
    with pytest.raises(CheckpointError) as caught:
        verify_run(store.folder)
    assert str(caught.value) == (
        f"{store.folder}: no such folder, so there is nothing to verify. "
        "Name a run folder, for example  interlace verify runs/NAME"
    )
    store.begin_attempt()
    assert verify_run(store.folder) == []


def test_when_all_are_broken_every_problem_is_listed(store: CheckpointStore) -> None:
    missing = [store.committed_path(15) / NAMES[2], store.committed_path(10) / "MANIFEST.json"]
    for path in missing:
        path.unlink()
    with pytest.raises(CheckpointError) as caught:
        store.newest_usable()
    assert str(caught.value) == (
        f"Every checkpoint in {store.folder} is broken:\n"
        f"{missing[0]}: No such file or directory.\n"
        f"{missing[1]}: No such file or directory.\n"
        "Restore one from a copy, or start again with a new run.dir"
    )


def test_a_committed_that_is_no_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "committed").touch()
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(tmp_path).committed_steps()
    assert str(caught.value) == (
        f"{tmp_path / 'committed'}: cannot be listed (Not a directory), so no checkpoint can be "
        "found. Check that it is a folder and that you may read it."
    )
