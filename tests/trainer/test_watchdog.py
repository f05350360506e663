"""A rank that stops making progress is noticed from outside, told apart from those that wait for
it, and ended.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from watched_ranks import PATIENCE, hung_rank, rank, two_ranks

from interlace.trainer.ends import ends_of, first_failure
from interlace.trainer.exits import Exit
from interlace.trainer.heartbeat import Heartbeat, OwnTime, Pulse, read_pulse, shared_memory
from interlace.trainer.stragglers import WINDOW, Stragglers
from interlace.trainer.watchdog.patience import LEAST_SECONDS, Patience
from interlace.trainer.watchdog.reports import Report, alarms_of
from interlace.trainer.watchdog.stacks import frames_of
from interlace.trainer.watchdog.verdict import culprits, is_stall, page, verdict

# ---- the pulse -----------------------------------------------------------------------------------


def test_what_a_rank_marks_is_read_through_another_mapping_of_the_memory() -> None:
    import mmap

    descriptor, memory = shared_memory()
    other = mmap.mmap(descriptor, len(memory), prot=mmap.PROT_READ)
    os.close(descriptor)
    heartbeat = Heartbeat(memory)
    heartbeat.enter("data", 7)
    heartbeat.enter("forward")
    heartbeat.beat()
    assert read_pulse(other) == Pulse(marks=2, beats=3, step=7, phase="forward", patient=True)


def patience_over(phases: Sequence[str]) -> list[bool]:
    heartbeat = Heartbeat()
    patient: list[bool] = []
    for phase in phases:
        heartbeat.enter(phase)
        patient.append(heartbeat.pulse.patient)
    return patient


def test_more_patience_is_asked_for_until_the_second_exchange_is_over() -> None:
    step = ["data", "forward", "backward", "exchange", "norm", "update"]
    assert patience_over([*step, *step]) == [True] * 10 + [False] * 2


def test_after_a_slow_phase_more_patience_is_asked_for_until_all_ranks_have_met_again() -> None:
    warm = ["data", "exchange", "data", "exchange"]
    asked = patience_over([*warm, "update", "save", "data", "forward", "exchange", "norm"])
    assert asked[len(warm) :] == [False, True, True, True, True, False]


def test_waiting_is_not_counted_as_a_rank_s_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"wall": 0.0, "thread": 0.0, "process": 0.0}
    clocks = {"data": "wall", "forward": "thread", "backward": "thread", "update": "process"}
    monkeypatch.setattr(
        "interlace.trainer.heartbeat._CLOCKS",
        {phase: lambda clock=clock: now[clock] for phase, clock in clocks.items()},
    )
    own = OwnTime()
    for phase, worked, waited in (
        ("data", 1.0, 2.0),
        ("forward", 4.0, 64.0),
        ("exchange", 0.0, 64.0),
        ("update", 8.0, 64.0),
    ):
        own.enter(phase)
        now["wall"] += worked + waited
        now["thread"] += worked
        now["process"] += worked
    own.enter("observe")
    assert own.take() == (1.0 + 2.0) + 4.0 + 8.0
    assert own.take() == 0.0


# ---- patience ------------------------------------------------------------------------------------


def pulse(beats: int, patient: bool = False) -> Pulse:
    return Pulse(marks=beats, beats=beats, step=1, phase="forward", patient=patient)


def test_a_rank_is_late_when_it_was_silent_for_longer_than_the_limit() -> None:
    patience = Patience(8.0)
    patience.observe(pulse(1), 0.0)
    patience.observe(pulse(1), 8.0)
    assert not patience.lost
    patience.observe(pulse(1), 0.1)
    assert patience.lost
    patience.observe(pulse(2), 0.1)
    assert not patience.lost


def test_ten_times_as_much_is_allowed_while_something_long_may_be_under_way() -> None:
    patience = Patience(8.0)
    patience.observe(pulse(1, patient=True), 0.0)
    patience.observe(pulse(1, patient=True), 79.0)
    assert not patience.lost
    patience.observe(pulse(1, patient=True), 2.0)
    assert patience.lost


def test_an_unset_limit_is_five_times_the_longest_usual_interval_but_at_least_two_minutes() -> None:
    patience = Patience(None)
    for beats in range(1, 4):
        patience.observe(pulse(beats), 0.5)
    assert patience.limit == LEAST_SECONDS
    patience.observe(pulse(4), 40.0)
    assert patience.limit == 200.0
    # An hour of saving is not the measure of a step.
    patience.observe(pulse(5, patient=True), 1.0)
    patience.observe(pulse(6), 3600.0)
    assert patience.limit == 200.0


def test_data_that_moves_is_a_sign_of_life_and_a_trickle_is_not() -> None:
    patience = Patience(8.0)
    patience.observe(pulse(1), 0.0)
    for look in range(1, 40):
        patience.observe(pulse(1), 0.5, moved_bytes=look * 2**20)
    assert not patience.lost
    for look in range(40):
        patience.observe(pulse(1), 0.5, moved_bytes=40 * 2**20 + look * 1000)
    assert patience.lost


def test_after_a_false_alarm_twice_as_much_is_allowed_until_the_next_mark() -> None:
    patience = Patience(8.0)
    patience.observe(pulse(1), 0.0)
    patience.extend()
    assert patience.limit == 16.0
    patience.observe(pulse(2), 1.0)
    assert patience.limit == 8.0


# ---- who waits for whom --------------------------------------------------------------------------

IN_GATHER = ['File "/x/site-packages/torch/distributed/distributed_c10d.py", line 4 in wait']
IN_MODEL = ['File "/x/interlace/trainer/run.py", line 4 in backward_of']


def stalled(rank: int, phase: str, marks: int, state: str = "waiting", **more: object) -> Report:
    told = {"limit": 30.0, **more}
    return Report(rank=rank, phase=phase, step=12, marks=marks, idle=34.0, state=state, **told)  # type: ignore[arg-type]


def test_the_rank_that_has_come_least_far_is_the_one_that_others_wait_for() -> None:
    reports = [stalled(rank, "backward" if rank == 1 else "exchange", 50 - (rank == 1), host="a")
               for rank in range(4)]  # fmt: skip
    assert verdict(reports) == (
        "rank 1 has been in backward of step 12 for 34 s on a; "
        "ranks 0, 2, 3 wait for it in exchange of step 12"
    )


def test_a_stopped_rank_is_named_as_such_however_far_it_has_come() -> None:
    reports = [stalled(0, "forward", 49), stalled(1, "backward", 50, "stopped", host="a")]
    assert verdict(reports) == (
        "rank 1 has been in backward of step 12 for 34 s on a, stopped by a signal (SIGSTOP); "
        "rank 0 waits for it in forward of step 12"
    )


def test_within_one_phase_the_rank_outside_of_a_collective_is_the_one() -> None:
    reports = [
        stalled(0, "backward", 50, stack=IN_GATHER),
        stalled(1, "backward", 50, stack=IN_MODEL),
    ]
    assert [report.rank for report in culprits(reports)] == [1]


def test_ranks_that_all_wait_for_each_other_are_told_so() -> None:
    reports = [stalled(rank, "exchange", 50, stack=IN_GATHER) for rank in range(2)]
    assert culprits(reports) == []
    assert verdict(reports) == (
        "all ranks are in exchange of step 12 and wait for each other: the exchange itself hangs "
        "(network), or its partners do not match"
    )


def test_a_rank_whose_watcher_does_not_answer_and_one_that_has_ended_are_named() -> None:
    reports = [stalled(0, "exchange", 50), Report(rank=1), stalled(2, "update", 40, "ended")]
    assert verdict(reports) == (
        "rank 1 no answer: it has left, or its machine is gone; rank 2 ended in update of step 12; "
        "rank 0 waits for them in exchange of step 12"
    )


def test_a_run_is_not_ended_while_those_that_others_wait_for_may_take_their_time() -> None:
    waits, saves = stalled(0, "exchange", 50), stalled(1, "publish", 49, limit=300.0)
    assert waits.late
    assert not is_stall([waits, saves])
    assert is_stall([waits, stalled(1, "publish", 49, limit=33.0)])
    assert is_stall([waits, stalled(1, "publish", 49, "stopped", limit=300.0)])
    assert is_stall([waits, Report(rank=1)])
    assert is_stall([stalled(rank, "exchange", 50, stack=IN_GATHER) for rank in range(2)])


def test_the_page_shows_equal_stacks_once_and_says_where_the_rest_is() -> None:
    reports = [
        stalled(0, "exchange", 50, stack=IN_GATHER),
        stalled(1, "backward", 49, "stopped", host="a"),
        stalled(2, "exchange", 50, stack=IN_GATHER),
    ]
    assert page(reports, "RUN/ends/attempt-1").splitlines()[2:] == [
        "  rank  phase          step    silent  process",
        "     0  exchange         12      34 s  waiting",
        "     1  backward         12      34 s  stopped by a signal (SIGSTOP)",
        "     2  exchange         12      34 s  waiting",
        "rank 1: no Python stack; a stopped process cannot show one",
        "ranks 0, 2, innermost call first:",
        "    torch/distributed/distributed_c10d.py:4 wait",
        "stacks of all threads: RUN/ends/attempt-1/rank-*.stacks",
    ]


def test_the_page_is_there_without_the_report_of_the_rank_that_was_late() -> None:
    reports = [stalled(0, "exchange", 50, limit=120.0), Report(rank=1)]
    assert is_stall(reports)
    lines = page(reports, "RUN").splitlines()
    assert lines[0] == "interlace: the run stands still"
    assert lines[1].startswith("rank 1 no answer: it has left, or its machine is gone")


def test_of_hundreds_of_ranks_the_page_shows_the_guilty_and_one_of_every_kind() -> None:
    reports = [stalled(rank, "exchange", 50, stack=IN_GATHER) for rank in range(512)]
    reports[300] = stalled(300, "backward", 49, stack=IN_MODEL)
    lines = page(reports, "RUN").splitlines()
    assert len(lines) < 15
    assert "511 others, such as rank 0, wait for it in exchange of step 12" in lines[1]
    assert "  510 more ranks are where others are" in lines
    assert any(line.startswith("   300  backward") for line in lines)


def test_the_stack_of_the_training_thread_is_found_among_those_of_all_threads() -> None:
    dump = (
        'Thread 0x00000000000000aa (most recent call first):\n  File "a.py", line 1 in wait\n\n'
        'Current thread 0x00000000000000bb (most recent call first):\n  File "b.py", line 2 in f\n'
        '  File "b.py", line 9 in <module>\n'
    )
    assert frames_of(dump, 0xAA) == ['File "a.py", line 1 in wait']
    assert frames_of(dump, 0xBB)[1] == 'File "b.py", line 9 in <module>'
    assert frames_of("", 0xAA) == []


# ---- a watcher and its rank ----------------------------------------------------------------------


def alive(pid: int) -> bool:
    """Whether a process is still there; one that is about to end is given a moment."""
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return False
        time.sleep(0.1)
    return True


def test_a_rank_that_sleeps_leaves_with_the_status_of_a_stall_and_shows_where(
    tmp_path: Path,
) -> None:
    done = rank(tmp_path, "def slumber():\n    time.sleep(600)\nslumber()\n")
    assert done.returncode == Exit.STALLED, done.stderr
    assert "the run has been in update of step 3 for 1 s" in done.stderr
    assert " slumber" in done.stderr
    end = first_failure(tmp_path)
    assert end is not None
    assert (end.kind, end.status, end.step, end.phase) == ("stalled", 70, 3, "update")
    assert "slumber" in end.traceback
    assert not alive(int(done.stdout))


STOPPED = "os.kill(os.getpid(), signal.SIGSTOP)"
# Nobody answers the read, and PyDLL keeps the lock meanwhile.
LOCKED = "import ctypes; ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)"


@pytest.mark.parametrize("rest", [STOPPED, LOCKED], ids=["stopped", "holding the lock"])
def test_a_rank_that_cannot_leave_is_killed(tmp_path: Path, rest: str) -> None:
    done = rank(tmp_path, rest)
    assert done.returncode == -signal.SIGKILL, done.stderr
    end = first_failure(tmp_path)
    assert end is not None
    assert (end.kind, end.status, end.phase) == ("stalled", 70, "update")
    assert not alive(int(done.stdout))


def test_a_rank_is_ended_though_nobody_reads_what_the_watcher_says(tmp_path: Path) -> None:
    with hung_rank(tmp_path) as process:
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait(PATIENCE) == Exit.STALLED


def test_a_rank_that_marks_its_phases_is_left_alone(tmp_path: Path) -> None:
    done = rank(
        tmp_path,
        "for step in range(40):\n    watch.heartbeat.enter('forward', step)\n    time.sleep(0.05)\n"
        "watch.close()\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert ends_of(tmp_path, 1) == []
    assert list((tmp_path / "ends" / "attempt-1").iterdir()) == []
    assert not alive(int(done.stdout))


def test_a_rank_that_is_killed_is_on_record_and_its_watcher_ends(tmp_path: Path) -> None:
    done = rank(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", seconds=60)
    assert not alive(int(done.stdout))
    end = first_failure(tmp_path)
    assert end is not None
    assert (end.kind, end.status, end.step, end.phase) == ("vanished", None, 3, "update")


def test_a_rank_that_crashes_leaves_the_stack_of_the_crash(tmp_path: Path) -> None:
    done = rank(
        tmp_path, "import ctypes\ndef crash():\n    ctypes.string_at(0)\ncrash()\n", seconds=60
    )
    assert done.returncode == -signal.SIGSEGV
    assert not alive(int(done.stdout))
    end = first_failure(tmp_path)
    assert end is not None
    assert "in crash" in end.traceback


def test_a_rank_goes_on_without_its_watcher_and_says_so(tmp_path: Path) -> None:
    done = rank(
        tmp_path,
        "watch.process.kill(); watch.listener.join(60); watch.close(); print('went on')\n",
    )
    assert done.returncode == 0
    assert "the watcher of rank 0 has ended" in done.stderr
    assert done.stdout.endswith("went on\n")


def test_signals_for_the_ranks_do_not_end_the_watcher(tmp_path: Path) -> None:
    done = rank(
        tmp_path,
        "time.sleep(1)\nfor number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):\n"
        "    os.kill(watch.process.pid, number)\n"
        "time.sleep(0.5); print(watch.process.poll()); watch.close()\n",
        seconds=60,
    )
    assert done.stdout.split()[1] == "None", done.stderr


def test_ranks_that_wait_for_a_slow_one_are_not_ended_as_long_as_it_may_be_slow(
    tmp_path: Path,
) -> None:
    codes, printed = two_ranks(tmp_path, peer_sleeps=4.0)
    assert codes == [0, 0], printed
    assert printed == ""
    alarms = alarms_of(tmp_path / "ends" / "attempt-1")
    assert alarms
    assert {alarm.decision() for alarm in alarms} == {False}
    assert (alarms[0].path / "rank-1.json").exists(), "rank 1 was not asked"


def test_nothing_of_the_environment_is_written_down(tmp_path: Path) -> None:
    rank(tmp_path, "time.sleep(600)\n")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"not-to-be-written-down" in path.read_bytes()]


def test_a_watcher_loads_neither_torch_nor_numpy_nor_site_packages(tmp_path: Path) -> None:
    code = (
        "import sys, interlace.trainer.watchdog.watcher\n"
        "print([m for m in sys.modules if m in ('torch', 'numpy', 'pydantic', 'site')])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.replace("'", '"')) == []


# ---- stragglers ----------------------------------------------------------------------------------


def test_a_slow_rank_is_named_once_after_ten_steps() -> None:
    stragglers = Stragglers(4, 1.5)
    said = [stragglers.observe([1.0, 1.1, 3.0, 0.9]) for _ in range(30)]
    assert [number for number, named in enumerate(said, start=1) if named] == [WINDOW]
    assert said[WINDOW - 1] == {
        2: "rank 2 is slow: its own work takes 3 s a step, that of the median rank 1 s "
        "(over 10 steps); the others wait for it"
    }


def test_of_several_slow_ranks_the_slowest_comes_first() -> None:
    stragglers = Stragglers(5, 1.5)
    said = [stragglers.observe([1.0, 2.0, 1.0, 3.0, 1.0]) for _ in range(WINDOW)]
    assert list(said[-1]) == [3, 1]


def test_of_two_ranks_the_faster_is_the_measure() -> None:
    stragglers = Stragglers(2, 1.5)
    said = [stragglers.observe([1.0, 1.6]) for _ in range(WINDOW)]
    assert list(said[-1]) == [1]


def test_single_slow_steps_and_differences_of_a_millisecond_name_nobody() -> None:
    rare, small = Stragglers(2, 1.5), Stragglers(2, 1.5)
    for step in range(200):
        assert rare.observe([1.0, 9.0 if step % 3 == 0 else 1.0]) == {}
        assert small.observe([0.001, 0.0025]) == {}


def test_a_factor_of_0_names_nobody() -> None:
    stragglers = Stragglers(2, 0.0)
    assert [stragglers.observe([1.0, 100.0]) for _ in range(20)] == [{}] * 20
