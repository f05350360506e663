"""The race against DeepSpeed: who runs in it, what its table says, and that nothing outlives it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from interlace.offload import load_profile


@pytest.fixture(autouse=True)
def beside_the_benchmarks(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))


def timing(iteration: float, compute: float | None) -> dict[str, Any]:
    names = ("forward", "backward", "update", "predicted_update", "predicted_exposed", "bound")
    return {
        **dict.fromkeys(names, 0.01),
        "iteration": iteration,
        "compute": compute,
        "device_bytes": 0,
    }


def outcome(name: str, *iterations: float, loss: float | None = 2.0, rough: float | None = None):
    """A contender that ran in as many rounds, on two ranks of which the second is slower."""
    from race_contenders import chosen
    from race_tables import Outcome
    from race_tracks import TINY

    (contender,) = chosen([name])
    made = Outcome(contender, TINY)
    for number, iteration in enumerate(iterations, start=1):
        made.rounds[number] = [
            {
                "parameters": 10,
                "final_loss": loss if number == 1 else None,
                "rough_loss": rough if number == 1 else None,
                "host_bytes": 2**30,
                "timings": {str(rows): timing(time, 0.25) for rows in TINY.rows},
            }
            for time in (iteration / 2, iteration)
        ]
    return made


def test_all_contenders_that_were_asked_for_are_there() -> None:
    from race_contenders import CONTENDERS, NAMES

    assert set(NAMES) == {
        "zero3-offload",
        "twin-flow",
        "superoffload",
        "superoffload-clip",
        "zenflow",
        "fsdp2-offload",
        "resident",
        *(f"{way}{rule}" for way in ("host", "stride", "optimal") for rule in ("", "-clipped-sgd")),
        "attach-host",
        "attach-optimal",
    }
    assert len(NAMES) == len(set(NAMES))
    exact = {each.name for each in CONTENDERS if each.is_exact}
    assert exact == {name for name in NAMES if "sgd" not in name} - {"superoffload", "zenflow"}


def test_a_wrong_name_is_refused_with_all_that_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from race_contenders import NAMES
    from versus_deepspeed import parsed

    for words in (["--only", "zero-offload"], ["--models", "3B"]):
        with pytest.raises(SystemExit) as stopped:
            parsed(words)
        assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "no contender is called zero-offload; there are: " + ", ".join(NAMES) in said
    assert "no model is called 3B; there are: tiny, small, 1.3B, 7B" in said


def test_twin_flow_may_keep_as_much_on_the_device_as_we_may() -> None:
    from race_contenders import chosen, deepspeed_settings

    (twin,) = chosen(["twin-flow"])
    made = deepspeed_settings(twin, rows=1, lr=1e-3, bf16=True, pin=True, subgroup=7, ratio=0.7)
    zero = made["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True, "ratio": 0.7}
    assert (zero["stage"], zero["overlap_comm"], zero["sub_group_size"]) == (3, True, 7)
    (unclipped,) = chosen(["superoffload"])
    made = deepspeed_settings(unclipped, rows=1, lr=1, bf16=True, pin=True, subgroup=7, ratio=0.7)
    assert made["gradient_clipping"] == 0.0
    assert made["zero_optimization"]["offload_optimizer"]["super_offload"] is True
    assert "ratio" not in made["zero_optimization"]["offload_optimizer"]


def test_figures_are_those_of_the_slowest_rank_and_of_the_median_round() -> None:
    from race_tables import rows_of

    ours, theirs = outcome("optimal", 0.5, 0.4, 1.0), outcome("zero3-offload", 1.0, 1.0, 1.0)
    row = next(row for row in rows_of([ours, theirs]) if row["contender"] == "Interlace optimal")
    assert row["iteration ms"] == pytest.approx(500.0)
    assert row["exposed ms"] == pytest.approx(250.0)
    # Round by round it is 2, 2.5 and 1 times as fast.
    assert row["times as fast as DeepSpeed"] == pytest.approx(2.0)
    assert row["tokens/s"] == round(2 * 16 / 0.5)
    assert row["host GiB"] == 2.0


def test_ratios_are_to_the_best_of_deepspeed_without_zenflow() -> None:
    from race_tables import speed_up

    rivals = [outcome("zero3-offload", 1.0), outcome("twin-flow", 0.6), outcome("zenflow", 0.1)]
    ours = outcome("optimal", 0.3)
    assert speed_up(ours, 1, [*rivals, ours]) == pytest.approx(2.0)
    assert speed_up(ours, 1, [ours]) is None


def test_who_ends_in_another_loss_is_named_and_marked() -> None:
    from race_tables import names_apart, rows_of

    same = [outcome(name, 1.0, loss=2.0) for name in ("zero3-offload", "resident", "host")]
    near, far = outcome("stride", 1.0, loss=2.0009), outcome("optimal", 1.0, loss=2.0011)
    broken = outcome("attach-host", 1.0, loss=float("nan"))
    assert names_apart([*same, near]) == []
    assert names_apart([*same, near, far, broken]) == ["optimal", "attach-host"]
    marked = [row["contender"] for row in rows_of([*same, far]) if "ANOTHER" in str(row["remark"])]
    assert set(marked) == {"Interlace optimal"}
    # Others do other mathematics, each rule its own.
    others = [outcome(name, 1.0, loss=9.0) for name in ("zenflow", "superoffload")]
    sgd = [outcome(f"{way}-clipped-sgd", 1.0, loss=5.0) for way in ("host", "optimal")]
    assert names_apart([*same, *others, *sgd]) == []
    assert names_apart([*same, *sgd, outcome("stride-clipped-sgd", 1.0, loss=5.1)]) == [
        "stride-clipped-sgd"
    ]


def test_losses_in_bfloat16_may_differ_by_its_rounding_only() -> None:
    from race_tables import names_apart

    same = [outcome(name, 1.0, rough=2.0) for name in ("zero3-offload", "resident")]
    assert names_apart([*same, outcome("optimal", 1.0, rough=2.09)]) == []
    assert names_apart([*same, outcome("optimal", 1.0, rough=2.11)]) == ["optimal"]


def test_who_cannot_run_is_listed_with_its_error() -> None:
    from race_tables import rows_of

    failed = outcome("superoffload")
    failed.error = "AssertionError: only on CUDA"
    rows = rows_of([outcome("zero3-offload", 1.0), failed])
    said = [row["remark"] for row in rows if "SuperOffload" in str(row["contender"])]
    assert said == ["AssertionError: only on CUDA"] * 2
    later = outcome("zero3-offload", 1.0, 1.0)
    later.error = "killed after 9 s"
    assert rows_of([later])[0]["remark"] == "2 rounds, then killed after 9 s"


def test_goals_are_met_missed_or_without_figures() -> None:
    from race_tables import goals

    rivals = [outcome("zero3-offload", 1.0), outcome("resident", 0.5)]
    said = goals([*rivals, outcome("optimal", 0.5)])
    assert [line.split("  ")[0] for line in said] == ["MISSED", "MET", "MET"]
    assert "25.00 of the lower bound" in said[0] and "2.00 times as fast" in said[1]
    said = goals([*rivals, outcome("optimal", 0.8)])
    assert [line.split("  ")[0] for line in said] == ["MISSED", "MISSED", "MISSED"]
    assert [line.split("  ")[0] for line in goals(rivals)] == ["NOT JUDGED"] * 3


def test_the_picture_has_a_bar_for_everyone_and_says_who_did_not_run() -> None:
    from race_tables import draw

    figure = draw([outcome("zero3-offload", 1.0), outcome("optimal", 0.5), outcome("zenflow")], "x")
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            "DeepSpeed ZeRO-3 offload",
            "DeepSpeed ZenFlow",
            "Interlace optimal",
        ]
        widths = [bar.get_width() for bar in axes.patches]
        assert sum(widths[:3]) == pytest.approx(1000.0) and sum(widths[6:]) == pytest.approx(500.0)
        assert [text.get_text() for text in axes.texts] == [" did not run"]


def test_two_contenders_race_and_end_in_the_same_loss(tmp_path: Path) -> None:
    from race_contenders import chosen
    from race_tables import names_apart, rows_of
    from race_tracks import TINY
    from versus_deepspeed import Race

    race = Race(chosen(["host", "resident"]), [TINY], 2, 1, 300.0, tmp_path)
    profile = load_profile("4xh100-pcie5")
    (tmp_path / "profile.json").write_text(profile.model_dump_json(), encoding="utf-8")
    race.round_by_round()
    assert [each.error for each in race.outcomes] == ["", ""]
    losses = [each.loss() for each in race.outcomes]
    assert all(loss is not None and 4.5 < loss < 5.0 for loss in losses)
    assert names_apart(race.outcomes) == []
    for row in rows_of(race.outcomes):
        assert float(str(row["iteration ms"])) > 0 and float(str(row["host GiB"])) > 0.1
        assert bool(row["predicted update ms"]) == (row["contender"] == "Interlace host")


def test_without_time_contenders_are_listed_as_such_and_rounds_dropped(tmp_path: Path) -> None:
    from race_contenders import chosen
    from race_processes import Ended
    from race_tracks import TINY
    from versus_deepspeed import Race

    race = Race(chosen(["optimal", "resident", "host"]), [TINY], 2, 3, 100.0, tmp_path)
    ran: list[tuple[str, int]] = []

    def go(each: Any, number: int, place: int) -> None:
        ran.append((each.contender.name, number))
        race.began -= 45.0
        each.seconds.append(45.0)
        race.take(each, number, Ended([outcome("host", 1.0).rounds[1][0]]))

    race.go = go  # pyright: ignore[reportAttributeAccessIssue]
    race.round_by_round()
    assert ran == [("optimal", 1), ("resident", 1)]
    assert [each.error for each in race.outcomes] == ["", "", "no time was left"]
    assert race.notes == ["Round 2 ended early: no time was left."]


HANGS = """
import os, subprocess, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
# As ninja does with compilers: a process group of its own.
child = subprocess.Popen(["sleep", "600"], process_group=0)
(folder / f"pids-{rank}").write_text(f"{os.getpid()} {child.pid}")
if sys.argv[2] == "hang" or rank == "0":
    time.sleep(600)
