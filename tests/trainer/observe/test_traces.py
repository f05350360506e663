"""Traced updates: what is kept, drawn, said, and said not to be there."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from interlace.offload.hardware import HardwareProfile, load_profile
from interlace.offload.performance_model import solve
from interlace.offload.report import UpdateReport
from interlace.offload.schedule import (
    Footprint,
    HiddenWindow,
    Home,
    MemoryBudget,
    Schedule,
    Subgroup,
)
from interlace.offload.timeline import LANES, Timeline, TimelineEvent, draw_gantt
from interlace.trainer.observe.console import Console
from interlace.trainer.observe.offload_log import engine_messages
from interlace.trainer.observe.predicted import predicted_timeline
from interlace.trainer.observe.traces import UpdateTraces

MEASURED = Timeline(
    (
        TimelineEvent("d2h", "gradient", 0, 0.0, 0.48, 10),
        TimelineEvent("cpu", "update", 0, 0.5, 0.7, 10),
        TimelineEvent("h2d", "weights", 0, 0.7, 0.700001, 10),
    )
)


@pytest.fixture(scope="module")
def machine() -> HardwareProfile:
    return load_profile("4xh100-pcie5")


def schedule_of(machine: HardwareProfile, flush: float = 1.0, strategy: str = "host") -> Schedule:
    subgroups = [Subgroup(100_000_000, Footprint(weight=2, gradient=2, state=12))] * 6
    memory = MemoryBudget(2**40, 2**40)
    return solve(machine, subgroups, memory, HiddenWindow(flush=flush), strategy=strategy)


def report(number: int) -> UpdateReport:
    return UpdateReport(number, MEASURED, 0.200001, 0.1, None)


class Pictures:
    """Keeps every figure that is drawn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.figures: list[Figure] = []
        save = Figure.savefig

        def keep(figure: Figure, path: Path, **options: object) -> None:
            self.figures.append(figure)
            save(figure, path, **options)

        monkeypatch.setattr(Figure, "savefig", keep)

    def titles(self) -> list[str]:
        return [chart.get_title(loc="left") for chart in self.figures[-1].axes]

    def widths(self, chart: int, lane: str) -> list[float]:
        box = self.figures[-1].axes[chart]
        collection = box.collections[LANES.index(lane)]
        return [path.get_extents().width for path in collection.get_paths()]


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Pictures:
    return Pictures(monkeypatch)


def test_titles_give_the_seconds_of_the_words(pictures: Pictures, tmp_path: Path) -> None:
    draw_gantt({"update 6, measured": MEASURED}, tmp_path / "lanes.png")
    assert pictures.titles() == ["update 6, measured: 200 ms"]
    assert "measured 0.2 s" in report(6).words()


def test_updates_begin_at_zero_and_fill_the_axis(pictures: Pictures, tmp_path: Path) -> None:
    early = Timeline(tuple(replace(e, start=e.start - 9, stop=e.stop - 9) for e in MEASURED.events))
    draw_gantt({"one": MEASURED, "other": early, "none": Timeline(())}, tmp_path / "lanes.png")
    charts = pictures.figures[-1].axes
    for chart in charts:
        assert chart.get_xlim() == pytest.approx((-50.0, 202.0), rel=1e-3)
        assert chart.get_ylim() == (3.6, -0.6)
    for chart in charts[:2]:
        [update] = chart.collections[LANES.index("cpu")].get_paths()
        assert update.get_extents().x0 == pytest.approx(0.0, abs=1e-6)
        [gradient] = chart.collections[LANES.index("d2h")].get_paths()
        assert gradient.get_extents().x1 == pytest.approx(-20.0)


def test_no_bar_is_too_narrow_to_be_seen(pictures: Pictures, tmp_path: Path) -> None:
    draw_gantt({"one": MEASURED}, tmp_path / "lanes.png")
    figure = pictures.figures[-1]
    [width] = pictures.widths(0, "h2d")
    low, high = figure.axes[0].get_xlim()
    assert width / (high - low) * figure.axes[0].bbox.width >= 1.0


def test_a_prediction_is_drawn_as_long_as_it_says(machine: HardwareProfile) -> None:
    for flush in (0.0, 1.0):
        schedule = schedule_of(machine, flush=flush)
        drawn = predicted_timeline(schedule, machine)
        assert drawn.makespan == pytest.approx(schedule.prediction.update_seconds, rel=1e-6)
    late = predicted_timeline(schedule_of(machine, flush=0.0), machine).events[0]
    assert (late.lane, late.what, late.start) == ("d2h", "late gradients", 0.0)
    assert late.bytes == pytest.approx(2 * 600_000_000, rel=1e-6)


def traced(
    folder: Path, span: str, updates: Sequence[int], schedules: Sequence[Schedule | None]
) -> UpdateTraces:
    traces = UpdateTraces(span, folder, Console(100, 10, is_main=True))
    for number, schedule in zip(updates, schedules, strict=True):
        traces.take(report(number), schedule, load_profile("4xh100-pcie5"))
    traces.close()
    return traces


def names(folder: Path) -> list[str]:
    records = json.loads((folder / "timeline.json").read_text(encoding="utf-8"))["traceEvents"]
    return [record["args"]["name"] for record in records if record["name"] == "process_name"]


def test_each_update_stands_under_the_prediction_it_had(
    machine: HardwareProfile, tmp_path: Path, pictures: Pictures
) -> None:
    first, second = schedule_of(machine), schedule_of(machine, strategy="none")
    traced(tmp_path, "2:5", range(1, 6), [first, first, first, second, second])
    assert names(tmp_path) == [
        "predicted",
        "update 2, measured",
        "update 3, measured",
        "predicted from update 4 on",
        "update 4, measured",
    ]
    assert [title.split(":")[0] for title in pictures.titles()] == names(tmp_path)
    assert first.homes[0] is Home.HOST
    assert second.homes[0] is Home.RESIDENT


def test_a_picture_of_some_updates_says_so(tmp_path: Path, pictures: Pictures) -> None:
    traced(tmp_path, "1:8", range(1, 8), [None] * 7)
    assert len(names(tmp_path)) == 7
    assert len(pictures.titles()) == 4
    title = pictures.figures[-1].get_suptitle()
    assert title == "the first 4 of 7 traced updates; timeline.json holds all"


@pytest.mark.parametrize(
    ("updates", "words"),
    [
        (
            range(1, 5),
            "observe.trace_steps=3:7: 2 of its updates were not traced, since this start made "
            "updates 1 to 4",
        ),
        (
            range(9, 12),
            "observe.trace_steps=3:7: no update of it was traced, since this start made updates 9 "
            "to 11",
        ),
        (
            [],
            "observe.trace_steps=3:7: no update of it was traced, since this start made no update",
        ),
    ],
)
def test_updates_that_never_came_are_told_of(
    updates: Sequence[int], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traced(tmp_path, "3:7", updates, [None] * len(updates))
    assert capsys.readouterr().out.splitlines()[-1] == words


def test_what_the_engine_says_reaches_console_and_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("interlace.offload.monitor")
    with engine_messages(Console(10, 1, is_main=True), tmp_path):
        logger.info("updates take %d s", 3)
    with engine_messages(Console(10, 1, is_main=False), tmp_path):
        logger.info("another rank")
    logger.info("afterwards")
    assert capsys.readouterr().out == "offload: updates take 3 s\n"
    [line] = (tmp_path / "offload.log").read_text(encoding="utf-8").splitlines()
    assert line.endswith("  updates take 3 s")
