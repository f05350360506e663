"""The model: what it costs, what it may see, and that decoding is the same as the full pass."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.data.rows import positions_of, segments_of
from interlace.trainer.errors import ConfigError
from interlace.trainer.models import registry
from interlace.trainer.models.cost import (
    ForwardPass,
    flops_per_token,
    kept_bytes,
    parameter_count,
)
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.models.model import initial_value
from interlace.trainer.parallel import compile_layers, recompute_layers
from interlace.trainer.sampling import SamplingSettings, generate

SHAPES = {
    "plain": ModelSection(width=32, heads=4, layers=2),
    "grouped": ModelSection(width=32, heads=4, kv_heads=2, layers=3, ffn_width=48),
    "normed": ModelSection(width=32, heads=4, kv_heads=1, query_key_norm=True, layers=2),
    "tied": ModelSection(width=32, heads=2, head_width=24, tie_embeddings=True, layers=2),
    "mixed": ModelSection(width=32, heads=4, pattern="AFFAF", layers=1),
    "hybrid": ModelSection(
        width=32,
        heads=4,
        pattern="AF MF*2",
        layers=1,
        mamba_expand=1.5,
        mamba_head_width=16,
        mamba_state_width=24,
    ),
    "experts": ModelSection(width=32, heads=4, pattern="AE", layers=2, moe_experts=4),
}
VOCABULARY = 61


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Iterator[ModelSection]:
    yield SHAPES[request.param]


def build(shape: ModelSection, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    with torch.device("meta"):
        model = LanguageModel(shape, VOCABULARY, dtype)
    model.to_empty(device="cpu")
    model.initialise(seed)
    return model


def tokens_of(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def test_parameters_are_counted_exactly(shape: ModelSection) -> None:
    counted = sum(parameter.numel() for parameter in build(shape).parameters())
    assert parameter_count(shape, VOCABULARY) == counted


def test_flops_are_those_of_the_flop_counter(shape: ModelSection) -> None:
    model, tokens = build(shape), tokens_of()
    attention_blocks = shape.layers * shape.pattern.count("A")
    width = shape.head_width or shape.width // shape.heads
    product = 2 * tokens.shape[1] * width * shape.heads * attention_blocks
    expected = flops_per_token(shape, VOCABULARY, tokens.shape[1])
    # The counter does not know the CPU's fused attention; the plain one has the same forward
    # products.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(tokens, tokens)
    assert forward.get_total_flops() == expected.forward * tokens.numel()
    # With gradients, part of the head's backward belongs to the forward call.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both:
        model(tokens, tokens).objective.backward()
    # Fused kernels compute the scores again in backward: five products, not four.
    total = expected.forward + expected.backward - product
    assert both.get_total_flops() == total * tokens.numel()


@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
def test_activation_bytes_are_those_that_autograd_keeps(
    shape: ModelSection, checkpointing: str
) -> None:
    model, tokens = build(shape), tokens_of(4, 64)
    recompute_layers(list(model.layers), checkpointing)
    segments = torch.from_numpy(segments_of((tokens % 13).numpy(), 0))
    positions = torch.from_numpy(positions_of(segments.numpy()))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(tokens, tokens, segments=segments, positions=positions)
    if checkpointing == "selective":
        # What selective recomputation caches does not pass through the hooks.
        assert sum(kept.values()) < expected_bytes(shape, tokens, "none")
        return
    # The head's gradient of its input is nobody's saved tensor.
    expected = expected_bytes(shape, tokens, checkpointing) - 4 * shape.width * tokens.numel()
    if checkpointing == "block":
        # The rotary tables stay alive inside the recomputed call and do not pass through the hooks.
        expected -= 2 * 4 * (shape.head_width or shape.width // shape.heads) * tokens.numel()
    assert sum(kept.values()) == pytest.approx(expected, rel=0.1)


def expected_bytes(shape: ModelSection, tokens: torch.Tensor, checkpointing: str) -> int:
    forward = ForwardPass(
        tokens=tokens.numel(),
        sequence_length=tokens.shape[1],
        bytes_per_element=4,
        checkpointing=checkpointing,  # type: ignore[arg-type]
    )
    return kept_bytes(shape, forward)


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_recomputation_changes_no_bit_of_a_gradient(shape: ModelSection, mode: str) -> None:
    plain, tokens = build(shape), tokens_of()
    saving = build(shape)
    recompute_layers(list(saving.layers), mode)
    for model in (plain, saving):
        model(tokens, tokens).objective.backward()
    pairs = zip(plain.parameters(), saving.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs)


def test_compiled_layers_compute_the_same() -> None:
    plain, compiled = build(SHAPES["grouped"]), build(SHAPES["grouped"])
    compile_layers(list(compiled.layers))
    tokens = tokens_of()
    losses = [model(tokens, tokens).objective for model in (plain, compiled)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)


def test_no_position_sees_what_comes_after(shape: ModelSection) -> None:
    model, tokens = build(shape), tokens_of()
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % VOCABULARY
    before, after = model.logits(tokens), model.logits(changed)
    if "E" in shape.pattern:
        # How many rows an expert has decides which product kernel it takes, and so the last bits.
        torch.testing.assert_close(before[:, :15], after[:, :15], rtol=0, atol=1e-6)
    else:
        assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


def test_packed_documents_are_as_documents_alone(shape: ModelSection) -> None:
    model = build(shape)
    parts = [tokens_of(1, length) for length in (9, 5, 10)]
    packed = torch.cat(parts, dim=1)
    segments = torch.cat([torch.full((1, p.shape[1]), n) for n, p in enumerate(parts)], dim=1)
    positions = torch.cat([torch.arange(p.shape[1])[None] for p in parts], dim=1)
    together = model.hidden(packed, segments, positions)[0]
    alone = torch.cat([model.hidden(part, None, None)[0] for part in parts], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_decoding_with_a_cache_is_the_full_pass(shape: ModelSection) -> None:
    model, tokens = build(shape), tokens_of(1, 20)
    caches = model.new_caches(1, 20)
    pieces = [model.logits(tokens[:, :7], caches)]
    pieces += [model.logits(tokens[:, n : n + 1], caches) for n in range(7, 20)]
    torch.testing.assert_close(torch.cat(pieces, 1), model.logits(tokens), rtol=1e-4, atol=1e-5)


def test_bfloat16_compute_stays_near_fp32() -> None:
    tokens = tokens_of()
    exact = build(SHAPES["grouped"])(tokens, tokens).mean_nll
    rough = build(SHAPES["grouped"], torch.bfloat16)(tokens, tokens).mean_nll
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=2e-2, atol=2e-2)


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    shape = SHAPES["grouped"]
    name, size = "layers.1.blocks.0.mixer.query.weight", (32, 32)
    first = initial_value(name, size, 0, shape)
    assert torch.equal(first, initial_value(name, size, 0, shape))
    assert not torch.equal(first, initial_value(name, size, 1, shape))
    assert not torch.equal(first, initial_value(name.replace("1", "0", 1), size, 0, shape))
    assert float(first.std()) == pytest.approx(32**-0.5, rel=0.1)
    outputs = initial_value("layers.1.blocks.0.mixer.output.weight", size, 0, shape)
    assert float(outputs.std()) == pytest.approx((32 * 6) ** -0.5, rel=0.1)


def test_sampling_stops_repeats_and_can_be_greedy() -> None:
    model = build(SHAPES["grouped"])
    settings = SamplingSettings(max_tokens=10, temperature=1.0, seed=4)
    first = list(generate(model, [5, 6], 0, settings))
    assert first == list(generate(model, [5, 6], 0, settings))
    greedy = list(generate(model, [5, 6], 0, SamplingSettings(max_tokens=5, temperature=0.0)))
    tokens = [0, 5, 6]
    for token in greedy:
        assert int(model.logits(torch.tensor([tokens]))[0, -1].argmax()) == token
        tokens.append(token)
    only_best = SamplingSettings(max_tokens=5, temperature=1.0, top_k=1)
    assert list(generate(model, [5, 6], 0, only_best)) == greedy


def test_an_unknown_letter_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        registry.mixer_class("Z")
    assert "A (attention), E (moe), F (swiglu), M (mamba2)" in str(caught.value)


def test_a_letter_means_one_thing() -> None:
    class Other:
        pass

    registry.mixer_class("A")
    with pytest.raises(ValueError, match="mixer letter A: already means attention"):
        registry.sequence_mixer("A", "another")(Other)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="must be one capital letter"):
        registry.channel_mixer("ab", "another")(Other)  # type: ignore[type-var]
