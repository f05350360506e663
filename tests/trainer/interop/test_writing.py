"""What is exported by the command line, and what is refused because it has no equal."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_cases import saved, shape_of
from safetensors.torch import load_file, save_file

from interlace.launch.cli import main
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.errors import ConfigError
from interlace.trainer.interop.writing import export_hf

REFUSED = {
    "AMF": (
        {"pattern": "AMF"},
        "model.pattern=AMF: its layer AMF is in no class of transformers that is known here; "
        "layers that can be exported are AF, MF, AE, ME",
    ),
    "some experts": (
        {"pattern": "MF AE"},
        "model.pattern=MF AE: GraniteMoeHybrid has experts in every layer or in none; a mix of F "
        "and E cannot be exported",
    ),
    "queries": (
        {"pattern": "MF AF", "query_key_norm": True},
        "model.query_key_norm=true: GraniteMoeHybrid does not norm queries",
    ),
    "sigmoid": (
        {"pattern": "AE", "moe_router": "sigmoid"},
        "model.moe_router=sigmoid: GraniteMoeHybrid takes the softmax over the chosen logits",
    ),
    "alone": (
        {"pattern": "AE", "moe_shared_experts": 0},
        "model.moe_shared_experts=0: GraniteMoeHybrid always has a shared expert",
    ),
    "bias": (
        {"pattern": "AE", "moe_bias_rate": 0.001},
        "model.moe_bias_rate=0.001: GraniteMoeHybrid has no bias on the choice of experts",
    ),
    "expand": (
        {"pattern": "MF AF", "mamba_expand": 1.5, "mamba_head_width": 16},
        "model.mamba_expand=1.5: GraniteMoeHybrid takes whole multiples of the width only",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_equal_is_refused_with_its_setting(name: str, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    shape = ModelSection.model_validate({"width": 32, "heads": 4, "layers": 1, **changes})
    with pytest.raises(ConfigError) as caught:
        export_hf(saved(shape, tmp_path / "run"), tmp_path / "run", tmp_path / "out")
    assert str(caught.value) == message
    assert not (tmp_path / "out").exists()


def test_a_run_is_exported_and_imported_by_the_command_line(
    interlace: Callable[..., Any],
    tiny: Sequence[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, exported, folder = (tmp_path / name for name in ("run", "exported", "folder"))
    done = interlace("train", *tiny, f"run.dir={run}", "train.steps=1")
    assert done.returncode == 0, done.stderr
    assert main(["export", str(run), "--to", "hf", str(exported)]) == 0
    assert f"wrote LlamaForCausalLM to {exported}" in capsys.readouterr().out
    assert sorted(path.name for path in exported.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert main(["import", str(exported), str(folder)]) == 0
    assert f"interlace train {folder}/recipe.toml" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "recipe.toml",
        "tokenizer.json",
    ]
    texts: list[str] = []
    for each in (run, exported, folder):
        assert main(["sample", str(each), "--tokens", "8", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    assert main(["import", str(exported), str(folder)]) == 2
    assert "exists and is not an empty folder; name a new one" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    model = saved(shape_of("far"), tmp_path / "run")
    target = tmp_path / "full"
    target.mkdir()
    save_file({"precious": torch.ones(1)}, target / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        export_hf(model, tmp_path / "run", target)
    assert str(caught.value) == (
        f"--to hf {target}: exists and is not an empty folder; name a new one"
    )
    assert list(load_file(target / "model.safetensors")) == ["precious"]


def test_a_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    model = shape_of("plain")
    (tmp_path / "file").write_text("", encoding="utf-8")
    target = tmp_path / "file" / "inside"
    with pytest.raises(ConfigError) as caught:
        export_hf(saved(model, tmp_path / "run"), tmp_path / "run", target)
    assert str(caught.value) == (
        f"--to hf {target}: cannot be created: Not a directory; name a folder that can be"
    )
