"""How ranks ended is on record, the one that failed first is found, and a run that gets nowhere
is not started for ever.
"""

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from interlace.launch.cli import guarded
from interlace.trainer.checkpoint import CheckpointStore
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.ends import (
    LAUNCHER_VARIABLE,
    End,
    Kind,
    describe_end,
    ends_folder,
    ends_of,
    first_failure,
    is_of_a_peer,
    mark_recorded,
    record_end,
)
from interlace.trainer.errors import NoProgress, NumericsError, Preempted
from interlace.trainer.exits import Exit
from interlace.trainer.starts import is_restart, record_start, require_progress
from interlace.trainer.supervision import Supervision, judge
from interlace.trainer.world import World

Interlace = Callable[..., subprocess.CompletedProcess[str]]
GLOO = "[../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:3: Connection reset by peer"


def end(rank: int, kind: Kind, time: float, attempt: int = 1, reason: str = "broken") -> End:
    return End(attempt=attempt, rank=rank, kind=kind, reason=reason, time=time, host="a", pid=1)


def leave(run: Path, *ends: End) -> None:
    for each in ends:
        assert record_end(run, each) is not None


# ---- who failed first ----------------------------------------------------------------------------


def test_the_rank_that_failed_by_itself_comes_before_those_that_noticed(tmp_path: Path) -> None:
    leave(tmp_path, end(0, "peer", 1.0), end(2, "vanished", 2.0), end(1, "error", 3.0))
    assert [each.rank for each in ends_of(tmp_path, 1)] == [2, 1, 0]
    first = first_failure(tmp_path)
    assert first is not None
    assert first == end(2, "vanished", 2.0)


def test_only_the_newest_attempt_counts_and_only_if_it_is_new(tmp_path: Path) -> None:
    leave(tmp_path, end(0, "error", 9.0, attempt=2), end(1, "error", 1.0, attempt=10))
    first = first_failure(tmp_path)
    assert first is not None
    assert first.attempt == 10
    assert first_failure(tmp_path, after_attempt=10) is None


def test_nothing_known_is_none(tmp_path: Path) -> None:
    assert first_failure(tmp_path) is None
    ends_folder(tmp_path, 1).mkdir(parents=True)
    assert first_failure(tmp_path) is None


def test_the_first_record_of_a_rank_stays(tmp_path: Path) -> None:
    leave(tmp_path, end(0, "stalled", 1.0), end(0, "peer", 2.0))
    assert [each.kind for each in ends_of(tmp_path, 1)] == ["stalled"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"attempt": 1}', '{"kind": "odd"}'])
def test_files_that_are_no_records_are_passed_over(tmp_path: Path, text: str) -> None:
    leave(tmp_path, end(0, "error", 1.0))
    (ends_folder(tmp_path, 1) / "rank-1.json").write_text(text, encoding="utf-8")
    assert [each.rank for each in ends_of(tmp_path, 1)] == [0]


def test_a_storage_that_cannot_be_written_is_no_second_failure(tmp_path: Path) -> None:
    (tmp_path / "ends").write_text("a file where a folder should be", encoding="utf-8")
    assert record_end(tmp_path, end(0, "error", 1.0)) is None


