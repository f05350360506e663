"""docs/reliability.md says what the code and the suite are."""

from pathlib import Path

import plan_map
import pytest
from fault_table import Try, replace_block, update

from interlace.trainer.exits import RESTARTABLE, Exit


def test_the_map_names_every_point_and_only_tests_that_exist(root: Path) -> None:
    names = {
        f"{path.relative_to(root / 'tests').as_posix()}::{function}"
        for path, function in plan_map.functions_under(root / "tests")
    }
    shown = plan_map.tests_of(root)
    assert {name for tests in shown.values() for name in tests} <= names
    assert {point for point, tests in shown.items() if not tests} == set(plan_map.MISSING)
    assert set(plan_map.ELSEWHERE) <= set(plan_map.PLAN)


def test_make_faults_runs_a_test_of_every_point(root: Path) -> None:
    """Those of tests/faults, and what is shown elsewhere alone."""
    shown, more = plan_map.tests_of(root), plan_map.only_elsewhere(root)
    for point in set(plan_map.PLAN) - set(plan_map.MISSING):
        runs = [name.startswith("faults/") or f"tests/{name}" in more for name in shown[point]]
        assert any(runs), point
    assert not any(name.startswith("tests/faults/") for name in more)
    (command,) = (
        line for line in (root / "Makefile").read_text().splitlines() if "--write-table" in line
    )
    assert "pytest tests/faults $$elsewhere -m" in command


def test_the_guide_holds_the_map(root: Path) -> None:
    guide = (root / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert plan_map.table(root) in guide, "run  python tests/faults/harness/plan_map.py"


def test_the_guide_lists_every_exit_status(root: Path) -> None:
    guide = (root / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in guide.splitlines() if line.startswith("| ")]
    listed = {(row[0], row[1], row[-1]) for row in rows if row[0].isdigit()}
    assert listed == {
        (str(int(status)), status.name, "yes" if status in RESTARTABLE else "no") for status in Exit
    }


@pytest.fixture
def small_tree(tmp_path: Path, root: Path) -> Path:
    """A repository of nothing but the guide and what sets tables."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "reliability.md").write_text(
        "before\n<!-- faults: begin -->\n<!-- faults: end -->\nafter\n", encoding="utf-8"
    )
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    text = (root / "benchmarks" / "results.py").read_text(encoding="utf-8")
    (tmp_path / "benchmarks" / "results.py").write_text(text, encoding="utf-8")
    return tmp_path


def test_a_part_of_the_suite_replaces_only_its_rows(small_tree: Path) -> None:
    update(small_tree, {"killed": [Try("A1", 3, 1.0), Try("A1", 5, 9.0)]})
    update(small_tree, {"woken": [Try("E4", 8, 60.0)], "killed": [Try("A1", 4, 2.0)]})
    update(small_tree, {})
    guide = (small_tree / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert guide.startswith("before\n<!-- faults: begin -->\n| plan | fault")
    assert guide.endswith("<!-- faults: end -->\nafter\n")
    cells = [line.strip("| ").split("|") for line in guide.splitlines() if line.startswith("| ")]
    shown = [[cell.strip() for cell in row[:-1]] for row in cells[1:]]
    assert shown == [
        ["A1", "killed", "1", "4, 4", "2.0, 2.0"],
        ["E4", "woken", "1", "8, 8", "60.0, 60.0"],
    ]


def test_a_guide_without_the_block_is_a_defect(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="has no block"):
        replace_block(page, "<!-- a -->", "<!-- b -->", "text")