print("Traceback: of no interest")
print("MemoryError: the reason")
sys.exit(3)
"""


def numbers_in(folder: Path) -> set[int]:
    """The processes that the script has noted there."""
    return {int(word) for path in folder.glob("pids-*") for word in path.read_text().split()}


@pytest.mark.parametrize(
    ("way", "timeout", "said"),
    [("hang", 3.0, "killed after 3 s"), ("fail", 60.0, "MemoryError: the reason")],
)
def test_ranks_that_hang_are_killed_with_all_they_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, timeout: float, said: str
) -> None:
    import race_processes

    script = tmp_path / "hangs.py"
    script.write_text(HANGS, encoding="utf-8")
    monkeypatch.setattr(race_processes, "RANK_SCRIPT", script)
    ended = race_processes.run_ranks([str(tmp_path), way], tmp_path / "ranks", 2, timeout)
    assert (ended.error, ended.findings) == (said, [])
    if way == "fail":
        assert ended.seconds < 50.0
    pids = numbers_in(tmp_path)
    left = pids & set(race_processes.running())
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(pids) == 4 and not left


STARTS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import race_processes
folder = Path(sys.argv[2])
race_processes.RANK_SCRIPT = folder / "hangs.py"
race_processes.run_ranks([str(folder), "hang"], folder / "ranks", 2, 300.0)
"""


