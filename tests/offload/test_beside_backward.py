"""What the performance model expects of updates that run beside backward, worked out by hand."""

import pytest

from interlace.offload.hardware import HardwareProfile, load_profile
from interlace.offload.performance_model import solve
from interlace.offload.schedule import Footprint, HiddenWindow, MemoryBudget, Subgroup
from interlace.offload.simulator import simulate

PLENTY = MemoryBudget(10**15, 10**15)
ADAM = Footprint(weight=2, gradient=2, state=12)
CLIPPED = Footprint(weight=2, gradient=2, state=8)
NO_STATE = Footprint(weight=2, gradient=2, state=4)


def updates_of(machine: HardwareProfile, count: int) -> tuple[list[Subgroup], float]:
    """Return subgroups, and what the first takes by itself on the host."""
    subgroups = [Subgroup(10**8, ADAM)] * count
    only = solve(machine, subgroups[:1], PLENTY, strategy="host")
    return subgroups, simulate(only, machine).makespan


@pytest.mark.parametrize("forward", [0.0, 1.0])
def test_however_long_backward_is_the_gradients_that_come_last_are_updated_after_it(
    forward: float,
) -> None:
    machine = load_profile("4xh100-pcie5")
    subgroups, alone = updates_of(machine, 20)
    window = HiddenWindow(backward=1e3, forward=forward)
    schedule = solve(machine, subgroups, PLENTY, window, strategy="host")
    assert schedule.prediction.update_seconds > 10 * alone
    # What forward uses first is what backward reaches last.
    assert schedule.prediction.exposed_seconds == pytest.approx(alone)


def test_a_short_backward_hides_no_more_than_itself() -> None:
    machine = load_profile("4xh100-pcie5")
    subgroups, alone = updates_of(machine, 20)
    update = solve(machine, subgroups, PLENTY, strategy="host").prediction.update_seconds
    window = HiddenWindow(backward=0.25 * update)
    expected = solve(machine, subgroups, PLENTY, window, strategy="host").prediction
    assert expected.exposed_seconds == pytest.approx(0.75 * update)
    assert expected.exposed_seconds > alone


@pytest.mark.parametrize("machine", ["h200", "4xh100-pcie5"])
def test_less_state_is_a_shorter_update_on_every_machine(machine: str) -> None:
    profile = load_profile(machine)
    seconds = [
        simulate(
            solve(profile, [Subgroup(10**8, each)] * 20, PLENTY, strategy=strategy), profile
        ).makespan
        for strategy in ("host", "none")
        for each in (ADAM, CLIPPED, NO_STATE)
    ]
    assert seconds[0] > seconds[1] > seconds[2]
    assert seconds[3] > seconds[4] > seconds[5]
