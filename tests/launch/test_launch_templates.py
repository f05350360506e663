"""Jobs for schedulers as text: whole, quoted, and as those who read them want them."""

import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from manifest_schemas import CONFIG_MAP, RAY_JOB, SKYPILOT_TASK

from interlace.launch.cli import main
from interlace.launch.launchers.templates import Job, filled, in_block, job_name
from interlace.trainer.config import load_recipe

IMAGE = ("--image", "registry.example/team/interlace:1.0")


@pytest.fixture
def dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Print a job: `dry("slurm", ...)`."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        assert main(["launch", *words, "--dry-run"]) == 0
        return capsys.readouterr().out

    return run


def valid(document: Any, schema: dict[str, Any]) -> None:
    problems = [error.message for error in Draft202012Validator(schema).iter_errors(document)]
    assert problems == []


def bash_reads(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_slurm_job_has_what_lets_it_come_back(dry: Any, tmp_path: Path) -> None:
    words = ["gpt_1b_offload", "--nodes", "4", "--time", "2-00:00:00", "--partition", "gpu"]
    script = dry("slurm", *words, "--account", "mine", "--notice", "300")
    bash_reads(script)
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line]
    run = tmp_path / "runs" / "gpt_1b_offload-0001"
    assert options == [
        "--job-name=gpt_1b_offload",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--time=2-00:00:00",
        "--exclusive",
        "--mem=0",
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        f"--output={run}-slurm-%j.log",
        "--gpus-per-node=8",
        "--partition=gpu",
        "--account=mine",
    ]
    last = script.rpartition("exec ")[2]
    words = shlex.split(last)
    assert words[1:5] == ["-m", "interlace.launch.launchers.slurm_job", "--run", str(run)]
    assert words[-2:] == ["gpt_1b_offload", f"run.dir={run}"]
    # A dry run takes nothing.
    assert not (tmp_path / "runs").exists()


def test_slurm_options_come_before_the_first_command(dry: Any) -> None:
    lines = dry("slurm", "quickstart", "--partition", "gpu").splitlines()
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


def test_shellcheck_finds_nothing_in_the_script(dry: Any) -> None:
    script = dry("slurm", "quickstart", "--ray", "--nodes", "2")
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "-"],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_words_reach_a_rank_as_they_were_typed(dry: Any) -> None:
    awkward = 'observe.sample_prompts=["it\'s $HOME `id` \\\\ %j @{NAME}"]'
    words = shlex.split(dry("slurm", "quickstart", awkward).rpartition("exec ")[2])
    assert words[-2] == awkward


def test_a_ray_job_of_kubernetes_follows_the_schema_and_holds_the_recipe(dry: Any) -> None:
    text = dry("kubernetes", "quickstart", "train.steps=7", "--nodes", "3", *IMAGE)
    recipe, job = yaml.safe_load_all(text)
    valid(recipe, CONFIG_MAP)
    valid(job, RAY_JOB)
    asked = load_recipe("quickstart", ["train.steps=7"]).config
    assert tomllib.loads(recipe["data"]["recipe.toml"]) == asked.model_dump(exclude_none=True)
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:4] == ["interlace", "launch", "ray", "/recipe/recipe.toml"]
    assert words[4:] == [
        "run.dir=/runs/quickstart",
        "data.prepared_dir=/runs/prepared",
        "--address",
        "auto",
        "--workers",
        "24",
    ]
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    (workers,) = cluster["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert pod["terminationGracePeriodSeconds"] >= 120
    assert workers["replicas"] == 3


def test_without_gpus_none_are_asked_for(dry: Any) -> None:
    text = dry("kubernetes", "quickstart", "--gpus-per-node", "0", *IMAGE)
    assert "nvidia.com" not in text
    assert "--workers 1" in text


def test_a_task_of_skypilot_follows_the_schema_and_its_commands_are_bash(dry: Any) -> None:
    text = dry("skypilot", "quickstart", "--nodes", "2", "--accelerators", "A100:4", *IMAGE)
    task = yaml.safe_load(text)
    valid(task, SKYPILOT_TASK)
    assert task["resources"]["accelerators"] == "A100:4"
    assert task["resources"]["image_id"] == f"docker:{IMAGE[1]}"
    bash_reads(task["run"])


def test_the_commands_of_skypilot_start_this_node_of_the_run(dry: Any, tmp_path: Path) -> None:
    task = yaml.safe_load(dry("skypilot", "quickstart", "train.steps=7", "--nodes", "2", *IMAGE))
    stand_in = tmp_path / "interlace"
    stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["bash", "-euc", task["run"]],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [
        *("launch", "torchrun", "recipe.toml"),
        *("run.dir=/runs/quickstart", "data.prepared_dir=/runs/prepared"),
        *("--nproc", "8", "--nnodes", "2", "--rdzv", "10.0.0.1:29400"),
    ], done.stderr
    asked = load_recipe("quickstart", ["train.steps=7"]).config
    assert load_recipe(str(tmp_path / "recipe.toml")).config == asked


@pytest.mark.parametrize("launcher", ["kubernetes", "skypilot"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "a b"], "--image a b: must be an image, as in REPOSITORY/IMAGE:TAG"),
        ([*IMAGE, "--volume", "x: y"], "--volume x: y: must be lower-case"),
        ([*IMAGE, "--nodes", "0"], "--nodes 0: must be 1 or more"),
    ],
)
def test_values_that_would_break_out_of_their_place_are_refused(
    launcher: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", launcher, "quickstart", *words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_accelerators_are_named_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "skypilot", "quickstart", *IMAGE, "--dry-run", "--accelerators", "H100"]
    assert main(words) == 2
    assert "--accelerators H100: must be NAME:N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("launcher", "program", "words"),
    [
        ("kubernetes", "kubectl", "create -f "),
        ("skypilot", "sky", "jobs launch --yes "),
    ],
)
def test_a_job_is_handed_over_in_a_file_of_ours_that_is_gone_afterwards(
    launcher: str,
    program: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    stand_in = tmp_path / program
    stand_in.write_text(
        '#!/bin/bash\necho "$@"\nfile="${@: -1}"\nstat -c %a "$(dirname "$file")"\ncat "$file"',
        encoding="utf-8",
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert main(["launch", launcher, "quickstart", *IMAGE]) == 0
    said, mode, *text = capfd.readouterr().out.splitlines()
    assert said.startswith(words)
    assert mode == "700"
    assert f"written by `interlace launch {launcher}`" in text[0]
    assert not Path(said.split()[-1]).exists()


def test_every_place_is_filled_and_every_value_used() -> None:
    with pytest.raises(KeyError):
        filled("slurm.sh", {"RUN_NAME": "x"})
    with pytest.raises(AssertionError, match="no place"):
        filled("slurm.sh", {"NOTHING": "x"})
    assert Job("@@{A} $HOME @{A}").substitute(A="1") == "@{A} $HOME 1"
    with pytest.raises(ValueError, match="Invalid placeholder"):
        Job("@A").substitute(A="1")


def test_names_and_blocks_fit_where_they_go() -> None:
    assert job_name("GPT_1b.offload--x") == "gpt-1b-offload-x"
    assert in_block("a\nb\n", 2) == "a\n  b"
