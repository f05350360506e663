"""Every token goes through the experts it chose and no other token's choice matters to it."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from interlace.kernels.swiglu import swiglu_reference
from interlace.kernels.update import AdamW
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.channel.experts import grouped, one_by_one
from interlace.trainer.models.channel.moe import MixtureOfExperts, balance_loss, choice_counts
from interlace.trainer.models.context import BlockContext, Routed
from interlace.trainer.models.cost import idle_parameters
from interlace.trainer.models.initial import matrix_value
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.models.shapes import expert_width
from interlace.trainer.optimizer import parameter_groups

NOTHING_SHARED = BlockContext(rotary=None, segments=None)
SHAPES = {
    "softmax": ModelSection(width=16, moe_experts=6, moe_expert_width=8),
    "softmax with bias": ModelSection(
        width=16, moe_experts=6, moe_expert_width=8, moe_bias_rate=0.1
    ),
    "sigmoid": ModelSection(width=16, moe_experts=6, moe_expert_width=8, moe_router="sigmoid"),
    "sigmoid with bias": ModelSection(
        width=16, moe_experts=6, moe_expert_width=8, moe_router="sigmoid", moe_bias_rate=0.1
    ),
    "three of five": ModelSection(
        width=12, moe_experts=5, moe_top_k=3, moe_shared_experts=0, moe_expert_width=4
    ),
    "two shared": ModelSection(width=12, moe_shared_experts=2, moe_expert_width=4),
    "all of them": ModelSection(width=12, moe_experts=3, moe_top_k=3, moe_expert_width=4),
    "no balance loss": ModelSection(width=12, moe_expert_width=4, moe_balance_loss=0.0),
}


def build(shape: ModelSection, dtype: torch.dtype = torch.float64) -> MixtureOfExperts:
    """A block with a decided router, so that scores are far apart, and a bias that matters."""
    mixture, generator = MixtureOfExperts(shape), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in mixture.named_parameters():
            start = MixtureOfExperts.initial_value(name, tuple(value.shape), shape, generator)
            value.copy_(start * 30 if name == "router.weight" else start)
        for bias in mixture.buffers():
            bias.copy_(torch.linspace(-0.3, 0.3, len(bias)))
    for value in mixture.parameters():
        value.data = value.data.to(dtype)
    return mixture


def inputs(
    shape: ModelSection, rows: int = 2, length: int = 9, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, length, shape.width, generator=generator, dtype=torch.float64).to(
        dtype
    )


def block(name: str, mixture: MixtureOfExperts, token: torch.Tensor) -> torch.Tensor:
    """One SwiGLU block of the mixture for one token; `name` is `shared` or an expert's number."""
    values = dict(mixture.named_parameters())
    if name == "shared":
        gate, up, down = (values[f"shared.{part}.weight"] for part in ("gate", "up", "down"))
    else:
        gate, up, down = (values[f"experts.{part}"][int(name)] for part in ("gate", "up", "down"))
    return down @ swiglu_reference(gate @ token, up @ token)


def twin(mixture: MixtureOfExperts, x: torch.Tensor, shape: ModelSection) -> Routed:
    """The mixture, token by token, in the input's precision."""
    outputs: list[torch.Tensor] = []
    all_chances: list[torch.Tensor] = []
    choices: list[int] = []
    load = torch.zeros(shape.moe_experts, dtype=torch.int64)
    for token in x.flatten(0, 1):
        logits = mixture.router.weight @ token
        exponentials = (logits - logits.max()).exp()
        sigmoid = shape.moe_router == "sigmoid"
        scores = 1 / (1 + (-logits).exp()) if sigmoid else exponentials / exponentials.sum()
        bias = mixture.balance_bias
        order = scores if bias is None else scores + bias
        best = sorted(range(shape.moe_experts), key=lambda e: -order[e].item())[: shape.moe_top_k]
        total = torch.stack([scores[e] for e in best]).sum()
        output = torch.zeros_like(token)
        for expert in best:
            output = output + scores[expert] / total * block(str(expert), mixture, token)
            load[expert] += 1
            choices.append(expert)
        if shape.moe_shared_experts:
            output = output + block("shared", mixture, token)
        outputs.append(output)
        all_chances.append(scores / scores.sum())
    rows = torch.stack(all_chances).unflatten(0, x.shape[:2])
    picks = torch.tensor(choices).view(len(rows), -1)
    even = torch.stack(
        [
            (pick == expert).double().mean() * row[:, expert].mean()
            for pick, row in zip(picks, rows, strict=True)
            for expert in range(shape.moe_experts)
        ]
    ).sum() / len(rows)
    loss = shape.moe_balance_loss * shape.moe_experts * even
    return Routed(torch.stack(outputs).unflatten(0, x.shape[:2]), loss, load)


