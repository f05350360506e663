"""Lanes: order, failures that reach everyone and hang nobody, threads of their own."""

import os
import threading
import time

import pytest
import torch

from interlace.offload.cores import (
    CoreShare,
    CpuPool,
    bind_rank,
    core_share,
    local_ranks,
    parse_core_list,
    usable_cores,
)
from interlace.offload.hardware import resident_bytes
from interlace.offload.lanes import Lane, LaneError, Lanes, Throttle
from interlace.offload.memory import HostSlabs


def test_work_waits_for_what_it_depends_on_across_lanes() -> None:
    first, second = Lane("h2d"), Lane("cpu")
    gate, done = threading.Event(), []
    a = first.submit(lambda: void(gate.wait(5)) or done.append("a"), what="copy in")
    b = second.submit(lambda: done.append("b"), what="update", after=(a,))
    c = second.submit(lambda: done.append("c"), what="update")
    c.wait()
    assert done == ["c"]
    gate.set()
    b.wait()
    assert done == ["c", "a", "b"]
    assert a.start <= a.stop <= b.start <= b.stop
    first.close()
    second.close()


def void(_: object) -> None:
    return None


def test_urgent_work_goes_first() -> None:
    lane = Lane("device")
    gate, done = threading.Event(), []
    lane.submit(lambda: void(gate.wait(5)), what="update")
    lane.submit(lambda: done.append("patient"), what="update")
    lane.submit(lambda: done.append("urgent"), what="update", urgent=True)
    gate.set()
    lane.close()
    assert done == ["urgent", "patient"]


def test_a_failure_reaches_everything_that_depends_on_it_and_nothing_else() -> None:
    lanes = Lanes(torch.device("cpu"), CpuPool(1))

    def fail() -> None:
        raise OSError("the link is down")

    broken = lanes.h2d.submit(fail, what="copy in", subgroup=3)
    update = lanes.compute.submit(lambda: None, what="update", subgroup=3, after=(broken,))
    back = lanes.d2h.submit(lambda: None, what="copy out", subgroup=3, after=(update,))
    other = lanes.h2d.submit(lambda: None, what="copy in", subgroup=4)
    with pytest.raises(LaneError, match="copy out of subgroup 3 failed on lane d2h") as caught:
        back.wait()
    assert "the link is down" in str(caught.value)
    other.wait()
    lanes.close()


def test_a_throttled_copy_takes_the_time_of_its_bytes() -> None:
    lanes = Lanes(torch.device("cpu"), CpuPool(1), Throttle(h2d_bytes_per_second=1e6))
    ticket = lanes.h2d.submit(lambda: None, what="copy in", bytes=50_000)
    ticket.wait()
    assert ticket.stop - ticket.start >= 0.05
    free = lanes.d2h.submit(lambda: None, what="copy out", bytes=50_000)
    free.wait()
    assert free.stop - free.start < 0.05
    lanes.close()


def test_the_pool_covers_a_range_once_in_cache_line_steps() -> None:
    pool = CpuPool(3)
    for elements in (0, 1, 63, 64, 65, 1000, 12345):
        seen: list[tuple[int, int]] = []
        pool.over_range(elements, lambda a, b, seen=seen: seen.append((a, b)))
        parts = sorted(seen)
        assert all(a % 64 == 0 for a, _ in parts)
        covered = [n for a, b in parts for n in (a, b)]
        assert covered == sorted(covered)
        assert sum(b - a for a, b in parts) == elements
    pool.close()


def test_the_pool_s_threads_are_its_own_whatever_a_launcher_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pool = CpuPool()
    assert pool.threads == len(usable_cores())
    gate = threading.Barrier(pool.threads, timeout=10)
    where: list[set[int]] = []

    def note(_: int, __: int) -> None:
        gate.wait()
        where.append(set(os.sched_getaffinity(0)))

    pool.over_range(64 * pool.threads, note)
    # Every thread on a core of its own; the process itself stays free.
    assert sorted(where, key=min) == [{core} for core in sorted(usable_cores())]
    assert set(os.sched_getaffinity(0)) == usable_cores()
    pool.close()


def test_a_failing_share_is_raised() -> None:
    pool = CpuPool(2)

    def fail(start: int, _: int) -> None:
        if start:
            raise ArithmeticError("no")

    with pytest.raises(ArithmeticError, match="no"):
        pool.over_range(1000, fail)
    pool.close()


def test_slabs_have_exactly_their_size_and_start_at_zero() -> None:
    pool = CpuPool(2)
    slabs = HostSlabs(pool, pin=False)
    before = resident_bytes()
    slab = slabs.empty(40_000_001, torch.float32)
    assert slab.numel() == 40_000_001
    assert slab.untyped_storage().nbytes() == 160_000_004
    assert not bool(slab.any())
    # Touched: the pages are there. A power of two would be 268 MB.
    taken = resident_bytes() - before
    assert 120e6 < taken < 220e6
    assert slabs.empty(0, torch.bfloat16).numel() == 0
    pool.close()


def test_ranks_of_a_host_come_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert local_ranks() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert local_ranks() == 4


def test_ranks_of_a_host_divide_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interlace.offload.cores.usable_cores", lambda: set(range(8)))
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        shares.append(core_share(None))
    assert [share.cores for share in shares] == [(0, 1), (2, 3), (4, 5)]
    assert {share.ranks for share in shares} == {1}
    # A container or a launcher restricted the process: other ranks may have the same cores.
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert core_share(None).cores == tuple(range(8))
    assert core_share(None).ranks == 3
    pool = CpuPool()
    assert pool.threads == 2
    pool.close()


def test_a_rank_is_bound_to_its_cores_and_then_has_them_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cores, bound = set(range(8)), []

    def bind(process: int, wanted: list[int]) -> None:
        bound.append((process, wanted))
        cores.intersection_update(wanted)

    monkeypatch.setattr("interlace.offload.cores.usable_cores", lambda: set(cores))
    monkeypatch.setattr("os.sched_setaffinity", bind)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("INTERLACE_HOST_CORES", raising=False)
    # Undone at the end, whatever is set in between.
    monkeypatch.setenv("INTERLACE_RANK_CORES", "")
    # Half of a host that somebody restricted: nobody knows who else has it.
    bind_rank(None)
    assert bound == []
    # The launcher says that it had these cores, so they are for its two ranks.
    monkeypatch.setenv("INTERLACE_HOST_CORES", "0-7")
    bind_rank(None)
    assert bound == [(0, [4, 5, 6, 7])]
    assert core_share(None) == CoreShare((4, 5, 6, 7), 1)
    bind_rank(None)
    assert len(bound) == 1


def test_a_rank_that_is_alone_on_its_host_is_not_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: pytest.fail("bound"))
    bind_rank(None)


def test_a_list_of_cores_is_read_as_the_kernel_writes_it() -> None:
    assert parse_core_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_core_list("") == set()


def test_closing_does_what_is_ready_first() -> None:
    lane, done = Lane("cpu"), []
    for number in range(20):
        lane.submit(lambda number=number: void(time.sleep(0)) or done.append(number), what="update")
    lane.close()
    assert done == list(range(20))
