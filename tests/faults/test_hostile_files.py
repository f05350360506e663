"""Files that somebody prepared: checkpoints with digests that fit, and recipes, which run nothing.

Digests find damage. Whoever can write a run folder can also sign what is in it, so every test here
signs its forgery: what refuses it is not a digest.
"""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import digest_of, sign, state_of, train_here

from interlace.trainer.checkpoint import CheckpointStore, verify_step, write_file
from interlace.trainer.checkpoint.state import TrainingState, load_newest, read_weights
from interlace.trainer.config import load_recipe
from interlace.trainer.data.prepare import list_inputs
from interlace.trainer.errors import CheckpointError, ConfigError, DataError
from interlace.trainer.model_folder import read_recipe
from interlace.trainer.run_folder import read_config

MIB = 2**20


@pytest.fixture(scope="module")
def saved(tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run with a checkpoint of step 5."""
    run = tmp_path_factory.mktemp("saved") / "run"
    train_here(tiny, run, "train.steps=5")
    return run


@pytest.fixture(scope="module")
def live(tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> TrainingState:
    """A live state with fresh weights."""
    return state_of(tiny, tmp_path_factory.mktemp("live") / "run")


@pytest.fixture
def store(saved: Path, tmp_path: Path) -> CheckpointStore:
    """A copy of the run's checkpoints."""
    shutil.copytree(saved / "checkpoints", tmp_path / "run" / "checkpoints")
    return CheckpointStore(tmp_path / "run" / "checkpoints")


def manifest_of(store: CheckpointStore) -> tuple[Path, dict[str, Any]]:
    path = store.committed_path(5) / "MANIFEST.json"
    return path, json.loads(path.read_bytes())


def shard_of(store: CheckpointStore) -> Path:
    [shard] = store.committed_path(5).glob("*.safetensors")
    return shard


def forge_shard(store: CheckpointStore, chunks: Sequence[bytes]) -> Path:
    """Put other contents in place of the shard and sign them."""
    shard, (path, document) = shard_of(store), manifest_of(store)
    shard.unlink()
    record = write_file(shard, chunks)
    document["files"] = [{"name": record.name, "bytes": record.bytes, "sha256": record.sha256}]
    sign(path, document)
    assert verify_step(store.folder, 5).problems == (), "the forgery is signed badly"
    return shard


def refusals(store: CheckpointStore, live: TrainingState) -> str:
    """Load for training and for sampling, both of which must fail; return what was said."""
    before = digest_of(live.tensors())
    with pytest.raises(CheckpointError) as caught:
        load_newest(store, live)
    assert digest_of(live.tensors()) == before
    with pytest.raises(CheckpointError):
        read_weights(store)
    return str(caught.value)


def header_of(shard: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file and all bytes behind it."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: object, rest: bytes) -> list[bytes]:
    text = json.dumps(header, separators=(",", ":")).encode()
    return [len(text).to_bytes(8, "little"), text, rest]


class Sentinel:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_i1_planted_pickles_are_never_opened_and_nothing_is_unpickled(
    store: CheckpointStore,
    live: TrainingState,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sentinel = tmp_path / "ran"
    for name in (".metadata", "model.pt", "rank-00000-of-00001.pt", "__0_0.distcp"):
        for folder in (store.committed_path(5), store.folder, store.folder.parent):
            (folder / name).write_bytes(pickle.dumps(Sentinel(sentinel)))
    opened: list[str] = []
    sys.addaudithook(lambda event, values: note_opening(opened, event, values))

    def unpickle(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    with monkeypatch.context() as patch:
        for name in ("load", "loads", "Unpickler", "_Unpickler"):
            patch.setattr(pickle, name, unpickle)
        patch.setattr(torch, "load", unpickle)
        assert load_newest(store, live).scalars.progress.step == 5
        assert read_weights(store)[0]
        strays = verify_step(store.folder, 5).problems
    assert len(strays) == 4
    assert not sentinel.exists()
    assert any(path.endswith("MANIFEST.json") for path in opened), "the hook sees nothing"
    assert [path for path in opened if Path(path).suffix in {".pt", ".distcp", ".metadata"}] == []
    # The plant works: this is what would have happened.
    pickle.loads((store.folder / "model.pt").read_bytes())  # noqa: S301
    assert sentinel.exists()


def note_opening(opened: list[str], event: str, values: tuple[object, ...]) -> None:
    if event == "open" and isinstance(values[0], (str, Path)):
        opened.append(str(values[0]))


def test_i1_a_pickle_under_the_name_of_a_shard_is_refused(
    store: CheckpointStore, live: TrainingState, tmp_path: Path
) -> None:
    sentinel = tmp_path / "ran"
    shard = forge_shard(store, [pickle.dumps(Sentinel(sentinel))])
    assert f"{shard}: its header " in refusals(store, live)
    assert not sentinel.exists()


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "case", "device", "long", "twice"])
def test_i2_a_manifest_leads_nowhere_but_to_plain_files_beside_it(
    kind: str, store: CheckpointStore, live: TrainingState, tmp_path: Path
) -> None:
    shard, (path, document) = shard_of(store), manifest_of(store)
    elsewhere = tmp_path / "elsewhere.safetensors"
    shutil.copy(shard, elsewhere)
    [record] = document["files"]
    name = {
        "parent": f"../../../../{elsewhere.name}",
        "absolute": str(elsewhere),
        "case": shard.name.upper(),
        "device": "/dev/zero",
        "long": "a" * 4096,
    }.get(kind, shard.name)
    assert kind != "parent" or (store.committed_path(5) / name).exists()
    if kind == "link":
        shard.unlink()
        shard.symlink_to(elsewhere)
    document["files"] = [{**record, "name": name}] * (2 if kind == "twice" else 1)
    for entry in document["payload"]["tensors"].values():
        for part in entry["slices"]:
            part["file"] = name
    sign(path, document)
    expected = {"link": f"{shard}: Not a regular file", "twice": "names a file twice"}
    assert expected.get(kind, f"file name {name!r} is not a plain name") in refusals(store, live)


def test_i2_a_device_under_the_name_of_a_shard_is_not_read(
    store: CheckpointStore, live: TrainingState
) -> None:
    shard = shard_of(store)
    shard.unlink()
    try:
        os.mknod(shard, 0o20600, os.makedev(1, 5))
    except PermissionError:
        os.mkfifo(shard)
    assert f"{shard}: Not a regular file" in refusals(store, live)


def bomb_of(kind: str, shard: Path) -> list[bytes]:
    header, rest = header_of(shard)
    first, second = sorted(header)[:2]
    match kind:
        case "length 2^63":
            return [(2**63).to_bytes(8, "little"), b"{}", rest]
        case "length of the file":
            return [(shard.stat().st_size).to_bytes(8, "little"), *with_header(header, rest)[1:]]
        case "million tensors":
            empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            return with_header({f"t{number}": empty for number in range(10**6)}, b"")
        case "overlap":
            header[second]["data_offsets"] = header[first]["data_offsets"]
        case "gap":
            header[second]["data_offsets"][0] += 4
            header[second]["data_offsets"][1] += 4
        case "beyond the end":
            header[second]["data_offsets"][1] = 2**62
        case "other shape":
            header[second]["shape"] = [2**40, 2**20]
        case "other dtype":
            header[second]["dtype"] = "BOOL"
        case "a tensor less":
            del header[second]
        case "a tensor more":
            header["stranger"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        case "nested":
            text = b"[" * 5000 + b"]" * 5000
            return [len(text).to_bytes(8, "little"), text, rest]
        case "bytes left over":
            rest += b"\0" * 64
        case _:
            raise AssertionError(kind)
    return with_header(header, rest)


BOMBS = (
    "length 2^63",
    "length of the file",
    "million tensors",
    "overlap",
    "gap",
    "beyond the end",
    "other shape",
    "other dtype",
    "a tensor less",
    "a tensor more",
    "nested",
    "bytes left over",
)


@pytest.mark.parametrize("kind", BOMBS)
def test_i3_a_shard_with_a_forged_header_is_refused_before_it_costs_memory(
    kind: str, store: CheckpointStore, live: TrainingState
) -> None:
    shard = forge_shard(store, bomb_of(kind, shard_of(store)))
    # Begins a new measurement of the peak, which making the forgery has raised.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = peak_bytes()
    assert f"{shard}: its header " in refusals(store, live)
    assert peak_bytes() - before < 50 * MIB


def peak_bytes() -> int:
    """Return the most memory this process has occupied since the measurement began."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("the kernel does not tell")


HOSTILE_RECIPES = {
    "brackets nested by the thousand": "[data]\nsource = " + "[" * 100_000 + "]" * 100_000,
    "tables nested by the thousand": "[model]\nwidth = " + "{a=" * 50_000 + "1" + "}" * 50_000,
    "brackets that the parser just bears": "[data]\nsource = " + "[" * 300 + "]" * 300,
    "a dotted key of a hundred thousand parts": "[model]\n" + ".".join(["a"] * 100_000) + " = 1",
    "a dotted table of a hundred thousand parts": "[" + ".".join(["a"] * 100_000) + "]",
    "a dotted key that the parser just bears": "[model]\n" + ".".join(["a"] * 500) + " = 1",
    "a number of five thousand digits": "[train]\nsteps = " + "9" * 5000,
    "a number of four thousand digits": "[train]\nsteps = " + "9" * 4000,
    "more than any recipe": "# " + "x" * 2**21,
    "something to be called": '[model]\n_target_ = "os.mkdir"\n_args_ = ["SENTINEL"]',
    "something to be called, as a section": '["_target_"]\nname = "os.mkdir"',
    "a tag of YAML": '[train]\nsteps = "!!python/object/apply:os.mkdir [SENTINEL]"',
    "an interpolation": '[train]\nsteps = "${oc.env:HOME}"',
    "a file of devices to extend": 'extends = "/dev/zero"',
    "a file that is no recipe to extend": 'extends = "/etc/passwd"',
    "an address to extend": 'extends = "http://127.0.0.1:9/recipe.toml"',
    "a class as objective": '[train]\nobjective = "os.system"',
    "a class as kind of source": '[data]\nsource = "os.system:mkdir SENTINEL"',
    "a section that is a number": "model = 5",
    "bytes that are not UTF-8": "[train]\nsteps = 1 # \udcff",
}


@pytest.mark.parametrize("kind", HOSTILE_RECIPES)
def test_i7_a_hostile_recipe_is_refused_in_words_and_nothing_is_run(
    kind: str, tmp_path: Path
) -> None:
    sentinel = tmp_path / "ran"
    text = HOSTILE_RECIPES[kind].replace("SENTINEL", str(sentinel))
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    modules = set(sys.modules)
    with pytest.raises((ConfigError, DataError)) as caught:
        config = load_recipe(str(recipe)).config
        # What a kind of source is, is known when the source is looked for.
        list_inputs(config.data)
    assert len(str(caught.value)) < 2000
    assert not sentinel.exists()
    loaded = {name.partition(".")[0] for name in set(sys.modules) - modules}
    assert loaded <= {"interlace", "importlib"}


@pytest.mark.parametrize("kind", ["brackets nested by the thousand", "a section that is a number"])
def test_i7_a_hostile_recipe_in_a_run_or_model_folder_is_refused(kind: str, tmp_path: Path) -> None:
    for name in ("config.toml", "recipe.toml"):
        (tmp_path / name).write_text(HOSTILE_RECIPES[kind], encoding="utf-8")
    with pytest.raises((CheckpointError, ConfigError)):
        read_config(tmp_path, plugins=["plugin.py"])
    with pytest.raises((CheckpointError, ConfigError)):
        read_recipe(tmp_path)


def test_i7_only_plugins_that_a_recipe_names_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the one door through which a recipe brings code; see docs/plugins.md."""
    # Else workers of tests after this one would be given them too.
    monkeypatch.setattr("interlace.trainer.registry.LOADED", [])
    sentinel = tmp_path / "ran"
    for name in ("named", "beside"):
        text = f"from pathlib import Path\nPath({str(sentinel)!r} + '-{name}').mkdir()\n"
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[model]\nplugins = ["named.py"]\n', encoding="utf-8")
    load_recipe(str(recipe))
    assert Path(f"{sentinel}-named").exists()
    assert not Path(f"{sentinel}-beside").exists()