def gradients(routed: Routed, x: torch.Tensor, mixture: nn.Module) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, routed.output.numel(), dtype=routed.output.dtype)
    objective = (routed.output * weights.view_as(routed.output)).sum() + 50 * routed.loss
    return list(torch.autograd.grad(objective, [x, *mixture.parameters()]))


@pytest.mark.parametrize("name", SHAPES)
def test_a_mixture_is_what_its_tokens_get_one_by_one(name: str) -> None:
    shape = SHAPES[name]
    mixture, x = build(shape), inputs(shape).requires_grad_()
    found, expected = mixture(x, NOTHING_SHARED), twin(mixture, x, shape)
    torch.testing.assert_close(found.output, expected.output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.load, expected.load)
    assert found.load.sum() == 18 * shape.moe_top_k
    for one, other in zip(
        gradients(found, x, mixture), gradients(expected, x, mixture), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["softmax", "sigmoid with bias", "three of five"])
def test_single_precision_is_near_double(name: str) -> None:
    shape = SHAPES[name]
    exact = twin(build(shape), inputs(shape), shape)
    found = build(shape, torch.float32)(inputs(shape, dtype=torch.float32), NOTHING_SHARED)
    torch.testing.assert_close(found.output.double(), exact.output, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.load, exact.load)


def test_routing_is_in_fp32_also_for_bfloat16() -> None:
    shape = SHAPES["softmax"]
    mixture = build(shape, torch.float32)
    x = inputs(shape, dtype=torch.bfloat16)
    choice = mixture.choose(x.flatten(0, 1))
    wide = mixture.choose(x.flatten(0, 1).float())
    assert choice.weights.dtype == choice.probabilities.dtype == torch.float32
    assert torch.equal(choice.weights, wide.weights)
    assert torch.equal(choice.experts, wide.experts)
    assert mixture(x, NOTHING_SHARED).output.dtype == torch.bfloat16


def test_a_token_does_not_depend_on_the_tokens_beside_it() -> None:
    shape = SHAPES["sigmoid with bias"]
    mixture, x = build(shape), inputs(shape)
    together = mixture(x, NOTHING_SHARED).output
    alone = [
        torch.cat(
            [mixture(x[b : b + 1, t : t + 1], NOTHING_SHARED).output for t in range(x.shape[1])], 1
        )
        for b in range(len(x))
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-13, atol=1e-13)


def test_the_same_pass_has_the_same_bits() -> None:
    shape = SHAPES["three of five"]
    mixture = build(shape, torch.float32)
    x = inputs(shape, 4, 32, torch.float32).requires_grad_()
    first = gradients(mixture(x, NOTHING_SHARED), x, mixture)
    again = gradients(mixture(x, NOTHING_SHARED), x, mixture)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def curvature(routed: Routed, x: torch.Tensor, mixture: nn.Module) -> list[torch.Tensor]:
    """The product of the second derivatives by all inputs and weights with a fixed direction."""
    leaves = [x, *mixture.parameters()]
    objective = (routed.output**3).sum() + 50 * routed.loss
    slopes = torch.autograd.grad(objective, leaves, create_graph=True)
    assert all(slope.requires_grad for slope in slopes)
    shares = [
        (slope * torch.linspace(-1, 1, slope.numel()).view_as(slope)).sum() for slope in slopes
    ]
    along = torch.stack(shares).sum()
    return list(torch.autograd.grad(along, leaves))


