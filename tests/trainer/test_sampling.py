"""Sampling: what is drawn, how often, when it ends, and that nothing else is disturbed."""

import collections

import pytest
import torch

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.sampling import SamplingSettings, draw, generate

END = 0


@pytest.fixture
def model() -> LanguageModel:
    built = LanguageModel(ModelSection(width=32, heads=4, kv_heads=2, layers=2), 40)
    built.initialise(7)
    return built


def settings(**changes: float) -> SamplingSettings:
    return SamplingSettings(**({"max_tokens": 12, "temperature": 1.0} | changes))  # type: ignore[arg-type]


def test_greedy_decoding_is_the_likeliest_token_of_a_full_pass(model: LanguageModel) -> None:
    seen = [END, 4, 9]
    drawn = list(generate(model, seen[1:], END, settings(temperature=0.0)))
    assert drawn
    for token in drawn:
        with torch.no_grad():
            assert token == int(model.logits(torch.tensor([seen]))[0, -1].argmax())
        seen.append(token)


def test_the_seed_fixes_the_draws(model: LanguageModel) -> None:
    texts = [list(generate(model, [3], END, settings(seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_draws_follow_the_temperature_and_top_k() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    for changes, kept in (({"temperature": 0.5}, 4), ({"temperature": 2.0, "top_k": 2}, 2)):
        wanted = settings(**changes)
        generator = torch.Generator().manual_seed(0)
        counts = collections.Counter(draw(logits, wanted, generator) for _ in range(4000))
        expected = torch.zeros(4)
        expected[4 - kept :] = (logits[4 - kept :] / wanted.temperature).softmax(0)
        measured = torch.tensor([counts[token] / 4000 for token in range(4)])
        torch.testing.assert_close(measured, expected, rtol=0, atol=0.03)


def test_a_sample_ends_at_the_end_of_text(model: LanguageModel) -> None:
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.head.weight.zero_()  # type: ignore[union-attr]
    # All tokens are equally likely, and the first of equals is token 0.
    assert list(generate(model, [3], END, settings(temperature=0.0))) == []
    assert list(generate(model, [3], 1, settings(temperature=0.0))) == [0] * 12


def test_a_sample_leaves_the_run_as_it_was(model: LanguageModel) -> None:
    before = torch.get_rng_state()
    model.train()
    list(generate(model, [3], END, settings()))
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_the_last_position_is_projected_on_request(model: LanguageModel) -> None:
    tokens = torch.arange(10)[None]
    last = model.logits(tokens, last_only=True)
    torch.testing.assert_close(last, model.logits(tokens)[:, -1:])