def test_ctrl_c_takes_the_ranks_along(tmp_path: Path, root: Path) -> None:
    import race_processes

    (tmp_path / "hangs.py").write_text(HANGS, encoding="utf-8")
    words = [sys.executable, "-c", STARTS, str(root / "benchmarks"), str(tmp_path)]
    race = subprocess.Popen(words, stderr=subprocess.PIPE)
    try:
        while len(numbers_in(tmp_path)) < 4:
            assert race.poll() is None
            time.sleep(0.05)
        race.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in race.communicate(timeout=120.0)[1]
    finally:
        race.kill()
    left = numbers_in(tmp_path) & set(race_processes.running())
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def test_a_rank_leaves_the_last_line_of_what_went_wrong(tmp_path: Path) -> None:
    import race_processes

    (tmp_path / "rank-1.json").write_text(json.dumps({"error": "ValueError: b"}), encoding="utf-8")
    assert race_processes.reason(tmp_path, 1, 1) == "ValueError: b"
    assert race_processes.reason(tmp_path, 0, -9) == "rank 0 was ended by SIGKILL (out of memory?)"


def test_old_locks_of_killed_compilers_are_freed_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import race_processes

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    locks = {name: tmp_path / "py" / name / "lock" for name in ("old", "new", "in_use")}
    for name, lock in locks.items():
        lock.parent.mkdir(parents=True)
        lock.touch()
        if name != "new":
            os.utime(lock, (time.time() - 60.0,) * 2)
    compiler = subprocess.Popen(["sleep", "60"], cwd=locks["in_use"].parent)
    try:
        race_processes.free_old_locks()
    finally:
        compiler.kill()
        compiler.wait()
    assert {name for name, lock in locks.items() if lock.exists()} == {"new", "in_use"}


def test_its_help_lists_everyone(root: Path) -> None:
    command = [sys.executable, str(root / "benchmarks" / "versus_deepspeed.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert "ZenFlow" in done.stdout and re.search(r"^ +twin-flow +DeepSpeed", done.stdout, re.M)
