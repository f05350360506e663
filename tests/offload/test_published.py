"""The time models reproduce published measurements on the machines they were taken on.

Figures: logs and plots of Deep Optimizer States (arXiv 2410.21316). Model names overstate; true
parameter counts are used, and published throughputs are nominal.
"""

import pytest

from interlace.offload.hardware import load_profile
from interlace.offload.published import System, Workload, predict_iteration, update_seconds

BOUND = 0.15
H100, A100 = load_profile("4xh100-pcie5"), load_profile("4xa100-pcie4")
TWENTY = 15.33e9


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


@pytest.mark.parametrize(
    ("stride", "throughput"), [(2, 15.3), (3, 14.9), (4, 14.2), (6, 13.3), (8, 13.0), (10, 12.7)]
)
def test_the_stride_sweep(stride: int, throughput: float) -> None:
    load = Workload(TWENTY, stride=stride)
    predicted = predict_iteration(H100, "deep_optimizer_states", load)
    assert predicted.update == pytest.approx(20 / throughput, rel=BOUND)


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
    """The same byte counts, another profile: nothing here was fitted to this machine's updates but
    its memory rate.
    """
    rates = A100.rates
    assert rates is not None
    half = update_seconds(rates, "deep_optimizer_states", Workload(15.58e9, stride=2))
    none = update_seconds(rates, "deep_optimizer_states", Workload(15.58e9, stride=10**9))
    assert half == pytest.approx(3.50, rel=BOUND)
    assert none == pytest.approx(4.05, rel=BOUND)
