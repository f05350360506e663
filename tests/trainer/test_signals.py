"""How a run is asked to stop, and until when."""

import math
import os
import signal
import threading

import pytest

from interlace.trainer.signals import ECHO_SECONDS, StopRequest


def test_another_thread_may_ask_and_of_several_ends_the_first_counts(
    capfd: pytest.CaptureFixture[str],
) -> None:
    stop = StopRequest(announce=True)
    assert not stop.received
    assert stop.seconds_left == math.inf
    asking = threading.Thread(target=stop.ask, args=("the cluster takes this machine back", 500.0))
    asking.start()
    asking.join()
    assert stop.received
    assert 400 < stop.seconds_left <= 500
    stop.ask("again", 1000.0)
    assert stop.seconds_left <= 500
    assert stop.reason == "the cluster takes this machine back"
    told = capfd.readouterr().err
    assert told.count("the cluster takes this machine back: finishing this step and saving") == 1
    assert "again" not in told


@pytest.mark.parametrize(("number", "left"), [(signal.SIGTERM, 300.0), (signal.SIGINT, math.inf)])
def test_sigterm_has_an_end_and_a_person_waits(number: signal.Signals, left: float) -> None:
    with StopRequest(announce=False, notice_seconds=300.0) as stop:
        os.kill(os.getpid(), number)
        assert stop.received
        assert left - 100 < stop.seconds_left <= left or stop.seconds_left == left


def test_a_signal_after_a_notice_is_the_first_signal() -> None:
    with StopRequest(announce=False) as stop:
        stop.ask("notice", 60.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal is signal.SIGTERM
        assert stop.reason == "notice"


def test_a_sigterm_that_comes_by_two_ways_is_one_and_a_later_one_leaves_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: list[int] = []
    now = [100.0]
    monkeypatch.setattr("interlace.trainer.signals.os._exit", left.append)
    monkeypatch.setattr("interlace.trainer.signals.time.monotonic", lambda: now[0])
    with StopRequest(announce=False) as stop:
        stop.receive(signal.SIGTERM, None)
        now[0] += ECHO_SECONDS / 2
        stop.receive(signal.SIGTERM, None)
        assert stop.received
        assert not left
        now[0] += ECHO_SECONDS
        stop.receive(signal.SIGTERM, None)
    assert left == [128 + signal.SIGTERM]


def test_a_person_who_types_ctrl_c_twice_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr("interlace.trainer.signals.os._exit", left.append)
    for first in (signal.SIGINT, signal.SIGTERM):
        with StopRequest(announce=False) as stop:
            stop.receive(first, None)
            stop.receive(signal.SIGINT, None)
    assert left == [128 + signal.SIGINT] * 2
