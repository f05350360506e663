"""One file of a user's own brings a mixer, a depth plan, an objective, a kind of source, a rule and
a diagnostic, and a recipe trains with all of them.
"""

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from interlace.trainer.config.schema import SourceSection
from interlace.trainer.data.sources.base import spec_of
from interlace.trainer.errors import DataError

Interlace = Callable[..., subprocess.CompletedProcess[str]]

MIXER = Path(__file__).resolve().parents[1] / "cases" / "token_shift.py"

OTHERS = '''
from dataclasses import dataclass as frozen_dataclass

from interlace.kernels.update import SGD
from interlace.trainer.data.sources.base import Document, Unit, source_kind
from interlace.trainer.diagnostics import diagnostic
from interlace.trainer.models.depth import depth_plan
from interlace.trainer.objectives import Loss, objective
from interlace.trainer.objectives.next_token import NextToken
from interlace.trainer.rules import update_rule


@depth_plan("sandwich")
def sandwich(config):
    """One attention layer between token shifts."""
    return ("SF", "AF", "SF")


@objective("flattened")
class Flattened(NextToken):
    """Likelihood, and its square for the log."""

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        return Loss(loss.objective, loss.mean_nll, details={"squared": loss.mean_nll.square()})


@source_kind("counting")
class Counting:
    """Numbers up to a limit, a hundred a document."""

    def identity(self, spec):
        return [spec.location]

    def units(self, spec):
        # So large that several processes share the work.
        return [Unit(str(number), 2**17, "") for number in range(0, int(spec.location), 100)]

    def read(self, spec, units):
        for unit in units:
            start = int(unit.location)
            yield Document(" ".join(map(str, range(start, start + 100))), unit.location)


@frozen_dataclass(frozen=True)
class SignSGD(SGD):
    """Sign of the gradient, with momentum; it has no kernels."""

    name = "signs"

    def plain(self, weight, gradient, moments, number, hyper):
        (buffer,) = moments
        buffer.mul_(hyper["momentum"]).add_(gradient, alpha=1.0 - hyper["momentum"])
        weight.mul_(1.0 - hyper["lr"] * hyper["weight_decay"]).sub_(hyper["lr"] * buffer.sign())


@update_rule("signs")
def signs(settings):
    return SignSGD(settings.peak_lr, settings.beta1, settings.weight_decay)


@diagnostic("largest_weight")
class LargestWeight:
    """The largest weight of the embedding."""

    def __init__(self, config, state):
        self.weight = state.model.embedding.weight

    def after_backward(self, step):
        return {"largest_weight": float(self.weight.detach().abs().max())}
'''

RECIPE = """
extends = "fault-drill"
[model]
plugins = ["mine.py"]
depth_plan = "sandwich"
[data]
source = "counting:20000"
workers = 2
[train]
objective = "flattened"
[optimizer]
rule = "signs"
peak_lr = 0.003
[observe]
diagnostics = ["largest_weight", "gradient_norms"]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe beside the plug-in that it names."""
    text = MIXER.read_text(encoding="utf-8") + OTHERS
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    (tmp_path / "mine.toml").write_text(RECIPE, encoding="utf-8")
    return tmp_path / "mine.toml"


def test_one_file_registers_every_kind_of_part_and_a_recipe_trains_with_all(
    recipe: Path, interlace: Interlace, tiny: Sequence[str], tmp_path: Path
) -> None:
    own = ("data.source", "data.prepared_dir")
    words = [word for word in tiny[1:] if not word.startswith(own)]
    words += [f"data.prepared_dir={tmp_path}", f"run.dir={tmp_path / 'run'}", "train.steps=30"]
    done = interlace("train", str(recipe), *words, "offload.strategy=host", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == 30
    assert found[-1]["loss"] < 0.7 * found[0]["loss"]
    assert found[3]["squared"] == pytest.approx(found[3]["loss"] ** 2, rel=0.05)
    assert found[-1]["largest_weight"] > 0
    assert found[-1]["gradient_norm.layers.0.blocks.0"] > 0
    kept = tmp_path / "run" / "plugins" / "mine.py"
    text = kept.read_text(encoding="utf-8")
    assert text == (tmp_path / "mine.py").read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text(text + "# edited\n", encoding="utf-8")
    again = interlace("train", "--resume", str(tmp_path / "run"), "train.steps=32", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    changed = f"{tmp_path / 'mine.py'} has changed since this run was begun with what {kept} holds"
    assert changed in again.stdout and changed not in done.stdout
    assert kept.read_text(encoding="utf-8") == text
    sample = interlace("sample", str(tmp_path / "run"), "--prompt", "1 2 ", "--tokens", "3")
    assert sample.returncode == 0, sample.stderr
    assert sample.stdout.startswith("1 2 ")


@pytest.mark.long
def test_a_run_goes_on_when_its_plug_in_was_moved(
    recipe: Path, interlace: Interlace, tiny: Sequence[str], tmp_path: Path
) -> None:
    own = ("data.source", "data.prepared_dir")
    words = [word for word in tiny[1:] if not word.startswith(own)]
    words += [f"data.prepared_dir={tmp_path}", f"run.dir={tmp_path / 'run'}", "train.steps=4"]
    done = interlace("train", str(recipe), *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    moved = (tmp_path / "mine.py").rename(tmp_path / "elsewhere.py")
    resume = ("train", "--resume", str(tmp_path / "run"), "train.steps=6")
    lost = interlace(*resume, cwd=tmp_path)
    assert lost.returncode == 2
    assert "say where to, in the recipe or as model.plugins=['PATH']" in lost.stderr
    found = interlace(*resume, "model.plugins=['elsewhere.py']", cwd=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"model.plugins is now [{moved}], was [{tmp_path / 'mine.py'}]" in found.stdout
    sample = interlace("sample", str(tmp_path / "run"), "--prompt", "1 2 ", "--tokens", "3")
    assert sample.returncode == 0, sample.stderr


def test_a_kind_of_source_that_nobody_reads_is_named() -> None:
    with pytest.raises(DataError) as caught:
        spec_of(SourceSection(source="counting:100"), "text")
    assert str(caught.value) == (
        "data.source=counting: there is no such source kind; known: hub, jsonl, parquet, stdlib, "
        "text; a plug-in's file goes into model.plugins"
    )
