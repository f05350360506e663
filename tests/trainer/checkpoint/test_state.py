"""What a checkpoint has to hold for a run to go on: what the rule remembers, and every weight."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from interlace.kernels.update import AdamW, UpdateRule, clipped_sgd
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.offload.schedule import MemoryBudget
from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.checkpoint.ledger import Pool
from interlace.trainer.checkpoint.saves import Target, save
from interlace.trainer.checkpoint.state import Progress, TrainingState, load_newest
from interlace.trainer.engines.fsdp2 import Fsdp2Engine
from interlace.trainer.errors import CheckpointError
from interlace.trainer.world import World

SCALARS = {"config": {}, "corpus_digest": "", "vocabulary_size": 1, "manifest": {}}
LAGGED = clipped_sgd(policy="lagged_quantile")


class Nothing:
    """An objective that remembers nothing."""

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        assert not tensors


class Gate(nn.Module):
    """A parameter with the name of what clipping learns."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.gate = nn.ParameterDict({name: nn.Parameter(torch.zeros(3))})


def state_of(rule: UpdateRule, name: str = "threshold") -> TrainingState:
    model = Gate(name)
    budget = MemoryBudget(10**9, 10**9)
    optimizer = OffloadedOptimizer(model.parameters(), rule, strategy="none", budget=budget)
    return TrainingState(model, Fsdp2Engine(optimizer), Nothing(), World())


def saved_by(state: TrainingState, folder: Path) -> CheckpointStore:
    for parameter in state.model.parameters():
        parameter.grad = torch.ones(3)
    state.engine.step()
    store = CheckpointStore(folder)
    target = Target(store, store.begin_attempt(), SCALARS, Pool(None))
    save(target, state, Progress(step=1))
    return store


def test_thresholds_that_were_not_learnt_yet_are_not_asked_for(tmp_path: Path) -> None:
    before, after = state_of(clipped_sgd()), state_of(LAGGED)
    load_newest(saved_by(before, tmp_path), after)
    (old,), (new,) = before.model.parameters(), after.model.parameters()
    assert torch.equal(old, new)
    assert bool(new.any())
    assert after.engine.optimizer.state[new]["threshold"].tolist() == [0.0]


def test_a_weight_that_is_called_threshold_is_asked_for(tmp_path: Path) -> None:
    store = saved_by(state_of(LAGGED, "other"), tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.gate\.threshold: missing"):
        load_newest(store, state_of(LAGGED))


@pytest.mark.parametrize("rule", [clipped_sgd(momentum=0.0), AdamW()], ids=["stateless", "adamw"])
def test_a_rule_that_remembers_more_is_told_what_to_restore(
    rule: UpdateRule, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_newest(saved_by(state_of(rule), tmp_path), state_of(LAGGED))
    message = str(caught.value)
    assert "optimizer.gate.threshold.momentum_buffer: missing from the checkpoint" in message
    assert "another optimizer.rule, or with optimizer.beta1=0" in message
    assert "start a new run" in message