def test_what_a_launcher_prints_has_the_traceback_before_the_reason() -> None:
    shown = describe_end(
        End(
            attempt=3,
            rank=1,
            kind="error",
            reason="broken",
            status=1,
            step=12,
            phase="forward",
            traceback="Traceback: ...\n",
            host="a",
        )
    )
    assert shown.splitlines() == [
        "Traceback: ...",
        "rank 1 on a in forward of step 12 (attempt 3, exit status 1): broken",
    ]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError(GLOO), True),
        (RuntimeError("[../gloo/x.cc:78] Timed out waiting 5000ms for recv operation"), True),
        (ConnectionResetError("Connection reset by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("gloo/"), False),
        (BrokenPipeError("Broken pipe"), False),
    ],
)
def test_errors_that_only_say_that_a_peer_has_gone_are_known(
    error: Exception, expected: bool
) -> None:
    assert is_of_a_peer(error) is expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ZeroDivisionError(), ("error", Exit.DEFECT)),
        (RuntimeError(GLOO), ("peer", Exit.DEFECT)),
        (NumericsError("NaN"), ("mistake", Exit.NUMERICS)),
        (Preempted("late"), ("stopped", Exit.PREEMPTED)),
        (KeyboardInterrupt(), ("stopped", Exit.INTERRUPTED)),
    ],
)
def test_every_error_has_its_kind_and_status(
    error: BaseException, expected: tuple[Kind, Exit]
) -> None:
    assert judge(error, 2) == expected


def test_a_process_that_is_alone_has_no_peers() -> None:
    assert judge(RuntimeError(GLOO), 1) == ("error", Exit.DEFECT)


