"""The simulator against schedules small enough to compute by hand."""

import json
from pathlib import Path

import pytest

from interlace.offload.hardware import HardwareProfile, OffloadRates
from interlace.offload.performance_model import solve
from interlace.offload.schedule import Footprint, Home, MemoryBudget, Schedule, Subgroup
from interlace.offload.simulator import simulate, water_level
from interlace.offload.timeline import LANES, Timeline, draw_gantt, write_chrome_trace

# 10 elements: 120 bytes staged, 20 bytes of weights, 280 bytes of update.
FOOTPRINT = Footprint(weight=2, gradient=2, state=12)


def machine(**rates: float) -> HardwareProfile:
    usual: dict[str, float] = {
        "h2d_bytes_per_second": 120.0,
        "d2h_bytes_per_second": 120.0,
        "pageable_bytes_per_second": 1.0,
        "cpu_update_bytes_per_second": 140.0,
        "cpu_cast_elements_per_second": 1.0,
        "device_update_bytes_per_second": 2800.0,
        "host_dram_bytes_per_second": 1e9,
        "collective_bytes_per_second": 1.0,
        "network_bytes_per_second": 1.0,
    }
    return HardwareProfile(
        device_name="toy",
        matmul_flops=1.0,
        device_memory_bytes=1,
        host_memory_bytes=1,
        rates=OffloadRates.model_validate(usual | rates),
    )


def schedule(homes: list[Home], slots: int = 2) -> Schedule:
    memory = MemoryBudget(10**9, 10**9)
    found = solve(machine(), [Subgroup(10, FOOTPRINT)] * len(homes), memory, strategy="host")
    return Schedule("optimal", found.subgroups, tuple(homes), slots, found.prediction)


def span(timeline: Timeline, what: str, subgroup: int) -> tuple[float, float]:
    [event] = [e for e in timeline.events if (e.what, e.subgroup) == (what, subgroup)]
    return event.start, event.stop


def test_a_host_update_sends_its_weights_while_the_next_is_computed() -> None:
    timeline = simulate(schedule([Home.HOST] * 2), machine())
    assert span(timeline, "update", 0) == pytest.approx((0.0, 2.0))
    assert span(timeline, "weights", 0) == pytest.approx((2.0, 2.0 + 1 / 6))
    assert span(timeline, "update", 1) == pytest.approx((2.0, 4.0))
    assert timeline.makespan == pytest.approx(4.0 + 1 / 6)


def test_a_slot_is_used_again_after_its_state_has_left() -> None:
    timeline = simulate(schedule([Home.STAGED] * 3), machine())
    assert span(timeline, "copy in", 1) == pytest.approx((1.0, 2.0))
    assert span(timeline, "update", 0) == pytest.approx((1.0, 1.1))
    assert span(timeline, "copy out", 0) == pytest.approx((1.1, 2.1))
    # Two slots: the third subgroup waits until the first has left.
    assert span(timeline, "copy in", 2)[0] == pytest.approx(2.1)
    three = simulate(schedule([Home.STAGED] * 3, slots=3), machine())
    assert span(three, "copy in", 2)[0] == pytest.approx(2.0)


def test_copies_in_both_directions_slow_each_other_down() -> None:
    slow = machine(duplex_efficiency=0.6)
    timeline = simulate(schedule([Home.STAGED] * 2), slow)
    # 0.9 s alone remain of the second copy in when the first copy out begins.
    assert span(timeline, "copy in", 1)[1] == pytest.approx(1.1 + 0.9 / 0.6)


def test_ranks_share_host_memory() -> None:
    # Each of two ranks may have 70 bytes/s: half of what its CPU could do.
    shared = machine(host_dram_bytes_per_second=140.0, ranks_per_node=2)
    timeline = simulate(schedule([Home.HOST]), shared)
    assert span(timeline, "update", 0) == pytest.approx((0.0, 4.0))


def test_small_demands_are_met_and_large_ones_share_the_rest() -> None:
    def granted(wanted: list[float]) -> list[float]:
        level = water_level(wanted, 100.0)
        return [min(wish, level) for wish in wanted]

    assert granted([10.0, 100.0, 60.0]) == pytest.approx([10.0, 45.0, 45.0])
    assert granted([50.0, 10.0, 60.0]) == pytest.approx([45.0, 10.0, 45.0])
    assert granted([10.0, 20.0]) == [10.0, 20.0]


def test_residents_fill_the_device_s_pauses_and_hold_nobody_up() -> None:
    homes = [Home.RESIDENT] * 30 + [Home.STAGED]
    timeline = simulate(schedule(homes), machine())
    # The staged update starts with the first resident's end after its copy, not after all thirty.
    assert span(timeline, "update", 30)[0] <= 1.1 + 1e-9
    assert timeline.busy_seconds["device"] == pytest.approx(3.1)


def test_every_piece_takes_its_overhead() -> None:
    timeline = simulate(schedule([Home.HOST]), machine(piece_overhead_seconds=0.5))
    assert timeline.makespan == pytest.approx(2.5 + 1 / 6 + 0.5)


def test_a_trace_opens_in_a_browser_and_a_picture_shows_the_lanes(tmp_path: Path) -> None:
    timeline = simulate(schedule([Home.HOST, Home.STAGED, Home.RESIDENT]), machine())
    write_chrome_trace({"predicted": timeline}, tmp_path / "trace.json")
    records = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert {r["args"]["name"] for r in records if r["name"] == "process_name"} == {"predicted"}
    assert len([r for r in records if r["name"] == "thread_name"]) == len(LANES)
    pieces = [r for r in records if r["ph"] == "X"]
    assert len(pieces) == len(timeline.events) == 6
    copy_in = next(r for r in pieces if r["name"] == "copy in 1")
    assert (copy_in["ts"], copy_in["dur"]) == pytest.approx((0.0, 1e6))
    assert copy_in["args"] == {"subgroup": 1, "bytes": 120}
    draw_gantt({"predicted": timeline, "empty": Timeline(())}, tmp_path / "lanes.png")
    assert (tmp_path / "lanes.png").stat().st_size > 10_000
