"""Foreign folders are read with suspicion: what has no equal here is refused by its key."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_cases import saved, shape_of, tokens_of
from safetensors.torch import load_file, save_file

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.errors import CheckpointError, ConfigError
from interlace.trainer.interop.writing import export_hf
from interlace.trainer.saved_model import load_saved_model

LLAMA = {
    "attention_bias": (True, "projections have no biases here"),
    "mlp_bias": (True, "projections have no biases here"),
    "use_sliding_window": (True, "attention sees whole documents here"),
    "hidden_act": ("gelu", "feed-forward blocks are SwiGLU here"),
    "partial_rotary_factor": (0.5, "rotary positions turn whole heads here"),
    "quantization_config": ({"bits": 4}, "weights are not quantised here"),
}
HYBRID = {
    "attention_bias": (True, "projections have no biases here"),
    "attention_multiplier": (1.0, "scores are divided by the root of the head"),
    "embedding_multiplier": (12, "nothing is multiplied there here"),
    "residual_multiplier": (0.22, "nothing is multiplied there here"),
    "logits_scaling": (8, "nothing is multiplied there here"),
    "mamba_conv_bias": (False, "the convolution has a bias here"),
    "mamba_proj_bias": (True, "projections have no biases here"),
    "position_embedding_type": ("learned", "positions are rotary or none here"),
    "time_step_limit": ([0.001, 0.1], "steps are not limited here"),
}
CASES = [("plain", key, *LLAMA[key]) for key in LLAMA]
CASES += [("hybrid", key, *HYBRID[key]) for key in HYBRID]


def exported(name: str, folder: Path, **changes: Any) -> Path:
    """Export a shape and change its `config.json`."""
    model = shape_of(name)
    export_hf(saved(model, folder / "run"), folder / "run", folder / "foreign")
    path = folder / "foreign" / "config.json"
    about = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(about), encoding="utf-8")
    return folder / "foreign"


@pytest.mark.parametrize(("shape", "key", "value", "why"), CASES)
def test_a_setting_without_an_equal_is_named(
    shape: str, key: str, value: Any, why: str, tmp_path: Path
) -> None:
    folder = exported(shape, tmp_path, **{key: value})
    with pytest.raises(ConfigError) as caught:
        load_saved_model(folder)
    assert str(caught.value) == (
        f"{folder / 'config.json'}: {key}={value}: {why}, so it cannot be imported"
    )


def test_scaled_positions_and_other_layers_are_named_together(tmp_path: Path) -> None:
    folder = exported(
        "plain",
        tmp_path,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5},
        layer_types=["sliding_attention", "full_attention"],
    )
    with pytest.raises(ConfigError) as caught:
        load_saved_model(folder)
    assert [problem.split(": ")[1] for problem in caught.value.problems] == [
        "layer_types=['sliding_attention', 'full_attention']",
        "rope_parameters.rope_type=llama3",
    ]


def test_a_class_that_is_not_known_is_named(tmp_path: Path) -> None:
    folder = exported("plain", tmp_path, architectures=["MistralForCausalLM"])
    with pytest.raises(ConfigError) as caught:
        load_saved_model(folder)
    assert str(caught.value) == (
        f"{folder / 'config.json'}: architectures=MistralForCausalLM: cannot be read here; known "
        "are LlamaForCausalLM, Qwen3ForCausalLM, GraniteMoeHybridForCausalLM"
    )


def test_old_spellings_mean_the_same(tmp_path: Path) -> None:
    folder = exported("far", tmp_path)
    path = folder / "config.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    del about["rope_parameters"], about["head_dim"]
    path.write_text(json.dumps(about | {"rope_scaling": None}), encoding="utf-8")
    again = load_saved_model(folder).config.model
    assert (again.rope_base, again.head_width) == (500.0, 8)


def test_weights_in_several_files_and_in_half_precision_are_read(tmp_path: Path) -> None:
    folder = exported("plain", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    expected = load_saved_model(folder).model
    (folder / "model.safetensors").unlink()
    places = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        part = {name: tensors[name].bfloat16() for name in tensors if places[name] == file}
        save_file(part, folder / file)
    index = {"weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    found = load_saved_model(folder).model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor.bfloat16().float())


def test_rows_beyond_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    folder = exported("plain", tmp_path)
    expected = load_saved_model(folder).model
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.ones(7, 32)])
    save_file(tensors, folder / "model.safetensors")
    again = load_saved_model(folder).model
    with torch.no_grad():
        assert torch.equal(again.logits(tokens_of(9)), expected.logits(tokens_of(9)))


def test_a_tensor_that_is_missing_strange_or_of_another_shape_is_named(tmp_path: Path) -> None:
    folder = exported("plain", tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    norm = tensors["model.norm.weight"]
    cases = {
        "holds no tensor for norm.weight; its files are incomplete": {},
        "its tensor for norm.weight is [31], and its": {"model.norm.weight": norm[:31].clone()},
        "has a tensor model.layers.0.self_attn.q_proj.bias, which no block here has": {
            "model.norm.weight": norm,
            "model.layers.0.self_attn.q_proj.bias": norm.clone(),
        },
    }
    del tensors["model.norm.weight"]
    for message, extra in cases.items():
        save_file({**tensors, **extra}, file)
        with pytest.raises(ConfigError) as caught:
            load_saved_model(folder)
        assert message in str(caught.value)
    file.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_saved_model(folder)


def test_the_end_of_text_is_what_the_folder_says(tmp_path: Path) -> None:
    folder = exported("plain", tmp_path)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps(document).replace("<|endoftext|>", "<stop>")
    path.write_text(text, encoding="utf-8")
    again = load_saved_model(folder)
    assert again.config.data.end_of_text == "<stop>"
    assert again.tokenizer.end_of_text == 256


def test_shared_experts_of_an_odd_width_are_refused(tmp_path: Path) -> None:
    folder = exported("experts", tmp_path, shared_intermediate_size=40)
    with pytest.raises(ConfigError, match="shared_intermediate_size=40: it is no multiple of"):
        load_saved_model(folder)


def test_a_hybrid_of_the_default_widths_is_read(tmp_path: Path) -> None:
    model = load_saved_model(exported("hybrid", tmp_path, mamba_d_head="auto")).config.model
    assert isinstance(model, ModelSection)
    assert (model.pattern, model.mamba_head_width) == ("MF AF MF AF", 16)


@pytest.mark.parametrize("key", ["num_attention_heads", "max_position_embeddings", "head_dim"])
@pytest.mark.parametrize("shape", ["plain", "hybrid"])
def test_a_size_that_cannot_be_is_named(shape: str, key: str, tmp_path: Path) -> None:
    folder = exported(shape, tmp_path, **{key: 0})
    with pytest.raises(ConfigError) as caught:
        load_saved_model(folder)
    said = f"{folder / 'config.json'}: {key}=0: must be a whole number, 1 or more"
    assert said in caught.value.problems


def test_a_broken_tokenizer_or_index_is_named(tmp_path: Path) -> None:
    folder = exported("plain", tmp_path)
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": []}', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"index\.json: has no `weight_map`"):
        load_saved_model(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        load_saved_model(folder)


def test_a_folder_without_a_model_is_told_what_would_be_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_saved_model(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: holds no model (no config.toml, recipe.toml or config.json in it); give a "
        "run folder, a model folder or a folder that transformers wrote"
    )
