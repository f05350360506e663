"""Mixers keep their promises, and each broken promise is caught by the check that is there for it,
and by no other.
"""

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
from token_shift import LastInput, TokenShift

from interlace.trainer.conformance import CHECKS, conform, trial_shape
from interlace.trainer.errors import ConfigError
from interlace.trainer.models import registry
from interlace.trainer.models.context import BlockContext, Routed
from interlace.trainer.models.registry import (
    BUILT_IN,
    Flops,
    SavedElements,
    Traits,
    channel_mixer,
    letter_of,
    registered_letters,
    sequence_mixer,
)

CALLS = count(1)


# Importing the plug-in has registered it, for the tests of other files too.
SHIFT = registry.REGISTERED.pop("S")
registry.SEQUENCE_LETTERS.discard("S")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Know the token shift, and forget it and what a test registers."""
    registry.REGISTERED["S"] = SHIFT
    registry.SEQUENCE_LETTERS.add("S")
    yield
    for letter in ("S", "X"):
        registry.REGISTERED.pop(letter, None)
        registry.SEQUENCE_LETTERS.discard(letter)


def failures_of(kind: Any, name: str = "broken") -> dict[str, str]:
    """Register a mixer as X and return the checks that it fails, with what was measured."""
    if "X" not in registry.REGISTERED:
        sequence_mixer("X", name)(kind)
    report = conform("X", trial_shape("X", {"width": 16, "heads": 2}))
    return {result.check: result.outcome.measured for result in report.failures}


@pytest.mark.parametrize("letter", [*sorted(BUILT_IN), "S"])
def test_every_mixer_of_ours_keeps_its_promises(letter: str) -> None:
    report = conform(letter, trial_shape(letter, {}))
    assert {each.check: each.outcome.measured for each in report.failures} == {}
    assert [each.check for each in report.results] == [check.name for check in CHECKS]


@pytest.mark.parametrize(
    ("letter", "settings"),
    [
        ("A", {"query_key_norm": True, "kv_heads": None, "positions": "none"}),
        ("A", {"attention_backend": "chunked"}),
        ("E", {"moe_router": "sigmoid", "moe_bias_rate": 0.01, "moe_shared_experts": 0}),
        ("M", {"mamba_groups": 2, "mamba_expand": 1.0, "mamba_head_width": 8}),
    ],
    ids=str,
)
def test_promises_hold_at_other_shapes(letter: str, settings: dict[str, object]) -> None:
    report = conform(letter, trial_shape(letter, settings))
    assert {each.check: each.outcome.measured for each in report.failures} == {}


class WrongCount(TokenShift):
    @classmethod
    def parameter_count(cls, config: Any) -> int:
        return super().parameter_count(config) - 1


class MissingRole(TokenShift):
    @classmethod
    def roles(cls, config: Any) -> Any:
        return {"output.weight": "residual"}


class StrangeRole(TokenShift):
    @classmethod
    def roles(cls, config: Any) -> Any:
        return {"output.weight": "residual", "share": "hidden"}


class MissingRows(TokenShift):
    @classmethod
    def row_blocks(cls, config: Any) -> Any:
        return {"output.weight": [("a", config.width // 2), ("b", config.width // 2 - 1)]}


class EqualParts(TokenShift):
    @classmethod
    def row_blocks(cls, config: Any) -> Any:
        half = config.width // 2
        return {"output.weight": [("a", half), ("a", half)], "gone": [("a", 1)]}


class AddsBehindItsMatrix(TokenShift):
    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        return super().forward(x, context) + 0.05 * x


class GlobalRandomness(TokenShift):
    @classmethod
    def initial_value(cls, name: str, shape: Any, config: Any, generator: Any) -> torch.Tensor:
        return super().initial_value(name, shape, config, generator) + 0.01 * torch.rand(shape)


class SqueezesOneByOne(TokenShift):
    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        y = super().forward(x, context)
        return y.squeeze() if x.shape[:2] == (1, 1) else y


class AnswersInFloat32(TokenShift):
    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        y = super().forward(x, context)
        return y.float() if x.dtype is torch.bfloat16 else y


class LooksAhead(TokenShift):
    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        # So little that only bits tell.
        return super().forward(x, context) + 1e-6 * x.mean(1, keepdim=True)


class CarriesNothing(TokenShift):
    def previous(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        return super().previous(x, context) * 0.0


class MixesRows(TokenShift):
    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        return super().forward(x + 0.05 * x.mean(0, keepdim=True), context)


class CrossesDocuments(TokenShift):
    def previous(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        return super().previous(x, BlockContext(context.rotary, None, context.cache))


class DoublesGradients(TokenShift):
    traits = Traits(order=1, decoding="state")

    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        y = super().forward(x, context)
        return y + (y - y.detach())


class Detaches(TokenShift):
    def previous(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        return super().previous(x, context).detach()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.clone()


class DifferentiatesOnce(TokenShift):
    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        return Once.apply(super().forward(x, context))


class StepsStandStill(TokenShift):
    def previous(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        cache = context.cache
        kept = cache.value if isinstance(cache, LastInput) else None
        before = super().previous(x, context)
        if isinstance(cache, LastInput) and kept is not None and x.shape[1] == 1:
            cache.value = kept
        return before


class PartsStartAnew(TokenShift):
    def previous(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        if isinstance(context.cache, LastInput) and x.shape[1] > 1:
            context.cache.value = torch.zeros_like(context.cache.value)
        return super().previous(x, context)


class SharesOneCache(TokenShift):
    kept: LastInput | None = None

    def new_cache(self, batch: int, length: int, like: torch.Tensor) -> LastInput:
        fresh = super().new_cache(batch, length, like)
        if self.kept is None or self.kept.value.shape != fresh.value.shape:
            self.kept = fresh
        self.kept.value.zero_()
        self.kept.length = 0
        return self.kept


class CountsNoPositions(TokenShift):
    def previous(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        before = super().previous(x, context)
        if isinstance(context.cache, LastInput):
            context.cache.length = 0
        return before


class LiesAboutItsCache(TokenShift):
    @classmethod
    def cache_bytes(cls, config: Any, length: int, element_bytes: int) -> int:
        return 4 * config.width


class WrongFlops(TokenShift):
    @classmethod
    def flops_per_token(cls, config: Any, sequence_length: int) -> Flops:
        return Flops(2 * config.width**2, 2 * config.width**2)


class WrongSaved(TokenShift):
    @classmethod
    def saved_elements(cls, config: Any, sequence_length: int) -> SavedElements:
        return SavedElements(kept=config.width, products=config.width)


class WrongProducts(TokenShift):
    @classmethod
    def saved_elements(cls, config: Any, sequence_length: int) -> SavedElements:
        return SavedElements(kept=2 * config.width, products=2 * config.width)


class NotAllIsSaved(TokenShift):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gain = 1.0 + 1e-6 * next(CALLS)

    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        return super().forward(x, context) * self.gain


BROKEN: dict[type[TokenShift], set[str]] = {
    WrongCount: {"parameter count"},
    MissingRole: {"roles"},
    StrangeRole: {"roles"},
    MissingRows: {"row blocks"},
    EqualParts: {"row blocks"},
    AddsBehindItsMatrix: {"residual"},
    GlobalRandomness: {"initial values"},
    SqueezesOneByOne: {"shapes"},
    AnswersInFloat32: {"bfloat16"},
    LooksAhead: {"causality"},
    CarriesNothing: {"reach"},
    MixesRows: {"rows"},
    CrossesDocuments: {"documents"},
    DoublesGradients: {"first derivative"},
    # The gradient that is differentiated again lacks the detached part too.
    Detaches: {"first derivative", "second derivative"},
    DifferentiatesOnce: {"second derivative"},
    StepsStandStill: {"step by step"},
    PartsStartAnew: {"prompt in parts"},
    SharesOneCache: {"fresh cache"},
    CountsNoPositions: {"cache contract"},
    LiesAboutItsCache: {"cache bytes"},
    WrongFlops: {"FLOPs"},
    WrongSaved: {"saved bytes"},
    WrongProducts: {"product bytes"},
    NotAllIsSaved: {"checkpoint"},
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_promise_fails_its_check_and_no_other(kind: type[TokenShift]) -> None:
    assert set(failures_of(kind)) == BROKEN[kind]


def test_a_name_that_recipes_cannot_tell_apart_fails_the_declarations() -> None:
    assert set(failures_of(TokenShift, "Token shift")) == {"declarations"}
    registry.REGISTERED.pop("X")
    assert set(failures_of(TokenShift, "attention")) == {"declarations"}


def test_every_check_has_a_mixer_that_fails_it() -> None:
    covered = set().union(*BROKEN.values()) | {"declarations"}
    assert covered == {check.name for check in CHECKS}


def test_a_channel_mixer_that_carries_information_on_fails_the_reach() -> None:
    channel_mixer("X", "broken")(TokenShift)
    registry.SEQUENCE_LETTERS.discard("X")
    assert set(failures_of(TokenShift)) == {"reach"}


def test_what_is_declared_not_to_hold_is_not_asked_for() -> None:
    class Modest(LooksAhead, CrossesDocuments, DifferentiatesOnce):
        traits = Traits(causal=False, resets=False, order=1, decoding="state")

    sequence_mixer("X", "modest")(Modest)
    report = conform("X", trial_shape("X", {"width": 16, "heads": 2}))
    outcomes = {each.check: each.outcome for each in report.results}
    reasons = {
        "causality": "it is declared not causal",
        "documents": "it is declared to cross document boundaries",
        "second derivative": "it is declared to be differentiable once",
    }
    for name, reason in reasons.items():
        assert outcomes[name].verdict == "does not apply"
        assert outcomes[name].advice == reason


def test_wrong_parts_of_a_tensor_are_named() -> None:
    assert failures_of(MissingRows) == {"row blocks": "output.weight has 16 rows, and its parts 15"}
    registry.REGISTERED.pop("X")
    assert failures_of(EqualParts) == {
        "row blocks": "output.weight[a] is there twice; gone is no parameter"
    }


def test_an_error_is_a_failure_that_names_its_line() -> None:
    class Raises(TokenShift):
        def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
            raise RuntimeError("no such thing")

    sequence_mixer("X", "raises")(Raises)
    report = conform("X", trial_shape("X", {"width": 16, "heads": 2}))
    outcome = {each.check: each.outcome for each in report.results}["shapes"]
    assert outcome.measured == "RuntimeError: no such thing"
    assert outcome.advice.startswith("raised in test_conformance.py, line ")
    assert 'raise RuntimeError("no such thing")' in outcome.advice


def test_results_of_routing_are_looked_through_and_checked_themselves() -> None:
    class Routes(TokenShift):
        loads = torch.int64

        def forward(self, x: torch.Tensor, context: BlockContext) -> Any:
            load = torch.zeros(2, dtype=self.loads)
            return Routed(super().forward(x, context), self.share.sum(), load)

    assert failures_of(Routes) == {}
    Routes.loads = torch.float32
    failed = failures_of(Routes)
    assert set(failed) == {"shapes", "bfloat16"}
    assert "load is torch.float32 (2,), not int64 (E,)" in failed["shapes"]


def test_a_shape_that_no_recipe_may_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.width=30: does not split into model.heads=4"):
        trial_shape("A", {"width": 30})


def test_a_mixer_is_found_by_name_and_by_letter() -> None:
    assert letter_of("attention") == letter_of("A") == "A"
    with pytest.raises(
        ConfigError, match=r"mixer nothing: there is no such mixer; known: attention \(A\)"
    ):
        letter_of("nothing")
    assert registered_letters()["S"] == "token_shift"