@pytest.mark.parametrize("name", ["softmax", "sigmoid with bias", "three of five"])
def test_second_derivatives_are_those_of_the_tokens_one_by_one(name: str) -> None:
    shape = SHAPES[name]
    mixture, x = build(shape), inputs(shape, 1, 5).requires_grad_()
    found = curvature(mixture(x, NOTHING_SHARED), x, mixture)
    expected = curvature(twin(mixture, x, shape), x, mixture)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_an_expert_without_tokens_has_a_zero_gradient() -> None:
    shape = SHAPES["softmax"]
    mixture = build(shape)
    with torch.no_grad():
        mixture.router.weight[4] = 0
        mixture.router.weight[5] = 0
    x = inputs(shape).abs()
    with torch.no_grad():
        mixture.router.weight[:4] = mixture.router.weight[:4].abs()
    routed = mixture(x, NOTHING_SHARED)
    assert routed.load[4:].tolist() == [0, 0]
    routed.output.sum().backward()
    for part in (mixture.experts.gate, mixture.experts.up, mixture.experts.down):
        assert part.grad is not None
        assert not part.grad[4:].any() and part.grad[int(routed.load.argmax())].any()


def rows_for(
    counts: list[int], width: int, hidden: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Rows in order of their experts, where each expert's end, and the experts' three weights."""
    generator, experts = torch.Generator().manual_seed(0), len(counts)
    rows = torch.randn(sum(counts), width, generator=generator, dtype=torch.float64)
    shapes = [(experts, hidden, width), (experts, hidden, width), (experts, width, hidden)]
    weights = [matrix_value(shape, generator).double() for shape in shapes]
    ends = torch.tensor(counts).cumsum(0).int().to(device)
    leaves = [t.to(device, dtype).requires_grad_() for t in (rows, *weights)]
    return leaves[0], ends, leaves[1:]


def results_and_gradients(product: Any, case: tuple[Any, Any, list[Any]]) -> list[torch.Tensor]:
    rows, ends, weights = case
    result = product(rows, ends, *weights)
    pull = torch.linspace(-1, 1, result.numel(), device=result.device).view_as(result)
    found = torch.autograd.grad(result, [rows, *weights], pull.to(result.dtype))
    return [result.detach(), *found]


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [0, 0, 7], [4, 1, 0]], ids=str)
def test_the_grouped_product_is_the_loop(counts: list[int]) -> None:
    case = rows_for(counts, 16, 24, torch.float32)
    loop = results_and_gradients(one_by_one, case)
    together = results_and_gradients(grouped, case)
    for one, other in zip(loop, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_the_grouped_product_on_a_gpu_is_the_loop_in_fp64() -> None:
    counts = [300, 0, 17, 1, 706]
    exact = results_and_gradients(one_by_one, rows_for(counts, 128, 192, torch.float64))
    case = rows_for(counts, 128, 192, torch.bfloat16, "cuda")
    found = results_and_gradients(grouped, case)
    for one, other in zip(found, exact, strict=True):
        error = (one.double().cpu() - other).norm() / other.norm()
        assert error < 2e-2
    for gradient in found[2:]:
        assert not gradient[1].any()
    again = results_and_gradients(grouped, case)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_the_balance_loss_is_one_when_even_and_the_number_of_experts_when_one_has_all() -> None:
    even, turns = torch.full((1, 8, 4), 0.25), torch.arange(16).view(1, 8, 2) % 4
    torch.testing.assert_close(balance_loss(even, turns), torch.tensor(1.0))
    one_hot = functional.one_hot(torch.zeros(1, 8, dtype=torch.int64), 4).float()
    first = torch.zeros(1, 8, 1, dtype=torch.int64)
    torch.testing.assert_close(balance_loss(one_hot, first), torch.tensor(4.0))


def test_the_balance_loss_of_a_batch_is_the_mean_of_its_rows() -> None:
    shape = ModelSection(width=12, moe_experts=4, moe_balance_loss=1.0)
    mixture, x = build(shape, torch.float64), inputs(shape, 4, 6, torch.float64)
    whole = mixture(x, NOTHING_SHARED).loss
    rows = torch.stack([mixture(row, NOTHING_SHARED).loss for row in x.split(1)])
    torch.testing.assert_close(rows.mean(), whole, rtol=1e-12, atol=0)
    assert rows.std() > 1e-3


def test_choices_are_counted_per_expert() -> None:
    assert choice_counts(torch.tensor([[0, 3], [3, 1]]), 5).tolist() == [1, 1, 0, 2, 0]


def test_the_bias_moves_choices_and_not_weights() -> None:
    shape = SHAPES["sigmoid with bias"]
    mixture, x = build(shape), inputs(shape).flatten(0, 1)
    assert mixture.balance_bias is not None
    with torch.no_grad():
        mixture.balance_bias.copy_(torch.tensor([0, 0, 9.0, 0, 9.0, 0]))
    choice = mixture.choose(x)
    assert set(choice.experts.flatten().tolist()) == {2, 4}
    scores = torch.sigmoid(x @ mixture.router.weight.T).gather(1, choice.experts)
    torch.testing.assert_close(choice.weights, scores / scores.sum(1, keepdim=True))


def test_the_bias_steps_against_the_load() -> None:
    mixture = MixtureOfExperts(ModelSection(width=8, moe_experts=4, moe_bias_rate=0.25))
    assert mixture.balance_bias is not None
    mixture.balance_bias.zero_()
    mixture.balance(torch.tensor([6.0, 2.0, 4.0, 4.0], dtype=torch.float64))
    assert mixture.balance_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    assert mixture.balance_bias.dtype == torch.float32


def test_a_frozen_block_s_bias_stays() -> None:
    mixture = build(SHAPES["sigmoid with bias"]).requires_grad_(False)
    assert mixture.balance_bias is not None
    before = mixture.balance_bias.clone()
    mixture.balance(torch.arange(6.0))
    assert torch.equal(mixture.balance_bias, before)


def test_there_is_no_bias_unless_it_moves() -> None:
    still = MixtureOfExperts(ModelSection(width=8))
    assert list(still.state_dict()) == [
        "router.weight",
        *(f"experts.{part}" for part in ("gate", "up", "down")),
        *(f"shared.{part}.weight" for part in ("gate", "up", "down")),
    ]
    still.balance(torch.ones(8))
    moving = MixtureOfExperts(ModelSection(width=8, moe_bias_rate=0.1, moe_shared_experts=0))
    assert list(moving.state_dict()) == [
        "balance_bias",
        "router.weight",
        *(f"experts.{part}" for part in ("gate", "up", "down")),
    ]


def test_the_bias_evens_a_lopsided_load_out() -> None:
    shape = ModelSection(width=16, moe_experts=6, moe_bias_rate=0.02, moe_router="sigmoid")
    mixture, x = build(shape, torch.float32), inputs(shape, 8, 64, torch.float32) + 0.5
    assert mixture.balance_bias is not None
    mixture.balance_bias.zero_()
    before = mixture(x, NOTHING_SHARED).load
    for _ in range(200):
        mixture.balance(mixture(x, NOTHING_SHARED).load)
    after, even = mixture(x, NOTHING_SHARED).load, 512 * 2 / 6
    assert before.max() > 1.5 * even
    assert after.max() < 1.15 * even and after.min() > 0.85 * even


def test_the_balance_loss_evens_a_lopsided_load_out() -> None:
    shape = ModelSection(width=16, moe_experts=6, moe_balance_loss=1.0)
    mixture, x = build(shape, torch.float32), inputs(shape, 8, 64, torch.float32) + 0.5
    before = mixture(x, NOTHING_SHARED).load
    optimizer = torch.optim.Adam(mixture.router.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        mixture(x, NOTHING_SHARED).loss.backward()
        optimizer.step()
    after, even = mixture(x, NOTHING_SHARED).load, 512 * 2 / 6
    assert before.max() > 1.5 * even
    assert after.max() < 1.2 * even


def test_experts_start_like_feed_forward_blocks_and_the_router_small() -> None:
    shape = ModelSection(width=64, layers=2, pattern="AE", moe_expert_width=128)
    model = LanguageModel(shape, 10)
    model.initialise(0)
    values = {name: value for name, value in model.named_parameters() if "0.blocks.1.mixer" in name}
    deviation = {name.split("mixer.")[1]: value.std().item() for name, value in values.items()}
    assert deviation["experts.gate"] == pytest.approx(1 / math.sqrt(64), rel=0.03)
    assert deviation["experts.up"] == pytest.approx(1 / math.sqrt(64), rel=0.03)
    assert deviation["experts.down"] == pytest.approx(1 / math.sqrt(128) / math.sqrt(4), rel=0.03)
    assert deviation["shared.down.weight"] == pytest.approx(
        1 / math.sqrt(128) / math.sqrt(4), rel=0.03
    )
    assert deviation["router.weight"] == pytest.approx(0.02, rel=0.1)


def test_all_experts_decay() -> None:
    mixture = MixtureOfExperts(SHAPES["softmax"])
    [decaying] = parameter_groups(mixture, AdamW(weight_decay=0.1).hyperparameters())
    assert len(decaying["params"]) == 7
    assert decaying["weight_decay"] == 0.1


def test_every_parameter_has_a_role() -> None:
    for shape in SHAPES.values():
        names = [name for name, _ in MixtureOfExperts(shape).named_parameters()]
        roles = MixtureOfExperts.roles(shape)
        assert sorted(roles) == sorted(names)
        inner = {"hidden", "residual"}
        assert [name for name in names if roles[name] not in inner] == ["router.weight"]


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ({"width": 192}, 176),
        ({"width": 192, "ffn_width": 1000, "moe_top_k": 1, "moe_shared_experts": 0}, 1000),
        ({"width": 192, "ffn_width": 1000}, 336),
        ({"moe_expert_width": 7}, 7),
    ],
)
def test_the_width_of_an_expert_keeps_the_work_of_a_feed_forward_block(
    settings: dict[str, int], width: int
) -> None:
    assert expert_width(ModelSection.model_validate(settings)) == width


def test_idle_parameters_are_those_of_the_experts_that_a_token_does_not_meet() -> None:
    shape = ModelSection(width=16, layers=3, pattern="AEF", moe_experts=6, moe_expert_width=8)
    one_expert = 3 * 16 * 8
    assert idle_parameters(shape) == 3 * 4 * one_expert
    assert idle_parameters(shape.model_copy(update={"moe_top_k": 6})) == 0
    assert idle_parameters(shape.model_copy(update={"pattern": "AF"})) == 0


def test_routing_and_result_are_those_of_granite() -> None:
    """Against transformers' block: softmax over the chosen logits."""
    from transformers import GraniteMoeHybridConfig
    from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite

    shape = ModelSection(width=16, moe_experts=6, moe_expert_width=8, moe_shared_experts=0)
    mixture, x = build(shape, torch.float32), inputs(shape, dtype=torch.float32)
    settings = GraniteMoeHybridConfig(
        hidden_size=16,
        intermediate_size=8,
        num_local_experts=6,
        num_experts_per_tok=2,
        mamba_n_heads=1,
        mamba_d_head=32,
    )
    settings._experts_implementation = "eager"  # pyright: ignore[reportPrivateUsage]
    theirs = granite.GraniteMoeHybridMoE(settings)
    with torch.no_grad():
        theirs.router.weight.copy_(mixture.router.weight)
        gate_and_up = torch.cat([mixture.experts.gate, mixture.experts.up], 1)
        values = dict(theirs.experts.named_parameters())
        values["gate_up_proj"].copy_(gate_and_up)
        values["down_proj"].copy_(mixture.experts.down)
    found = mixture(x, NOTHING_SHARED)
    torch.testing.assert_close(found.output, theirs(x), rtol=1e-5, atol=1e-6)


def test_choice_and_weights_are_those_of_nemotron() -> None:
    """Against transformers' router: sigmoids, a bias for the choice, normalised weights."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h import modeling_nemotron_h as nemotron

    shape = SHAPES["sigmoid with bias"]
    mixture, x = build(shape, torch.float32), inputs(shape, dtype=torch.float32).flatten(0, 1)
    settings = NemotronHConfig(
        hidden_size=16,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    theirs = nemotron.NemotronHTopkRouter(settings)
    assert mixture.balance_bias is not None
    with torch.no_grad():
        theirs.weight.copy_(mixture.router.weight)
        theirs.e_score_correction_bias.copy_(mixture.balance_bias)
    _, weights, experts = theirs(x)
    choice = mixture.choose(x)
    theirs_by_expert = torch.zeros(len(x), 6).scatter(1, experts, weights)
    ours_by_expert = torch.zeros(len(x), 6).scatter(1, choice.experts, choice.weights)
    torch.testing.assert_close(ours_by_expert, theirs_by_expert, rtol=1e-6, atol=1e-7)
