"""The simulator reproduces published measurements on the machines they were taken on.

Figures: logs and plots of Deep Optimizer States (arXiv 2410.21316). Model names overstate; true
parameter counts are used, and published throughputs are nominal.
"""

import re
from pathlib import Path

import pytest

from interlace.offload.hardware import load_profile, with_active_ranks
from interlace.offload.performance_model import fixed_homes
from interlace.offload.published import (
    INTERLEAVED,
    ZERO3,
    System,
    Workload,
    predict_iteration,
    update_seconds,
)
from interlace.offload.schedule import Home, Prediction, Schedule, Subgroup
from interlace.offload.simulator import simulate

BOUND = 0.15
H100, A100 = load_profile("4xh100-pcie5"), load_profile("4xa100-pcie4")
TWENTY = 15.33e9
SWEEP = [(2, 15.3), (3, 14.9), (4, 14.2), (6, 13.3), (8, 13.0), (10, 12.7)]
"""Stride and nominal billions of parameters updated per second, "20B" on four H100."""


@pytest.mark.parametrize(
    ("system", "resident", "update", "iteration"),
    [
        ("zero3", 0.0, 2.28, 7.29),
        ("zero3_async_flush", 0.0, 2.29, 3.81),
        ("deep_optimizer_states", 0.0, 1.30, 2.97),
        ("zero3", 0.2, 1.79, 5.88),
        ("zero3_async_flush", 0.2, 1.78, 3.24),
        ("deep_optimizer_states", 0.2, 1.00, 2.62),
        ("zero3", 0.5, 1.17, 4.26),
        ("zero3_async_flush", 0.5, 1.17, 2.55),
        ("deep_optimizer_states", 0.5, 0.68, 2.21),
    ],
)
def test_the_20b_model_on_four_h100(
    system: System, resident: float, update: float, iteration: float
) -> None:
    predicted = predict_iteration(H100, system, Workload(TWENTY, resident_share=resident))
    assert predicted.update == pytest.approx(update, rel=BOUND)
    assert predicted.total == pytest.approx(iteration, rel=BOUND)


@pytest.mark.parametrize(("stride", "throughput"), SWEEP)
def test_the_stride_sweep_is_the_simulator_s(stride: int, throughput: float) -> None:
    """The published system is a footprint and one slot; the log says 31 subgroups per rank."""
    homes = fixed_homes("stride", 31, stride)
    assert homes is not None
    subgroups = (Subgroup(round(TWENTY / 4 / 31), INTERLEAVED),) * 31
    unknown = Prediction(0.0, 0.0, {}, "dram")
    schedule = Schedule("stride", subgroups, tuple(homes), 1, unknown)
    played = simulate(schedule, H100).makespan
    assert played == pytest.approx(20 / throughput, rel=BOUND)
    load = Workload(TWENTY, stride=stride)
    composed = predict_iteration(H100, "deep_optimizer_states", load).update
    assert composed == pytest.approx(played, rel=0.05)


def test_the_update_without_interleaving() -> None:
    predicted = predict_iteration(H100, "zero3", Workload(TWENTY))
    assert predicted.update == pytest.approx(20 / 8.6, rel=BOUND)


@pytest.mark.parametrize(
    ("parameters", "nominal", "zero3", "interleaved"),
    [
        (5.95e9, 7.0, 7.9, 14.2),
        (9.14e9, 8.3, 6.0, 10.7),
        (9.92e9, 10.0, 6.7, 11.9),
        (11.32e9, 13.0, 7.7, 13.6),
    ],
)
def test_other_models_on_four_h100(
    parameters: float, nominal: float, zero3: float, interleaved: float
) -> None:
    load = Workload(parameters)
    plain = predict_iteration(H100, "zero3", load).update
    staged = predict_iteration(H100, "deep_optimizer_states", load).update
    assert plain == pytest.approx(nominal / zero3, rel=BOUND)
    assert staged == pytest.approx(nominal / interleaved, rel=BOUND)


@pytest.mark.parametrize(
    ("micro_batch", "zero3", "interleaved"),
    [(1, 7.3, 3.0), (2, 7.7, 3.3), (4, 8.8, 4.4), (8, 10.8, 6.8)],
)
def test_the_micro_batch_sweep(micro_batch: int, zero3: float, interleaved: float) -> None:
    load = Workload(TWENTY, tokens=2048 * micro_batch)
    plain = predict_iteration(H100, "zero3", load).total
    staged = predict_iteration(H100, "deep_optimizer_states", load).total
    assert plain == pytest.approx(zero3, rel=BOUND)
    assert staged == pytest.approx(interleaved, rel=BOUND)


def test_another_machine_four_a100() -> None:
    """The same byte counts, another profile; of its updates only the rates of CPU and memory come
    from the same logs.
    """
    rates = A100.rates
    assert rates is not None
    half = update_seconds(rates, "deep_optimizer_states", Workload(15.58e9, stride=2))
    none = update_seconds(rates, "deep_optimizer_states", Workload(15.58e9, stride=10**9))
    assert half == pytest.approx(3.50, rel=BOUND)
    assert none == pytest.approx(4.05, rel=BOUND)


@pytest.mark.parametrize(
    ("system", "first", "sixteenth"),
    [("zero3", 19.8, 90.6), ("deep_optimizer_states", 13.4, 80.6)],
)
def test_what_a_further_pass_takes_with_accumulation(
    system: System, first: float, sixteenth: float
) -> None:
    """ "13B" on one A100. The micro-batch is not published; two sequences fit its times."""
    alone = with_active_ranks(A100, 1)
    times = [
        predict_iteration(alone, system, Workload(11.32e9, tokens=4096, accumulation=passes)).total
        for passes in (1, 16)
    ]
    assert (times[1] - times[0]) / 15 == pytest.approx((sixteenth - first) / 15, rel=BOUND)


def test_bytes_of_the_published_updates_are_counted_in_full() -> None:
    """48 bytes of host memory on the CPU (42 where it does not stage the upload, 2 the device's
    reading), 24 staged, 60 of device memory; 42 bytes' time of a one-pass CPU update.
    """
    assert INTERLEAVED.host_dram - INTERLEAVED.gradient == 48
    assert ZERO3.host_dram - ZERO3.gradient == 44
    for footprint in (ZERO3, INTERLEAVED):
        assert footprint.staged_dram == 24
        assert (footprint.device_update, footprint.host_update) == (60, 42)


def test_a_cpu_that_waits_for_its_uploads_takes_as_long_as_both() -> None:
    rates = A100.rates
    assert rates is not None
    subgroups = (Subgroup(10**8, ZERO3),) * 4
    schedule = Schedule("host", subgroups, (Home.HOST,) * 4, 1, Prediction(0.0, 0.0, {}, "cpu"))
    timeline = simulate(schedule, A100)
    assert timeline.makespan == pytest.approx(
        timeline.busy_seconds["cpu"] + timeline.busy_seconds["h2d"]
    )


def test_the_table_of_the_guide_is_what_its_snippet_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    guide = Path(__file__).parents[2] / "docs" / "offload.md"
    text = guide.read_text(encoding="utf-8").partition("## Checked against published figures")[2]
    snippet = re.search(r"```python\n(.*?)```\n\n(.*?)\n\n", text, flags=re.DOTALL)
    assert snippet is not None
    exec(snippet[1], {})
    printed = capsys.readouterr().out.strip()
    assert printed == snippet[2]
    pairs = re.findall(r"([\d.]+) / ([\d.]+)", printed)
    assert len(pairs) > 15
    for predicted, published in pairs:
        assert float(predicted) == pytest.approx(float(published), rel=BOUND)
