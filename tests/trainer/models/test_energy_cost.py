"""What an energy model says it costs is what is counted."""

import gc
from typing import Any

import pytest
import torch
from energy_cases import SETTINGS, SHAPES, VOCABULARY, build, draws_of, flop_counter, rows_of

from interlace.trainer.config.energy_section import EnergySection
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.conformance.live_memory import LiveTensors, PeakMemory
from interlace.trainer.models.cost import ForwardPass
from interlace.trainer.models.energy.cost import (
    activation_bytes,
    flops_per_token,
    kept_bytes,
    parameter_count,
)
from interlace.trainer.models.energy.model import EnergyModel


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_counted_exactly(shape: str, settings: str) -> None:
    model = EnergyModel(SHAPES[shape], SETTINGS[settings], VOCABULARY)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_count(SHAPES[shape], SETTINGS[settings], VOCABULARY) == counted


@pytest.mark.parametrize("inner", ["graph_free", "plain"])
@pytest.mark.parametrize("settings", [name for name in SETTINGS if name != "adaLN"])
@pytest.mark.parametrize("shape", ["grouped", "mixed"])
def test_flops_are_those_of_the_flop_counter(shape: str, settings: str, inner: str) -> None:
    energy = SETTINGS[settings].model_copy(update={"inner_step": inner})
    energy = energy.model_copy(update={"fewest_last_steps": energy.most_last_steps})
    # The counter does not know the CPU's fused attention.
    section = SHAPES[shape].model_copy(update={"attention_backend": "chunked"})
    model, rows = build(section, energy, torch.float32), rows_of(2, 16)
    documents = {"segments": rows["segments"], "positions": rows["positions"]}
    with flop_counter() as forward:
        loss = model(rows["tokens"], rows["targets"], draws_of(energy, 2), **documents)
    with flop_counter() as backward:
        loss.objective.backward()
    expected = flops_per_token(section, energy, VOCABULARY, 16)
    assert forward.get_total_flops() == expected.forward * 32
    assert backward.get_total_flops() == expected.backward * 32


def measured(
    memory: LiveTensors,
    shape: ModelSection,
    energy: EnergySection,
    rows: int,
    dtype: torch.dtype,
    checkpointing: Any,
) -> tuple[int, torch.Tensor]:
    """Return what is alive after a forward pass, in bytes, and the objective."""
    model = EnergyModel(shape, energy, VOCABULARY, dtype, checkpointing)
    model.to(dtype).initialise(0)
    given, draws = rows_of(rows, 64), draws_of(energy, rows)
    documents = {"segments": given["segments"], "positions": given["positions"]}
    with memory:
        objective = model(given["tokens"], given["targets"], draws, **documents).objective
    gc.collect()
    return memory.bytes(), objective


class ForgetfulPeak(PeakMemory):
    """Forgets what is gone, so that looking costs no more with every operation."""

    def bytes(self) -> int:
        self.noted = {key: each for key, each in self.noted.items() if not each[0].expired()}
        return super().bytes()


def peak_of(energy: EnergySection, rows: int, checkpointing: str) -> int:
    memory = ForgetfulPeak()
    _, objective = measured(memory, WIDE, energy, rows, torch.float32, checkpointing)
    with memory:
        objective.backward()
    return memory.peak


def forward_of(dtype: torch.dtype, checkpointing: Any, rows: int = 2) -> ForwardPass:
    return ForwardPass(
        tokens=64 * rows,
        sequence_length=64,
        bytes_per_element=dtype.itemsize,
        checkpointing=checkpointing,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
@pytest.mark.parametrize(
    ("shape", "settings"), [("plain", "S1"), ("grouped", "S2"), ("mixed", "detached, last")]
)
def test_kept_bytes_are_those_that_stay_alive(
    shape: str, settings: str, checkpointing: str, dtype: torch.dtype
) -> None:
    section, energy = SHAPES[shape], SETTINGS[settings]
    # Casts of weights live as long, but their size does not depend on the number of rows.
    many, one = (
        measured(LiveTensors(), section, energy, rows, dtype, checkpointing)[0] for rows in (3, 1)
    )
    kept = kept_bytes(section, energy, VOCABULARY, forward_of(dtype, checkpointing))
    assert kept == pytest.approx(many - one, rel=0.02)


# Wide beside its length, so that attention's scores are few.
WIDE = ModelSection(width=256, heads=2, layers=2, ffn_width=384, attention_backend="chunked")


@pytest.mark.parametrize(
    ("inner", "checkpointing"), [("graph_free", "none"), ("graph_free", "block"), ("plain", "none")]
)
def test_the_peak_is_about_what_is_measured(inner: str, checkpointing: str) -> None:
    energy = EnergySection.model_validate({"inner_step": inner})
    train = {"objective": "energy", "tokens_per_step": 128}
    config = RunConfig.model_validate(
        {"train": train, "data": {"sequence_length": 64}, "energy": energy.model_dump()}
    ).model_copy(update={"model": WIDE})
    many, one = (peak_of(energy, rows, checkpointing) for rows in (3, 1))
    found = activation_bytes(config, VOCABULARY, forward_of(torch.float32, checkpointing))
    assert found == pytest.approx(many - one, rel=0.3)
