"""The attention that a recipe names or the router picks: in models, plans and on several ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks

from interlace.kernels.attention import api, backends, router
from interlace.kernels.attention.measurements import rows_of
from interlace.trainer.attention_choice import attention_backend, training_request
from interlace.trainer.config import RunConfig, load_recipe
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.plan import Setting, resolve
from interlace.trainer.run_folder import continuation_notes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("INTERLACE_ATTENTION", raising=False)
    rows_of.cache_clear()


def recipe(*overrides: str) -> RunConfig:
    return load_recipe("quickstart", list(overrides)).config


@pytest.mark.parametrize(("named", "asked"), [("chunked", "chunked"), ("auto", "auto")])
def test_a_model_asks_for_the_back_end_that_its_recipe_names(
    named: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    choose = router.choose

    def note(request: Any, backend: str) -> Any:
        seen.append(backend)
        return choose(request, backend)

    monkeypatch.setattr(api, "choose", note)
    section = ModelSection.model_validate(
        {"width": 16, "heads": 2, "layers": 2, "attention_backend": named}
    )
    model = LanguageModel(section, 40)
    model.initialise(0)
    model(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))
    assert seen == [asked, asked]


@pytest.mark.parametrize("documents", [True, False])
def test_the_question_asked_beforehand_is_the_one_that_the_model_asks(
    documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    choose = router.choose

    def note(request: Any, backend: str) -> Any:
        seen.append(request)
        return choose(request, backend)

    monkeypatch.setattr(api, "choose", note)
    setting = f"data.respect_documents={str(documents).lower()}"
    config = recipe(setting, "data.sequence_length=16", "model.layers=1")
    model = LanguageModel(config.model, 257)
    model.initialise(0)
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    model(tokens, tokens, segments=tokens if documents else None)
    assert seen == [training_request(config, CPU, 3)]


def activations(config: RunConfig) -> int:
    hardware = load_machine()
    setting = Setting(
        world_size=1, device_type="cpu", vocabulary_size=257, corpus_tokens=None, hardware=hardware
    )
    return resolve(config, setting).memory.device.activations


def load_machine() -> Any:
    from interlace.offload.hardware import load_profile

    return load_profile("gh200")


def test_a_plan_counts_the_mask_only_where_the_chosen_back_end_is_handed_one() -> None:
    length = 2048
    long = ("data.sequence_length=2048", "train.tokens_per_step=4096")
    found = {
        name: activations(recipe(*long, f"model.attention_backend={name}"))
        for name in ("auto", "sdpa", "chunked")
    }
    layers, tokens, element = 3, 4096, 4
    assert found["sdpa"] - found["chunked"] == layers * tokens * length * element
    assert attention_backend(recipe(*long), "cpu", 2) == "chunked"
    assert found["auto"] == found["chunked"]
    short = [activations(recipe(f"model.attention_backend={n}")) for n in ("auto", "sdpa")]
    assert short[0] == short[1]


def test_a_plan_for_a_gpu_elsewhere_does_not_depend_on_what_is_installed_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "why_no_triton", lambda: "there is none here")
    monkeypatch.setenv("INTERLACE_ATTENTION", "reference")
    assert attention_backend(recipe(), "cuda", 2) == "triton"
    assert attention_backend(recipe("data.respect_documents=false"), "cuda", 2) == "sdpa"
    assert attention_backend(recipe("model.head_width=512"), "cuda", 2) == "sdpa"


def test_a_plan_of_a_model_without_attention_needs_no_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INTERLACE_ATTENTION", "nonsense")
    assert attention_backend(recipe("model.pattern=F"), "cpu", 2) == "auto"


def test_a_run_may_go_on_with_other_kernels_and_says_so(tmp_path: Path) -> None:
    before = recipe("model.attention_backend=chunked")
    assert continuation_notes(before, recipe("model.attention_backend=sdpa"), tmp_path) == (
        "model.attention_backend is now sdpa, was chunked",
    )
    with pytest.raises(ConfigError, match="its checkpoints do not fit another"):
        continuation_notes(before, recipe("model.layers=2"), tmp_path)


SHARDED = """
import torch
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.parallel import recompute_layers, shard
from interlace.trainer.world import process_group

def losses(backend, mode, world):
    section = ModelSection(width=32, heads=4, kv_heads=2, layers=2, attention_backend=backend)
    model = LanguageModel(section, 61)
    recompute_layers(list(model.layers), mode)
    shard(model, list(model.layers), world, 1, torch.float32)
    model.initialise(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(world.rank)
    tokens = torch.randint(61, (2, 24), generator=generator)
    segments = (torch.arange(24) // 9).expand(2, -1)
    found = []
    for _ in range(3):
        loss = model(tokens, tokens, segments=segments).objective
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss))
    return torch.tensor(found)

with process_group() as world:
    plain = losses("sdpa", "none", world)
    for mode in ("none", "block", "selective"):
        torch.testing.assert_close(losses("chunked", mode, world), plain, rtol=1e-5, atol=1e-5)
    assert plain[-1] < plain[0]
    if world.is_main:
        print("equal", world.size)
"""


def test_sharded_and_recomputed_layers_have_the_losses_of_torch_s_kernels(tmp_path: Path) -> None:
    done = run_on_ranks(SHARDED, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal 2\n"


def test_requests_of_other_devices_can_be_made_here() -> None:
    request = training_request(recipe(), torch.device("cuda"), 8)
    assert (request.device, request.dtype, request.compiling) == ("cuda", torch.bfloat16, True)
    assert replace(request, device="cpu").mask == "packed"
