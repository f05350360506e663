"""`interlace mup table`: what stands there is what a run is built with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from interlace.launch.cli import main
from interlace.launch.mup.check_command import parse_widths
from interlace.trainer.config.load import load_recipe
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.mup.manifest import manifest_of
from interlace.trainer.optimizer import parameter_groups
from interlace.trainer.rules import rule_of

WIDE = ("model.heads=8", "model.kv_heads=4", "mup.enabled=true", "mup.base_width=64")
HYBRID = ("quickstart_hybrid", "model.mamba_head_width=16", *WIDE)

Capture = pytest.CaptureFixture[str]


def shown(capsys: Capture, *words: str) -> str:
    assert main(["mup", "table", *words]) == 0
    return capsys.readouterr().out


def told(capsys: Capture, *words: str) -> dict[str, Any]:
    return json.loads(shown(capsys, *words, "--json"))


def test_rates_are_those_of_the_groups_that_a_run_is_built_with(capsys: Capture) -> None:
    words = (*HYBRID, "optimizer.rule=clipped_sgd", "mup.base_layers=2")
    found = told(capsys, *words, "--all")
    config = load_recipe(words[0], words[1:]).config
    manifest = manifest_of(config, 257)
    assert found["digest"] == manifest.digest
    with torch.device("meta"):
        model = LanguageModel(config.model, 257)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, rule_of(config).hyperparameters(), manifest)
    rows = {(row["name"], row["rows"]): row for row in found["parameters"]}
    assert len(rows) == len(found["parameters"])
    seen = 0
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            titles = [each.rows for each in manifest.by_name[name]]
            for title, block in zip(titles, group.get("row_blocks", [{}]), strict=True):
                row = rows[name, title]
                for key in ("lr", "weight_decay", "threshold"):
                    expected = group[key] * block.get(key, 1.0)
                    assert row[key] == pytest.approx(expected, rel=1e-12), (name, title, key)
                seen += 1
    assert seen == len(rows)


def test_starts_are_those_of_the_values_a_model_is_filled_with(capsys: Capture) -> None:
    found = told(capsys, *HYBRID, "--all", "model.tie_embeddings=false")
    config = load_recipe(HYBRID[0], HYBRID[1:]).config
    manifest = manifest_of(config, 257)
    model = LanguageModel(config.model, 257)
    model.initialise(config.run.seed, manifest.rescale)
    values = dict(model.named_parameters())
    for row in found["parameters"]:
        entries = manifest.by_name[row["name"]]
        blocks = values[row["name"]].detach().split([each.shape[0] for each in entries])
        there = next(b for b, e in zip(blocks, entries, strict=True) if e.rows == row["rows"])
        # Blocks are drawn by themselves here: another part of the same distribution.
        few = there.numel() < 1000
        tolerance = {"rel": 0.5, "abs": 1e-3} if few else {"rel": 0.1, "abs": 1e-6}
        spread = float(there.double().std(correction=0))
        assert row["start"] == pytest.approx(spread, **tolerance), row["name"]


def test_equal_rows_of_layers_are_one_with_a_count_and_all_shows_each(capsys: Capture) -> None:
    folded, whole = told(capsys, "quickstart", *WIDE), told(capsys, "quickstart", *WIDE, "--all")
    counts = {row["name"]: row["count"] for row in folded["parameters"]}
    assert counts["layers.*.blocks.0.mixer.query.weight"] == 3
    assert counts["embedding.weight"] == counts["head.weight"] == 1
    assert sum(counts.values()) == len(whole["parameters"])
    assert {row["count"] for row in whole["parameters"]} == {1}
    # A block that a single layer has keeps its number.
    names = [row["name"] for row in told(capsys, *HYBRID)["parameters"]]
    assert "layers.1.blocks.0.mixer.query.weight" in names
    assert "layers.*.blocks.0.mixer.in_proj.weight" in names


def test_the_page_has_every_number_beside_its_factor(capsys: Capture) -> None:
    lines = shown(capsys, "quickstart", *WIDE, "mup.base_layers=1").splitlines()
    assert lines[1:4] == [
        "  width      256, 4 times the base of 64",
        "  layers     3, 3 times the base of 1",
        "  rates      adamw, 0.003 at the base; Adam's table, as its update does not depend on the "
        "gradient's scale",
    ]
    assert "layers.*.blocks.0  x3" in lines
    [query] = [line.split() for line in lines if line.startswith("  mixer.query.weight")]
    assert query[1:5] == ["256x256", "hidden", "4", "4"]
    assert query[6:] == ["0.00075", "x0.25", "0.4", "x4", "8.33e-10", "x0.0833"]
    [norm] = [line.split() for line in lines if line.startswith("norm.weight")]
    assert norm[1:] == ["256", "input", "1", "4", "-", "0.003", "-", "2.5e-09", "x0.25"]
    assert lines[-3:] == [
        "norm.multiplier                     0.25",
        "layers.*.blocks.0.multiplier  x3  0.3333",
        "layers.*.blocks.1.multiplier  x3  0.3333",
    ]


def test_thresholds_stand_where_coordinates_are_clipped_at_fixed_ones(capsys: Capture) -> None:
    clipped = ("quickstart", *WIDE, "optimizer.rule=clipped_sgd")
    page = shown(capsys, *clipped)
    assert "the table of gradient descent, as its update is as long as the gradient" in page
    assert "threshold" in page and "epsilon" not in page
    [query] = [line.split() for line in page.splitlines() if "mixer.query" in line]
    assert query[-2:] == ["0.00025", "x0.25"]
    learnt = shown(capsys, *clipped, "coordinate_clip.policy=lagged_quantile")
    assert "coordinate_clip.policy=lagged_quantile finds it while training" in learnt
    assert not any("x0.25" in line for line in learnt.splitlines() if "mixer.query" in line)


def test_a_recipe_without_mup_is_shown_as_with_it_and_says_so(capsys: Capture) -> None:
    quick = ("quickstart", "model.heads=8", "model.kv_heads=4")
    page = shown(capsys, *quick, "--base-width", "64")
    assert "shown as with mup.enabled=true mup.base_width=64" in page
    assert "4 times the base of 64" in page
    own = shown(capsys, *quick)
    assert "shown as with mup.enabled=true mup.base_width=256" in own
    assert "256, which is the base itself" in own
    assert " x0." not in own
    on = shown(capsys, "quickstart", *WIDE)
    assert "assumed" not in on
    assert shown(capsys, "quickstart", *WIDE[:3], "--base-width=64").splitlines()[4:] == [
        "  assumed    the recipe is not trained so: shown as with mup.base_width=64",
        *on.splitlines()[4:],
    ]


def test_rules_that_are_left_out_are_named(capsys: Capture) -> None:
    found = told(capsys, "quickstart", *WIDE, "mup.without=['epsilon']")
    assert found["without"] == ["epsilon"]
    assert {row["factors"]["eps"] for row in found["parameters"]} == {1.0}
    assert "left out   epsilon" in shown(capsys, "quickstart", *WIDE, "mup.without=['epsilon']")


def test_a_width_that_cannot_be_is_refused_in_words(capsys: Capture) -> None:
    assert main(["mup", "table", "quickstart", "--base-width", "97"]) == 2
    message = capsys.readouterr().err
    assert "mup.base_width=97: model.heads=4: at width 97" in message
    assert main(["mup", "table", "quickstart", "--base-width", "0"]) == 2
    assert "mup.base_width=0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "widths"),
    [
        ((), [32, 64, 128, 256]),
        (("mup.base_width=64",), [64, 128, 256, 512]),
        (("mup.base_width=1024",), [256, 512, 1024, 2048]),
    ],
)
def test_a_check_begins_at_the_base_or_at_a_narrower_model(
    words: tuple[str, ...], widths: list[int]
) -> None:
    assert (
        parse_widths(None, load_recipe("quickstart", [*words, "model.heads=16"]).config) == widths
    )


def test_help_has_examples_and_every_word_of_them_parses(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["mup", "table", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    examples = [line.split("  ") for line in text.splitlines() if line.startswith("  interlace")]
    assert len(examples) == 4
    monkeypatch.chdir(tmp_path)
    mine = "[model]\nheads = 64\nkv_heads = 64\n[mup]\nenabled = true\nbase_width = 64\n"
    (tmp_path / "mine.toml").write_text(f'extends = "quickstart"\n{mine}', "utf-8")
    for parts in examples:
        [command] = [part.strip() for part in parts if "interlace mup" in part]
        assert main(command.split()[1:]) == 0, command
        capsys.readouterr()
