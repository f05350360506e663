"""The command line as a user meets it: output, errors, exit status."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from interlace.launch.cli import main
from interlace.trainer.config import list_recipes


@pytest.fixture(scope="module")
def run(
    interlace: Callable[..., Any], tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished tiny run with samples."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = interlace(
        "train", *tiny, f"run.dir={folder}", "train.steps=6", "observe.sample_tokens=8"
    )
    assert done.returncode == 0, done.stderr
    assert f"run folder  {folder}" in done.stdout
    assert f"curve       {folder}/loss.png" in done.stdout
    assert f"sample      {folder}/samples.txt" in done.stdout
    return folder


def test_a_run_folder_explains_itself(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {
        "checkpoints",
        "config.toml",
        "ends",
        "environment.json",
        "loss.png",
        "metrics.jsonl",
        "plan.json",
        "report.html",
        "samples.txt",
        "tensorboard",
        "tokenizer.json",
    }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "--- sample 1 ---\ndef " in (run / "samples.txt").read_text(encoding="utf-8")
    assert list((run / "tensorboard").iterdir())
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(
        word in page for word in ("bits per byte", "Configuration", "def ", "data:image/png")
    )
    assert "http" not in page.replace("http-equiv", "")


def test_metrics_have_the_promised_keys(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["tokens"] == 6 * 256
    everywhere = {"loss", "lr", "grad_norm", "tokens_per_second", "mfu", "host_memory_bytes"}
    assert all(
        everywhere | {"step_seconds", "update_seconds"} <= record.keys() for record in records
    )
    assert {"val_loss", "val_bits_per_byte", "val_perplexity"} <= records[-1].keys()


def test_config_of_a_run_is_a_recipe(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(run / "config.toml"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    saved = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    # What a plan says of offloading rests on rates measured a moment ago.
    for document in (plan, saved):
        del document["offload"]
    assert plan.pop("scaling") == []
    assert plan == saved


def test_sampling_is_repeatable_and_greedy_at_zero(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for words in (["--seed", "1"], ["--seed", "1"], ["--temperature", "0"]):
        assert main(["sample", str(run), "--prompt", "def ", "--tokens", "12", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert all(text.startswith("def ") for text in texts)


def test_verify_lists_every_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run), "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [(report["step"], report["problems"]) for report in reports] == [(5, []), (6, [])]


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    assert "quickstart" in json.loads(capsys.readouterr().out)


def test_why_tells_the_history_of_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", "train.steps", "quickstart", "train.steps=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train.steps = 7    Optimizer steps of the whole run."
    assert lines[1] == "  1. default: 300"
    assert lines[-1] == "  3. command line: 7  <- in force"


def test_a_plan_for_ranks_that_do_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart", "--ranks", "3", "parallel.replicas=2"]) == 2
    assert capsys.readouterr().err == (
        "interlace: train.tokens_per_step=2048: its 8 rows of data.sequence_length=256 do not "
        "split "
        "evenly over 3 ranks; type train.tokens_per_step=2304\n"
        "parallel.replicas=2: does not divide the 3 ranks of this run; type one of "
        "parallel.replicas=1, 3\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "--resume", "nowhere"],
            "interlace: --resume nowhere: is not a run folder (there is no nowhere/config.toml); "
            "runs lie under runs/\n",
        ),
        (
            ["train"],
            f"interlace: train needs a recipe ({', '.join(list_recipes())}, or a TOML file) "
            "or --resume RUN\n",
        ),
        (
            ["sample", "nowhere", "--tokens", "0", "--temperature", "-1"],
            "interlace: --tokens 0: must be 1 or more\n--temperature -1.0: must be 0 or more\n",
        ),
        (
            ["verify", "nowhere"],
            "interlace: nowhere: is not a run folder (no config.toml in it); give a folder that "
            "`interlace train` made\n",
        ),
        (
            ["why", "train.stepz", "quickstart"],
            "interlace: train.stepz: there is no such setting; did you mean train.steps?\n",
        ),
        (
            ["export", "nowhere", "--to", "onnx", "x"],
            "interlace: --to onnx: is no known format; the one there is: hf (transformers)\n",
        ),
    ],
)
def test_a_mistake_is_one_message_and_status_two(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err == message


def test_a_plan_for_another_machine_compares_strategies_and_sizes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "lanes.png"
    words = ["plan", "gpt_7b_offload", "--hardware", "4xh100-pcie5", "--sweep", "gpus=1..8"]
    assert main([*words, "--timeline", str(picture), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    found = {forecast["strategy"]: forecast for forecast in plan["offload"]["forecasts"]}
    assert list(found) == ["none", "host", "stride", "optimal"]
    assert found["none"]["shortage"] == "needs 111.8 GiB device, has 75.2"
    assert found["optimal"]["update_seconds"] < found["stride"]["update_seconds"]
    assert found["optimal"]["update_seconds"] < found["host"]["update_seconds"]
    assert plan["memory"]["host"]["total"] == found["optimal"]["host_bytes"] > 2**33
    assert [row["gpus"] for row in plan["scaling"]] == [1, 2, 4, 8]
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--hardware", "4xh100"],
            "interlace: --hardware 4xh100: is neither a known machine (4xa100-pcie4, 4xh100-pcie5, "
            "gh200, h200) nor a JSON file that `interlace profile` wrote; did you mean "
            "4xh100-pcie5?\n",
        ),
        (
            ["--hardware", "h200", "--sweep", "gpus=8"],
            "interlace: --sweep gpus=8: a sweep goes from one number of GPUs to another, such as "
            "--sweep gpus=1..1024\n",
        ),
        (
            ["--hardware", "h200", "--timeline", "lanes.bmp"],
            "interlace: --timeline lanes.bmp: give a file that ends in .png, .svg or .pdf\n",
        ),
    ],
)
def test_a_wrong_plan_is_one_message(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "quickstart", *words]) == 2
    assert capsys.readouterr().err == message


def test_a_machine_is_measured_kept_and_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["profile", "--json", "--output", str(tmp_path / "mine.json")]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["rates"]["cpu_update_bytes_per_second"] > 1e9
    assert measured["rates"]["h2d_bytes_per_second"] > 1e9
    assert 0.5 < measured["rates"]["duplex_efficiency"] <= 1.0
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
    assert main(["profile", "--show", str(tmp_path / "mine.json")]) == 0
    assert "host update bytes/s by threads" in capsys.readouterr().out
    assert main(["plan", "quickstart", "--hardware", str(tmp_path / "mine.json")]) == 0


def test_a_folder_of_something_else_is_not_overwritten(
    capsys: pytest.CaptureFixture[str], tiny: Sequence[str], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("precious", encoding="utf-8")
    assert main(["train", *tiny, f"run.dir={tmp_path}"]) == 2
    assert "the folder exists, is not empty and holds no run" in capsys.readouterr().err


def test_a_second_signal_exits_at_once(interlace: Callable[..., Any]) -> None:
    import subprocess
    import sys

    code = (
        "import os, signal\n"
        "from interlace.trainer.signals import StopRequest\n"
        "with StopRequest(announce=True) as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop.received\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "finishing this step and saving; once more exits at once" in done.stderr
    assert "still here" not in done.stdout
