"""A checkpoint that is taken while an update goes on holds one step, whole."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from interlace.kernels.update import SGD
from interlace.offload.hardware import HardwareProfile
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.offload.options import OffloadOptions
from interlace.offload.schedule import Home, MemoryBudget
from interlace.trainer.checkpoint.ledger import Pool
from interlace.trainer.checkpoint.live import Source
from interlace.trainer.checkpoint.snapshot import Snapshot
from interlace.trainer.checkpoint.state import TrainingState
from interlace.trainer.checkpoint.tensors import TensorReader
from interlace.trainer.engines.fsdp2 import Fsdp2Engine
from interlace.trainer.world import World

PARTS, ELEMENTS = 16, 8_000_000
"""128M bfloat16 weights: masters and momentum are 1.02 GB, the stored checkpoint likewise."""


class NothingMore:
    """An objective that remembers nothing."""

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        assert not tensors


@pytest.fixture
def training(profile: HardwareProfile) -> tuple[torch.nn.ParameterList, OffloadedOptimizer]:
    """Weights and an optimizer that updates them beside the next forward, in every home."""
    model = torch.nn.ParameterList(
        torch.nn.Parameter(torch.zeros(ELEMENTS, dtype=torch.bfloat16)) for _ in range(PARTS)
    )
    optimizer = OffloadedOptimizer(
        model.parameters(),
        SGD(lr=1.0, momentum=1.0),
        strategy="host",
        overlap="forward",
        budget=MemoryBudget(10**10, 10**10),
        profile=profile,
        model=model,
        options=OffloadOptions(subgroup_elements=ELEMENTS),
    )
    optimizer.rehome([list(Home)[number % 3] for number in range(PARTS)])
    return model, optimizer


def test_a_gigabyte_saved_beside_updates_is_never_torn(
    training: tuple[torch.nn.ParameterList, OffloadedOptimizer], tmp_path: Path
) -> None:
    model, optimizer = training
    state = TrainingState(model, Fsdp2Engine(optimizer), NothingMore(), World())
    ones = torch.ones(ELEMENTS, dtype=torch.bfloat16)

    def update() -> None:
        for weight in model:
            weight.grad = ones.clone()
        optimizer.step()

    update()
    pool = Pool(None)
    for step in range(1, 4):
        # An update has just been launched when the snapshot is taken, and the next one follows at
        # once, while the snapshot is read.
        path = tmp_path / f"step-{step}.safetensors"
        sources = [source for live in state.live() if (source := Source.of(live, 0)) is not None]
        snapshot = Snapshot(sources, pool, path, torch.device("cpu"))
        update()
        snapshot.wait()
        assert snapshot.written is not None, snapshot.error
        _, index = snapshot.written
        reader = TensorReader(index, {path.name: path})
        # Momentum 1 and gradients of 1: the buffer counts steps, the master sums the counts.
        for name in index:
            stored = reader.read_whole(name)
            expected = float(step)
            if name.startswith("model."):
                expected = -step * (step + 1) / 2
            assert bool((stored == expected).all()), (step, name)
        path.unlink()
    assert snapshot.ledger.copied_bytes > 0
    optimizer.close()
