"""Failpoints do nothing unless armed, then do one thing, once, at the visit that was asked for."""

import errno
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from interlace.trainer.checkpoint import failpoints
from interlace.trainer.checkpoint.failpoints import (
    FAILPOINTS,
    FailpointHit,
    disturbed,
    failpoint,
)
from interlace.trainer.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def start_unarmed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (failpoints.VARIABLE, failpoints.RANK_VARIABLE, "RANK"):
        monkeypatch.delenv(name, raising=False)
    failpoints.forget_visits()


def arm(monkeypatch: pytest.MonkeyPatch, setting: str, rank: str | None = None) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, setting)
    if rank is not None:
        monkeypatch.setenv(failpoints.RANK_VARIABLE, rank)


def test_an_unarmed_point_does_nothing() -> None:
    for name in FAILPOINTS:
        failpoint(name)


def test_an_unknown_point_is_a_defect_even_when_unarmed() -> None:
    with pytest.raises(AssertionError, match=r"'persist\.opn' is not registered"):
        failpoint("persist.opn")


def test_every_registered_point_is_called_in_the_code() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "trainer").rglob("*.py"))
    literal = set(re.findall(r'failpoint\("([a-z_.]+)"\)', text))
    stages = set(re.findall(r'write_durably\([^)]*"([a-z]+)"\)', text))
    suffixes = set(re.findall(r'f"\{stage\}\.([a-z_]+)"', text))
    called = literal | {f"{stage}.{suffix}" for stage in stages for suffix in suffixes}
    in_other_modules = {"load.mid", "step.backward", "step.forward", "step.loss", "step.update"}
    assert called | in_other_modules == FAILPOINTS


@pytest.mark.parametrize(("action", "number"), [("enospc", errno.ENOSPC), ("eio", errno.EIO)])
def test_disk_errors_are_raised_as_the_system_would(
    action: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm(monkeypatch, f"persist.open:{action}")
    with pytest.raises(OSError, match=re.escape("(failpoint persist.open)")) as caught:
        failpoint("persist.open")
    assert caught.value.errno == number


def test_only_the_named_point_at_the_named_visit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    arm(monkeypatch, "persist.half@3:raise")
    failpoint("persist.half")
    failpoint("persist.open")
    failpoint("persist.half")
    with pytest.raises(FailpointHit, match=r"^persist\.half$"):
        failpoint("persist.half")
    failpoint("persist.half")


def test_a_star_means_every_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    arm(monkeypatch, "persist.half@*:raise")
    for _ in range(3):
        with pytest.raises(FailpointHit):
            failpoint("persist.half")


def test_a_number_is_disturbed_at_its_visit_and_else_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert disturbed("step.loss", 2.0) == 2.0
    arm(monkeypatch, "step.loss@2:nan")
    assert disturbed("step.loss", 2.0) == 2.0
    assert math.isnan(disturbed("step.loss", 2.0))
    arm(monkeypatch, "step.loss@*:spike")
    assert disturbed("step.loss", 2.0) == 200.0
    arm(monkeypatch, "step.loss@*:raise")
    with pytest.raises(FailpointHit):
        disturbed("step.loss", 2.0)


def test_a_delay_sleeps_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    arm(monkeypatch, "persist.half@2:delay")
    for _ in range(3):
        failpoint("persist.half")
    assert slept == [failpoints.DELAY_SECONDS]


def test_a_stopped_process_goes_on_when_it_is_told_to() -> None:
    code = (
        "from interlace.trainer.checkpoint.failpoints import failpoint\n"
        "failpoint('step.update'); print('went on')"
    )
    environment = {**os.environ, failpoints.VARIABLE: "step.update:stop", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.stdout is not None
        assert process.stdout.read() == "went on\n"
        assert process.wait() == 0


def test_only_the_named_rank_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    arm(monkeypatch, "load.mid:raise", rank="1")
    failpoint("load.mid")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(FailpointHit):
        failpoint("load.mid")


def test_without_a_rank_variable_this_is_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    arm(monkeypatch, "load.mid:raise", rank="0")
    with pytest.raises(FailpointHit):
        failpoint("load.mid")


@pytest.mark.parametrize(
    ("setting", "number"),
    [
        ("step.update", signal.SIGKILL),
        ("step.update:kill", signal.SIGKILL),
        ("step.update@2:sigterm", signal.SIGTERM),
    ],
)
def test_signals_end_the_process(setting: str, number: signal.Signals) -> None:
    code = (
        "from interlace.trainer.checkpoint.failpoints import failpoint\n"
        "failpoint('step.update'); failpoint('step.update'); print('survived')"
    )
    environment = {**os.environ, failpoints.VARIABLE: setting, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (-number, "")


def test_sigint_arrives_as_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    arm(monkeypatch, "step.forward:sigint")
    with pytest.raises(KeyboardInterrupt):
        failpoint("step.forward")


@pytest.mark.parametrize(
    "setting",
    [
        "",
        "persist.opn",
        "persist.open@0",
        "persist.open@**",
        "persist.open@x",
        "persist.open:explode",
        "persist.open:nan",
        ":kill",
        "a b",
    ],
)
def test_a_bad_setting_lists_the_names(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arm(monkeypatch, setting)
    with pytest.raises(UserError) as caught:
        failpoint("load.mid")
    assert str(caught.value) == (
        f"INTERLACE_FAILPOINT={setting!r} is not a failpoint, so nothing would fail where you "
        f"expect it. Write NAME[@VISIT][:ACTION], or unset it. Names: "
        f"{', '.join(sorted(FAILPOINTS))}. Actions: kill, stop, "
        "delay, burn, hang, raise, enospc, eio, nomem, sigterm, sigint, nan, spike."
    )


def test_a_bad_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    arm(monkeypatch, "load.mid", rank="one")
    with pytest.raises(UserError) as caught:
        failpoint("load.mid")
    assert str(caught.value) == (
        "INTERLACE_FAILPOINT_RANK='one' is not a rank, so no process would fail. "
        "Write a number from 0, or unset it for any rank."
    )


def test_the_commit_layer_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, interlace.trainer.checkpoint\n"
        "print(sorted({'torch', 'numpy', 'safetensors', 'pydantic'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
