"""`interlace conform`: a block of one's own is found, tested like ours, and told what is wrong."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from interlace.launch.cli import main
from interlace.launch.conform_page import conform_page
from interlace.trainer.conformance import Outcome, Report, Result

Interlace = Callable[..., subprocess.CompletedProcess[str]]
CASE = Path(__file__).resolve().parents[1] / "cases" / "token_shift.py"


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A plug-in file in a folder of its own."""
    path = tmp_path / "token_shift.py"
    path.write_text(CASE.read_text(encoding="utf-8"), encoding="utf-8")
    return path


def complaint(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command that fails says."""
    assert main(words) == 2
    return capsys.readouterr().err.removeprefix("interlace: ").strip()


def test_a_plug_in_is_found_from_a_recipe_beside_it(plugin: Path, interlace: Interlace) -> None:
    recipe = plugin.with_name("mine.toml")
    recipe.write_text('extends = "quickstart"\n[model]\nplugins = ["token_shift.py"]\n', "utf-8")
    done = interlace("conform", "mixer", "token_shift", "--recipe", str(recipe), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    [report] = json.loads(done.stdout)
    assert (report["letter"], report["name"], report["conforms"]) == ("S", "token_shift", True)
    verdicts = {each["check"]: each["verdict"] for each in report["checks"]}
    assert verdicts.pop("row blocks") == "does not apply"
    assert {*verdicts.values()} == {"passed"}


def test_a_plug_in_that_breaks_its_promise_fails_with_what_to_look_at(
    plugin: Path, interlace: Interlace
) -> None:
    text = plugin.read_text(encoding="utf-8")
    plugin.write_text(text.replace("Flops(2 *", "Flops(3 *"), encoding="utf-8")
    words = ("conform", "mixer", "S", "model.width=16", "--plugin", str(plugin))
    done = interlace(*words, "model.heads=2")
    assert done.returncode == 2
    assert "Mixer S, token_shift, at width=16 heads=2" in done.stdout
    assert "FAILED  FLOPs" in done.stdout
    assert "512 forward and 1,024 backward per token, of 768 and 1,024" in done.stdout
    assert (
        "look at              flops_per_token(config, 64) counts 2 per multiply-add" in done.stdout
    )
    assert done.stdout.splitlines()[-1] == "21 checks passed, 1 failed, 1 does not apply"
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


def test_all_mixers_are_tested_on_demand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tested: list[str] = []

    def stand_in(letter: str, shape: object) -> Report:
        tested.append(letter)
        return Report(letter, "name", ())

    monkeypatch.setattr("interlace.launch.conform_page.conform", stand_in)
    assert main(["conform", "mixer", "--all", "model.width=64"]) == 0
    assert {"A", "E", "F", "M"} <= set(tested)
    assert "Mixer A, name, at width=64" in capsys.readouterr().out


def test_a_check_that_does_not_apply_says_why() -> None:
    outcome = Outcome("does not apply", advice="it is declared not causal")
    page = conform_page([Report("X", "name", (Result("causality", "", outcome),))], {})
    assert "-       causality            does not apply: it is declared not causal" in page
    assert page.splitlines()[-1] == "0 checks passed, 0 failed, 1 does not apply"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "conform mixer: give one NAME or --all; known mixers: attention (A), moe (E)"),
        (["A", "--all"], "conform mixer: give one NAME or --all; known mixers: attention (A)"),
        (["retnet"], "mixer retnet: there is no such mixer; known: attention (A), moe (E)"),
        (["A", "train.steps=3"], "train.steps: a mixer is tried on random numbers and sees model"),
        (["A", "model.width=30"], "model.width=30: does not split into model.heads=4 heads"),
        (["A", "--plugin", "none.py"], "--plugin none.py: there is no such file; give the path"),
    ],
    ids=str,
)
def test_what_cannot_be_tested_is_refused_in_words(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint(["conform", "mixer", *words], capsys).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("def broken(:\n", "SyntaxError: invalid syntax"),
        (
            "from interlace.trainer.models.registry import channel_mixer\n"
            "@channel_mixer('A', 'mine')\nclass Mine: ...\n",
            "ValueError: mixer letter A: already means attention; choose another for mine",
        ),
    ],
    ids=["import", "syntax", "letter"],
)
def test_a_broken_plug_in_says_what_and_where(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    said = complaint(["conform", "mixer", "mine", "--plugin", str(path)], capsys)
    assert said.startswith(f"model.plugins={path}: cannot be imported: {message}")
    assert f"{path.name}, line {2 if 'Mine' in text else 1})" in said.replace("\n", " ")
