"""The replay buffer: rings by row, the same for every number of ranks, whole in a checkpoint."""

from typing import Any

import pytest
import torch

from interlace.trainer.batches import Batch
from interlace.trainer.config.energy_section import EnergySection
from interlace.trainer.models.energy.draws import replaying_rows
from interlace.trainer.objectives.replay import ReplayBuffer, Shape
from interlace.trainer.world import World

SHAPE = Shape(rows=[1, 3], depth=3, length=2, vocabulary_size=5, documents=False)


def batch_of(step: int, rows: range = range(4)) -> Batch:
    tokens = torch.tensor([[10 * step + row] * 2 for row in rows])
    return Batch(tokens, tokens + 1, None, None, step, rows)


def logits_of(step: int, rows: range = range(4)) -> torch.Tensor:
    return torch.tensor([[[float(100 * step + row)] * 5] * 2 for row in rows])


def filled(steps: int, rows: range = range(4), world: Any = None) -> ReplayBuffer:
    buffer = ReplayBuffer(SHAPE, world or World())
    for step in range(steps):
        buffer.keep(batch_of(step, rows), logits_of(step, rows))
    return buffer


@pytest.mark.parametrize(
    ("share", "rows"), [(0.5, [1, 3, 5, 7]), (1.0, list(range(8))), (0.25, [3, 7]), (0.1, [])]
)
def test_rows_that_replay_are_evenly_spread(share: float, rows: list[int]) -> None:
    assert replaying_rows(EnergySection(replay_rows=8, replay_share=share), 8) == rows
    assert replaying_rows(EnergySection(replay_share=share), 8) == []


@pytest.mark.parametrize("rows", [3, 49, 98, 103])
def test_a_share_of_one_row_is_one_row(rows: int) -> None:
    assert replaying_rows(EnergySection(replay_rows=1, replay_share=1 / rows), rows) == [rows - 1]


def test_nothing_is_replayed_in_the_first_step_and_in_validation() -> None:
    assert filled(0).replayed(batch_of(0), seed=0)[1] == []
    assert filled(5).replayed(batch_of(-1), seed=0)[1] == []


def test_a_row_replays_an_earlier_step_s_row_of_its_number_and_no_older_one_than_is_kept() -> None:
    seen: set[int] = set()
    for seed in range(60):
        replayed, rows = filled(7).replayed(batch_of(7), seed)
        assert rows == [1, 3]
        for row, tokens, targets, logits in zip(
            rows, replayed["tokens"], replayed["targets"], replayed["logits"], strict=True
        ):
            step = int(tokens[0]) // 10
            seen.add(step)
            assert tokens.tolist() == [10 * step + row] * 2
            assert targets.tolist() == [10 * step + row + 1] * 2
            assert logits.unique().tolist() == [100 * step + row]
    assert seen == {4, 5, 6}


def test_what_is_not_finite_is_kept_as_even_guesses() -> None:
    buffer, bad = filled(1), logits_of(1)
    bad[1, 0, 2], bad[3] = float("nan"), float("inf")
    buffer.keep(batch_of(1), bad)
    assert buffer.kept["logits"][1].isfinite().all()
    assert not buffer.kept["logits"][1, 1].any()


class Together:
    """Stands in for a world: notes what one rank brings to a sum, and adds what the other did."""

    def __init__(self) -> None:
        self.brought: list[torch.Tensor] = []
        self.others: list[torch.Tensor] = []

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.brought.append(values.clone())
        return values + self.others.pop(0) if self.others else values


@pytest.mark.parametrize("parts", [(range(2), range(2, 4)), (range(1), range(1, 4))])
def test_two_ranks_together_have_the_buffer_of_one(parts: tuple[range, range]) -> None:
    whole = filled(5).state()
    first, second = Together(), Together()
    one, two = filled(5, parts[0], first), filled(5, parts[1], second)
    one.state()
    # A rank without rows that replay takes part all the same.
    assert len(first.brought) == len(whole)
    second.others = first.brought
    for name, tensor in two.state().items():
        assert torch.equal(tensor, whole[name]), name
    # Until something is kept again there is nothing to exchange.
    two.state()
    assert len(second.brought) == len(whole)


def test_a_rank_that_goes_on_after_a_checkpoint_brings_its_rows_only() -> None:
    world = Together()
    buffer = ReplayBuffer(SHAPE, world)  # type: ignore[arg-type]
    buffer.restore(filled(5).state())
    buffer.keep(batch_of(5, range(2)), logits_of(5, range(2)))
    buffer.state()
    logits = world.brought[-1]
    assert logits[5 % 3, 0].unique().tolist() == [501.0]
    assert logits[4 % 3, 0].unique().tolist() == [401.0]
    assert not logits[:, 1].any()


def test_what_is_saved_is_restored() -> None:
    saved = {name: tensor.clone() for name, tensor in filled(5).state().items()}
    buffer = filled(2)
    buffer.restore(saved)
    for name, tensor in buffer.state().items():
        assert torch.equal(tensor, saved[name])
    assert set(saved) == {"replay.tokens", "replay.targets", "replay.logits"}