def test_a_message_that_a_launcher_will_print_is_not_printed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        error = NumericsError("too many")
        mark_recorded(error, tmp_path / "rank-0.json")
        raise error

    assert guarded(fail) == Exit.NUMERICS
    assert "too many" in capsys.readouterr().err
    monkeypatch.setenv(LAUNCHER_VARIABLE, "1")
    assert guarded(fail) == Exit.NUMERICS
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("reason", "lines"), [("too many", 0), ("another reason", 1), (None, 1)])
def test_another_rank_tells_its_reason_unless_rank_0_has_the_same(
    reason: str | None,
    lines: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("interlace.trainer.ends._ALIKE_WITHIN", 0.1)
    monkeypatch.setenv("RANK", "1")
    if reason is not None:
        leave(tmp_path, end(0, "mistake", 1.0, reason=reason))

    def fail() -> int:
        error = NumericsError("too many")
        mark_recorded(error, ends_folder(tmp_path, 1) / "rank-1.json")
        raise error

    assert guarded(fail) == Exit.NUMERICS
    assert len(capsys.readouterr().err.splitlines()) == lines


@pytest.mark.parametrize(
    ("rank", "recorded", "lines"),
    [("0", True, 1), ("1", True, 0), ("0", False, 1), ("1", False, 1)],
)
def test_of_a_peer_s_end_rank_0_says_one_line_and_others_only_what_no_file_tells(
    rank: str,
    recorded: bool,
    lines: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> int:
        error = RuntimeError(GLOO + "\nand more")
        if recorded:
            mark_recorded(error, ends_folder(tmp_path, 1) / f"rank-{rank}.json")
        raise error

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert guarded(fail) == Exit.DEFECT
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines
    assert all(line.startswith("interlace: another rank has gone: ") for line in said)


# ---- a whole run ---------------------------------------------------------------------------------


def test_a_run_that_fails_leaves_its_reason_and_one_that_ends_well_none(
    interlace: Interlace, tiny: Sequence[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ("train", *tiny, "train.steps=8", f"run.dir={run}")
    secret = {"SOME_API_TOKEN": "planted-secret"}
    broken = interlace(*words, environment={**secret, "INTERLACE_FAILPOINT": "step.update@7:raise"})
    assert broken.returncode == Exit.DEFECT
    assert f"recorded in {run}/ends/attempt-1/rank-0.json" in broken.stderr
    (left,) = ends_of(run, 1)
    assert (left.kind, left.status, left.step, left.phase) == ("error", 1, 7, "update")
    assert "FailpointHit" in left.traceback
    assert interlace(*words, environment=secret).returncode == 0
    assert ends_of(run, 2) == []
    assert sorted(path.name for path in (run / "ends" / "attempt-2").iterdir()) == ["start.json"]
    files = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in files if b"planted-secret" in path.read_bytes()]


# ---- starts in vain ------------------------------------------------------------------------------


def start(
    run: Path, attempt: int, step: int, restart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begin an attempt as rank 0 does."""
    monkeypatch.setenv("INTERLACE_RESTART", "1" if restart else "0")
    require_progress(run, record_start(run, attempt, step, 1))


def test_a_fourth_start_in_a_row_at_one_step_is_refused_with_what_ended_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path, 1, 5, False, monkeypatch)
    start(tmp_path, 2, 5, True, monkeypatch)
    leave(tmp_path, end(1, "error", 1.0, attempt=2, reason="disk on fire\nmore"))
    start(tmp_path, 3, 5, True, monkeypatch)
    with pytest.raises(NoProgress) as refusal:
        start(tmp_path, 4, 5, True, monkeypatch)
    assert str(refusal.value).splitlines()[:4] == [
        "3 starts in a row began at step 5 and failed before anything was saved, so another would "
        "end like them:",
        "    attempt 1: ended without a word (killed from outside, or its machine was lost)",
        "    attempt 2: rank 1, : disk on fire",
        "    attempt 3: ended without a word (killed from outside, or its machine was lost)",
    ]
    assert f"interlace train --resume {tmp_path}" in str(refusal.value)


def test_a_person_is_never_refused_and_counts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attempt in range(1, 6):
        start(tmp_path, attempt, 5, False, monkeypatch)
    start(tmp_path, 6, 5, True, monkeypatch)
    start(tmp_path, 7, 5, True, monkeypatch)
    with pytest.raises(NoProgress):
        start(tmp_path, 8, 5, True, monkeypatch)
    start(tmp_path, 9, 5, False, monkeypatch)


def test_progress_counts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for attempt, step in enumerate([0, 0, 0, 5, 5, 5, 10, 10, 10], start=1):
        start(tmp_path, attempt, step, attempt > 1, monkeypatch)


def test_a_start_that_was_stopped_on_request_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attempt in range(1, 10):
        start(tmp_path, attempt, 5, attempt > 1, monkeypatch)
        leave(tmp_path, end(0, "stopped", 1.0, attempt=attempt))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, True),
        ({"INTERLACE_RESTART": "1"}, True),
        ({"INTERLACE_RESTART": "0", "TORCHELASTIC_RESTART_COUNT": "0"}, False),
    ],
)
def test_launchers_say_whether_a_start_is_another(
    environment: dict[str, str], expected: bool
) -> None:
    assert is_restart(environment) is expected


def test_a_run_started_again_and_again_in_vain_stops_with_its_own_status(
    interlace: Interlace, tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    words = ("train", *tiny, "checkpoint.asynchronous=false", f"run.dir={run}")
    killed = interlace(*words, environment={"INTERLACE_FAILPOINT": "step.update@6:kill"})
    assert killed.returncode == -9, killed.stderr
    store = CheckpointStore(run / "checkpoints")
    for _ in range(3):
        start(run, store.begin_attempt(), store.committed_steps()[-1], True, monkeypatch)
    done = interlace(*words, environment={"TORCHELASTIC_RESTART_COUNT": "4"})
    assert done.returncode == Exit.NO_PROGRESS, done.stderr
    assert "3 starts in a row began at step 5" in done.stderr
    first = first_failure(run)
    assert first is not None
    assert (first.attempt, first.status) == (5, Exit.NO_PROGRESS)
    assert store.committed_steps() == [5]


def test_supervision_without_a_watchdog_still_records(tmp_path: Path) -> None:
    from interlace.trainer.run_folder import RunFolder

    config = RunConfig.model_validate({"watchdog": {"seconds": 0.0}})
    with pytest.raises(ZeroDivisionError), Supervision(config, World()) as supervision:
        supervision.begin(RunFolder(tmp_path, False, ()), 1).enter("load")
        assert supervision.watch is None
        raise ZeroDivisionError
    (left,) = ends_of(tmp_path, 1)
    assert (left.kind, left.phase, left.pid) == ("error", "load", os.getpid())
