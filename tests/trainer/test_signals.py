"""How a run is asked to stop, and until when."""

import math
import os
import signal
import threading

import pytest

from interlace.trainer.signals import StopRequest


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
