"""What fault tests share: how they report a recovery, and the table that is made of the reports.

A test that measures calls `record_fault` once per try. With `--write-table` (as `make faults` runs)
the reports of all tests that passed become the table in docs/reliability.md, and
benchmarks/results/faults.json beside it; rows of tests that did not run stay as they were. Reports
travel as properties of the test, so they arrive from the processes of xdist too.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_table import Try, update
from plan_map import write_map

ROOT = Path(__file__).resolve().parents[2]
PROPERTY = "fault"

RecordFault = Callable[[str, int, float], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what `make faults` uses."""
    parser.addoption(
        "--write-table", action="store_true", help="write what was measured to docs/reliability.md"
    )


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
    """Collect where results come together: not in the workers of xdist."""
    if config.getoption("--write-table") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Reports(), "fault-reports")
