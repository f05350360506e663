"""Quadratic forms of the Hessian are those of torch's own Hessian products and of differences of
gradients, through a whole Transformer, whatever its layers were wrapped in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch
from torch import nn

from interlace.trainer.batches import Batch
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.diagnostics.curvature import curvature_along, inner, quadratic_forms
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.models.model import Model
from interlace.trainer.objectives import Loss, Objective
from interlace.trainer.parallel import recompute_layers

SECTION = ModelSection(pattern="AF", layers=2, width=16, heads=2, kv_heads=1, ffn_width=24)
VOCABULARY, ROWS, LENGTH = 19, 4, 12


@dataclass
class Likelihood:
    """The likelihood of next tokens; counts its losses, as objectives with a memory do."""

    z_loss: float = 1e-2
    seen: list[int] = field(default_factory=lambda: [0])

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        self.seen[0] += 1
        found = model(
            batch.tokens,
            batch.targets,
            segments=batch.segments,
            positions=batch.positions,
            z_loss=self.z_loss,
        )
        return Loss(found.objective, found.mean_nll)

    def state(self) -> dict[str, torch.Tensor]:
        return {"seen": torch.tensor(self.seen)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.seen = tensors["seen"].tolist()


def make_model(dtype: torch.dtype = torch.float64, pattern: str = "AF") -> LanguageModel:
    """A Transformer whose weights are large enough to bend its loss."""
    torch.manual_seed(0)
    section = SECTION.model_copy(update={"pattern": pattern})
    model = LanguageModel(section, VOCABULARY, dtype).to(dtype)
    model.initialise(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def make_batch(rows: range = range(ROWS)) -> Batch:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    segments = (torch.arange(LENGTH) >= 5).long().expand(ROWS, -1)
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(ROWS, -1)
    chosen = slice(rows.start, rows.stop)
    return Batch(
        tokens[chosen, :-1], tokens[chosen, 1:], segments[chosen], positions[chosen], 0, rows
    )


def make_directions(model: nn.Module, count: int = 2) -> dict[str, Sequence[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {
        str(number): [
            torch.randn(each.shape, generator=generator, dtype=each.dtype)
            for each in model.parameters()
        ]
        for number in range(count)
    }


def measured(model: Model, batches: Sequence[Batch]) -> dict[str, float]:
    weights = {name: each.detach() for name, each in model.named_parameters()}
    objective = cast(Objective, Likelihood())
    return curvature_along(model, objective, batches, weights, make_directions(model))


def loss_of(model: LanguageModel, values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The loss as a function of all weights, through attention that is plain torch."""
    batch = make_batch()
    named = dict(zip(dict(model.named_parameters()), values, strict=True))
    named_arguments = {
        "segments": batch.segments,
        "positions": batch.positions,
        "z_loss": Likelihood().z_loss,
    }
    arguments = (batch.tokens, batch.targets)
    return torch.func.functional_call(model, named, arguments, named_arguments).objective


def reference_of(model: LanguageModel) -> LanguageModel:
    """The same weights, with attention as its formula has it."""
    section = model.config.model_copy(update={"attention_backend": "reference"})
    plain = LanguageModel(section, VOCABULARY, torch.float64).double()
    plain.load_state_dict(model.state_dict())
    return plain


def test_a_quadratic_loss_has_the_form_of_its_matrix() -> None:
    torch.manual_seed(0)
    root = torch.randn(7, 7, dtype=torch.float64)
    matrix = root @ root.T - 2 * torch.eye(7, dtype=torch.float64)
    parameters = [
        torch.randn(4, dtype=torch.float64, requires_grad=True),
        torch.randn(3, dtype=torch.float64, requires_grad=True),
    ]
    whole = torch.cat(parameters)
    loss = 0.5 * whole @ matrix @ whole + whole.sum()
    v = torch.randn(7, dtype=torch.float64)
    directions = {"v": v.split([4, 3]), "nowhere": torch.zeros(7).double().split([4, 3])}
    found = quadratic_forms(loss, parameters, directions)
    assert found == {"v": pytest.approx(float(v @ matrix @ v / (v @ v)), rel=1e-13)}


def test_a_direction_in_which_the_loss_is_straight_has_no_curvature() -> None:
    x, y = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    directions = {"along y": [torch.zeros_like(x), torch.ones_like(y)]}
    assert quadratic_forms((x**2).sum() + 3 * y.sum(), [x, y], directions) == {"along y": 0.0}


@pytest.mark.parametrize("pattern", ["AF", "AE"])
def test_forms_of_a_transformer_are_those_of_torch_s_hessian_products(pattern: str) -> None:
    model = make_model(pattern=pattern)
    plain = reference_of(model)
    found = measured(model, [make_batch()])
    weights = tuple(each.detach() for each in plain.parameters())
    for name, direction in make_directions(model).items():
        _, product = torch.autograd.functional.vhp(
            lambda *values: loss_of(plain, values), weights, tuple(direction)
        )
        expected = inner(direction, product) / inner(direction, direction)
        assert found[name] == pytest.approx(expected, rel=1e-9)
        assert abs(expected) > 1e-4


def test_forms_are_differences_of_gradients() -> None:
    model = make_model()
    found = measured(model, [make_batch()])
    parameters = list(model.parameters())
    for name, direction in make_directions(model).items():
        ends: list[Sequence[torch.Tensor]] = []
        for sign in (1, -1):
            moved = [
                (each.detach() + sign * 1e-6 * v).requires_grad_()
                for each, v in zip(parameters, direction, strict=True)
            ]
            ends.append(torch.autograd.grad(loss_of(model, moved), moved))
        difference = [(a - b) / 2e-6 for a, b in zip(*ends, strict=True)]
        expected = inner(direction, difference) / inner(direction, direction)
        assert found[name] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_layers_that_recompute_their_forward_pass_have_the_same_curvature(mode: str) -> None:
    expected = measured(make_model(), [make_batch()])
    model = make_model()
    recompute_layers(model.units, mode)
    wrapped = [unit.forward for unit in model.units]
    assert measured(model, [make_batch()]) == pytest.approx(expected, rel=1e-9)
    assert [unit.forward for unit in model.units] == wrapped


def test_rows_in_several_batches_count_alike() -> None:
    model = make_model()
    together = measured(model, [make_batch()])
    assert measured(model, [make_batch(range(3)), make_batch(range(3, 4))]) == pytest.approx(
        together
    )


def test_what_was_measured_is_as_it_was() -> None:
    model, objective = make_model(torch.float32), Likelihood()
    model.compute_dtype = torch.bfloat16
    before = {name: each.clone() for name, each in model.state_dict().items()}
    weights = {name: each.detach() for name, each in model.named_parameters()}
    measured = cast(Objective, objective)
    curvature_along(model, measured, [make_batch()], weights, make_directions(model))
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())
    assert model.compute_dtype is torch.bfloat16
    assert model.training
    assert objective.seen == [0]
    # Attention is of the first order again.
    loss = objective.loss(model, make_batch()).objective
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
