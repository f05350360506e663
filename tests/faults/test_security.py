"""What others on a machine get to see, and what code is never allowed to say."""

import ast
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from interlace.trainer.config import load_recipe
from interlace.trainer.errors import ConfigError
from interlace.trainer.run_folder import open_run_folder

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("kernels", "offload", "trainer", "launch")
PLANTED = {
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlantedPlanted",
    "HUGGING_FACE_HUB_TOKEN": "hf_AlsoPlantedAlsoPlantedAlsoPlanted",
    "AWS_SECRET_ACCESS_KEY": "planted+secret/access+key+of+a+cloud",
    "RAY_AUTH_TOKEN": "planted0ray0token0planted0ray0token0",
    "WANDB_API_KEY": "planted-key-of-another-service-0123456789",
}
BREAKS = """
from interlace.trainer.run import Run


def broken(self: Run, step: int) -> float:
    raise RuntimeError("the third step breaks")


Run.gradient_norm = broken
"""


def entries(folder: Path) -> Iterator[tuple[Path, int]]:
    """Yield everything below a folder, itself too, with its mode."""
    for path in (folder, *folder.rglob("*")):
        yield path, stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.faults
@pytest.mark.parametrize("umask", ["000", "022"])
def test_i6_what_a_run_writes_is_its_user_s_alone(
    umask: str, tiny: Sequence[str], tmp_path: Path
) -> None:
    words = [*tiny, "train.steps=5", f"data.prepared_dir={tmp_path / 'prepared'}"]
    command = [sys.executable, "-m", "interlace.launch.cli", "launch", "torchrun", "--nproc", "2"]
    done = subprocess.run(
        ["bash", "-c", f'umask {umask}; exec "$@"', "-", *command, *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = [*entries(tmp_path / "runs" / "fault-drill-0001"), *entries(tmp_path / "prepared")]
    assert len(seen) > 20
    folders = {mode for path, mode in seen if path.is_dir()}
    files = {(mode, path.name) for path, mode in seen if not path.is_dir() and mode != 0o600}
    assert folders == {0o700}
    assert files == set()


def test_i6_a_run_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = load_recipe("quickstart", [f"run.dir={run}"]).config
    other = os.getuid() + 1
    monkeypatch.setattr("os.getuid", lambda: other)
    with pytest.raises(ConfigError, match=f"belongs to user {run.stat().st_uid}, and this is user"):
        open_run_folder(config)
    assert list(run.iterdir()) == []


def test_i6_a_run_folder_that_every_user_may_write_to_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    run.chmod(0o777)
    config = load_recipe("quickstart", [f"run.dir={run}"]).config
    with pytest.raises(ConfigError, match=f"type  chmod 700 {run}  or another run.dir"):
        open_run_folder(config)
    run.chmod(0o755)
    assert open_run_folder(config).path == run


def test_i8_no_secret_of_the_environment_gets_into_a_run_folder(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    # A run that also fails, since what is written of failures tells most.
    plugin = tmp_path / "breaks.py"
    plugin.write_text(BREAKS, encoding="utf-8")
    words = [*tiny, "train.steps=10", f'model.plugins=["{plugin}"]']
    command = [sys.executable, "-m", "interlace.launch.cli", "launch", "torchrun", "--nproc", "2"]
    done = subprocess.run(
        [*command, "--max-restarts", "0", *words],
        cwd=tmp_path,
        env={**os.environ, **PLANTED, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    run = tmp_path / "runs" / "fault-drill-0001"
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"config.toml", "environment.json", "rank-0.json"}
    told = [(str(path), path.read_bytes()) for path in files]
    told.append(("terminal", (done.stdout + done.stderr).encode()))
    for where, content in told:
        assert [name for name, value in PLANTED.items() if value.encode() in content] == [], where


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("data.source=https://me:word@host/corpus.jsonl", "a password in an address"),
        ("data.source=s3://bucket/x?X-Amz-Signature=0a1b", "a signature or token in an address"),
        ('data.source=[{source = "hub:x", subset = "hf_abcdefghijklmnopqrstuvwx"}]', "a token"),
        ("run.start_from=/models/ghp_abcdefghijklmnopqrstuvwxyz", "a token"),
    ],
)
def test_i8_a_recipe_that_holds_a_secret_is_refused_and_the_secret_not_repeated(
    setting: str, what: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_recipe("quickstart", [setting])
    said = str(refused.value)
    assert f"holds {what}, and the run folder would keep it" in said
    assert not any(secret in said for secret in ("word@", "0a1b", "abcdefghijklmnop"))


def test_i8_an_address_without_a_secret_is_taken() -> None:
    recipe = load_recipe("quickstart", ["data.source=hub:https://host:443/a?version=2#hf_small"])
    assert recipe.config.data.source == "hub:https://host:443/a?version=2#hf_small"


FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "torch.load", "yaml.load"),
    *("yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "joblib.load", "shelve.open"),
    *("tempfile.mktemp", "marshal.loads", "torch.package.PackageImporter"),
}
FORBIDDEN_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_WORDS = {
    ("shell", True),
    ("trust_remote_code", True),
    ("weights_only", False),
    ("allow_pickle", True),
    ("verify", False),
}
ALLOWED: dict[str, str] = {}
"""Findings that may stay, as `file: what`, each with its reason."""


def findings(name: str, text: str) -> Iterator[str]:
    """Yield what a module says that no module may."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS:
                yield f"{name}: {called}"
            for word in node.keywords:
                value = word.value
                if isinstance(value, ast.Constant) and (word.arg, value.value) in FORBIDDEN_WORDS:
                    yield f"{name}: {word.arg}={value.value}"
        elif isinstance(node, ast.Import):
            loaded = {alias.name.split(".")[0] for alias in node.names}
            yield from (f"{name}: {module}" for module in sorted(loaded & FORBIDDEN_MODULES))
        elif isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN_MODULES:
            yield f"{name}: {node.module}"
        elif isinstance(node, ast.Attribute) and node.attr in ("auto_map", "extractall"):
            yield f"{name}: {node.attr}"


def our_files() -> list[Path]:
    return [path for layer in (*LAYERS, "benchmarks") for path in (ROOT / layer).rglob("*.py")]


def test_i9_no_module_says_what_runs_text_or_files_as_code() -> None:
    found = [
        finding
        for path in our_files()
        for finding in findings(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    ]
    assert len(our_files()) > 200
    assert sorted(set(found)) == sorted(ALLOWED)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "requests.get(address, verify=False)",
        "archive.extractall(folder)",
    ],
)
def test_i9_the_gate_sees_each_of_them(line: str) -> None:
    assert len(list(findings("x", line))) == 1


def test_i9_no_template_holds_what_a_shell_would_run_out_of_a_value() -> None:
    folder = ROOT / "launch" / "templates"
    templates = [path for path in folder.iterdir() if path.suffix in (".sh", ".yaml")]
    assert len(templates) == 3
    for path in templates:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\beval\b|curl|wget|\bsudo\b", text), path
        # Quotes around a place would undo the quotes of the value.
        assert not re.search(r"[\"']@\{|@\{[A-Z_]+\}[\"']", text), path
