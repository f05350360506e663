"""What fault tests share: how they report a recovery, and the table that is made of the reports.

A test that measures calls `record_fault` once per try. With `--write-table` (as `make faults` runs)
the reports of all tests that passed become the table in docs/reliability.md, and
benchmarks/results/faults.json beside it; rows of tests that did not run stay as they were. Reports
travel as properties of the test, so they arrive from the processes of xdist too.

`drill` makes runs to break (see harness/drill.py), `judge` holds them to what must hold after every
fault and to the undisturbed run.
"""

import os
import re
import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest
from drill import Drill, Template
from fault_table import Try, update
from invariants import assert_invariants, assert_same_run
from plan_map import write_map

ROOT = Path(__file__).resolve().parents[2]
PROPERTY = "fault"

RecordFault = Callable[[str, int, float], None]
MakeDrill = Callable[..., Drill]
Judge = Callable[[Drill, int], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what `make faults` uses."""
    parser.addoption(
        "--write-table", action="store_true", help="write what was measured to docs/reliability.md"
    )
    parser.addoption("--soak-minutes", type=float, default=3.0, help="how long random faults last")


@pytest.fixture
def soak_minutes(request: pytest.FixtureRequest) -> float:
    """How long random faults last."""
    return float(request.config.getoption("soak_minutes", 3.0))


@pytest.fixture
def record_fault(request: pytest.FixtureRequest) -> RecordFault:
    """Report one try: what was done to the run, steps that had to be taken again, and the seconds
    from the fault to the first step that was new.
    """
    named = re.match(r"test_([a-j][0-9]+)_", request.node.originalname)
    plan = named[1].upper() if named else ""

    def record(fault: str, lost_steps: int, recovery_seconds: float) -> None:
        tried = Try(plan=plan, lost_steps=lost_steps, recovery_seconds=recovery_seconds)
        request.node.user_properties.append((PROPERTY, (fault, *tried)))

    return record


@pytest.fixture(scope="session")
def template() -> Generator[Template]:
    """The process that ranks are forked from."""
    with Template() as running:
        yield running


@pytest.fixture(scope="session")
def quick_home(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """A folder in memory where there is one: SIGKILL keeps what was written without fsync, so a
    disk would only make runs slow. What fsync is for is tested in test_files.py.
    """
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.mktemp("drills")
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="drills-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def short(tiny: Sequence[str]) -> Sequence[str]:
    """The words of a run of 20 steps with a checkpoint every 5, of which 2 stay."""
    return (*tiny, "train.steps=20", "train.validate_every_steps=10")


@pytest.fixture(scope="session")
def drill(template: Template, quick_home: Path, short: Sequence[str]) -> MakeDrill:
    """Make a run to break: `drill("setting=value", ...)` adds settings to those of `short`."""
    made: list[Drill] = []

    def make(*words: str) -> Drill:
        made.append(Drill(template, quick_home / f"drill-{len(made)}", (*short, *words)))
        return made[-1]

    return make


@pytest.fixture(scope="session")
def straight_run(drill: MakeDrill) -> Callable[[int, tuple[str, ...]], Path]:
    """Return the undisturbed run of `short` on so many ranks and with more settings; each is made
    once.
    """
    runs: dict[tuple[int, tuple[str, ...]], Path] = {}

    def run_of(ranks: int, words: tuple[str, ...] = ()) -> Path:
        key = (ranks, words)
        if key not in runs:
            undisturbed = drill(*words)
            undisturbed.finish(ranks)
            assert_invariants(undisturbed)
            runs[key] = undisturbed.run
        return runs[key]

    return run_of


@pytest.fixture(scope="session")
def judge(straight_run: Callable[[int, tuple[str, ...]], Path], short: Sequence[str]) -> Judge:
    """Hold a drill that ended well to all invariants, and to the undisturbed run on so many
    ranks.
    """

    def hold(drill: Drill, ranks: int) -> None:
        straight = straight_run(ranks, tuple(drill.words[len(short) :]))
        assert_invariants(drill)
        assert_same_run(drill, straight)

    return hold


class Reports:
    """Collects the reports in the process that also writes the table."""

    def __init__(self) -> None:
        self.tries: dict[str, list[Try]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what a test that passed has measured."""
        if report.when != "call" or not report.passed:
            return
        for name, value in report.user_properties:
            if name == PROPERTY and isinstance(value, (list, tuple)):
                fault, *tried = value
                self.tries.setdefault(str(fault), []).append(Try(*tried))

    def pytest_sessionfinish(self) -> None:
        """Write the table and the map of tests."""
        update(ROOT, self.tries)
        write_map(ROOT)


def pytest_configure(config: pytest.Config) -> None:
    """Collect where results come together: not in the workers of xdist.

    A run of all tests reads this file too late for its options to exist.
    """
    if config.getoption("write_table", False) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reports(), "fault-reports")
