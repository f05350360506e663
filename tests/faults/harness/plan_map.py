"""Which test shows which point of the acceptance plan.

A test of tests/faults says its point in its name (`test_a1_...`). What tests elsewhere show stands
in `ELSEWHERE`, what nothing shows yet in `MISSING`, with the reason. `write_map` makes the table in
docs/reliability.md of the three, and `make faults` takes what only tests elsewhere show from here:

    python tests/faults/harness/plan_map.py
    python tests/faults/harness/plan_map.py elsewhere
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from fault_table import replace_block

BEGIN, END = "<!-- map: begin -->", "<!-- map: end -->"

PLAN = {
    "A1": "killed at every failpoint",
    "A2": "killed at random times",
    "A3": "the commit layer alone, killed hundreds of times",
    "A4": "killed at the same place at every start",
    "A5": "order of writes and fsyncs",
    "A6": "a step is never overwritten",
    "A7": "a load that fails leaves nothing behind",
    "A8": "killed while old checkpoints go",
    "B1": "flipped bits in data",
    "B2": "flipped bits in the manifest",
    "B3": "files cut short or swollen",
    "B4": "missing, swapped and stray files",
    "B5": "files of two steps mixed",
    "B6": "snapshots while updates go on",
    "B7": "that B6 sees torn snapshots",
    "C1": "disk full",
    "C2": "too little space is seen before a save",
    "C3": "failures of the background writer are told",
    "C4": "host memory is budgeted before the start",
    "C5": "memory runs out at the same step again",
    "C6": "peak memory of loading",
    "C7": "nothing leaks over many saves",
    "D1": "resumed on as many ranks, at every step",
    "D2": "random numbers",
    "D3": "resumed on more or fewer ranks",
    "D4": "resumed by another engine",
    "D5": "checkpoints of ZeRO on another number of ranks",
    "D6": "stopped inside accumulation, warm-up, epochs",
    "D7": "resumed with more threads",
    "D8": "resumed twice from one checkpoint",
    "D9": "no row repeated or left out",
    "E1": "a worker of Ray killed",
    "E2": "killed right after a commit",
    "E3": "a node of Ray killed",
    "E4": "a node of Ray frozen and woken",
    "E5": "a rank stopped",
    "E6": "a rank hangs and keeps the interpreter's lock",
    "E7": "one rank slower than the others",
    "E8": "SIGTERM",
    "E9": "the launching process killed",
    "E10": "every start fails",
    "F1": "NaN on one rank",
    "F2": "NaN again and again",
    "F3": "spikes of the loss",
    "F4": "rewound, and batches skipped",
    "F5": "a bit flipped while computing",
    "F6": "a bit flipped in idle state",
    "G1": "broken rows",
    "G2": "a data worker killed",
    "G3": "prepared data changed",
    "G4": "the end of the data",
    "G5": "the order of rows at any point of resumption",
    "H1": "wrong settings",
    "H2": "other versions",
    "H3": "checkpoints of older code",
    "H4": "clocks that are wrong",
    "H5": "ranks that were started differently",
    "I1": "nothing is unpickled",
    "I2": "paths that lead out",
    "I3": "headers made to exhaust memory",
    "I4": "Ray without the token",
    "I5": "listening sockets",
    "I6": "permissions of files",
    "I7": "hostile recipes",
    "I8": "secrets",
    "I9": "what the code may not use",
    "J1": "random faults for minutes",
    "J2": "every interleaving of two starts",
}
"""The points, and what is done to the run in each."""

COMMIT = "trainer/checkpoint/test_commit.py"
ENERGY = "trainer/objectives/test_energy.py"
ORDER = "trainer/data/test_order.py"
PREPARE = "trainer/data/test_prepare.py"
VERIFY = "trainer/checkpoint/test_verify.py"

ELSEWHERE: dict[str, tuple[str, ...]] = {
    "A1": (
        "trainer/test_resume.py::"
        "test_a_run_killed_at_every_point_has_the_losses_of_the_straight_run",
    ),
    "A3": (
        "trainer/checkpoint/test_commit_kills.py::"
        "test_300_kills_show_nothing_broken_and_lose_nothing_promised",
    ),
    "A5": (f"{COMMIT}::test_every_byte_and_name_is_on_disk_before_it_is_needed",),
    "A6": (
        f"{COMMIT}::test_a_step_is_never_saved_twice",
        f"{COMMIT}::test_a_step_that_was_committed_meanwhile_is_not_replaced",
    ),
    "A7": (
        "trainer/test_resume.py::"
        "test_a_broken_newest_checkpoint_is_named_and_the_one_before_is_used",
    ),
    "B1": (f"{VERIFY}::test_every_one_of_300_single_byte_flips_is_seen",),
    "B2": (f"{VERIFY}::test_every_byte_of_the_manifest_counts",),
    "B3": (
        f"{VERIFY}::test_a_file_of_another_size_is_refused_without_reading_it",
        f"{VERIFY}::test_a_manifest_of_another_size_is_refused",
    ),
    "B4": (
        f"{VERIFY}::test_a_missing_file_is_named",
        f"{VERIFY}::test_two_files_that_changed_places_are_recognised",
        f"{VERIFY}::test_a_stray_file_is_reported_but_never_loaded",
    ),
    "B5": (
        f"{VERIFY}::test_a_file_of_step_10_inside_step_15_is_refused",
        f"{VERIFY}::test_the_whole_of_step_10_in_the_folder_of_step_15_is_refused",
    ),
    "C4": (
        "trainer/test_offloaded_runs.py::test_memory_that_is_not_there_is_refused_before_training",
    ),
    "D2": (
        f"{ENERGY}::test_a_killed_run_goes_on_with_the_same_losses_to_the_last_bit",
        f"{ENERGY}::test_two_ranks_have_the_run_of_one",
    ),
    "D3": ("trainer/test_reshard.py::test_two_ranks_then_one_then_four_go_on_as_one_straight_run",),
    "E8": (
        "trainer/test_resume.py::test_a_signal_finishes_the_step_saves_and_exits_with_zero",
        "trainer/test_saving.py::test_asked_to_stop_too_late_a_run_leaves_at_its_newest_checkpoint",
        "trainer/test_saving.py::test_a_run_that_waits_for_its_storage_stops_when_it_is_asked_to",
        "launch/test_launch_torchrun.py::"
        "test_sigterm_reaches_every_rank_once_and_the_run_goes_on_later",
    ),
    "G1": (
        f"{PREPARE}::test_a_bad_row_is_named_by_file_number_and_reason",
        f"{PREPARE}::test_skipped_rows_are_counted_and_listed",
        f"{PREPARE}::test_too_many_bad_rows_stop_the_work_and_keep_the_list",
    ),
    "G3": (
        f"{PREPARE}::test_every_single_byte_flip_of_a_corpus_is_found",
        "trainer/test_resume.py::test_a_changed_corpus_cannot_continue_a_run",
    ),
    "G4": (
        f"{PREPARE}::test_too_few_tokens_are_refused_with_numbers",
        f"{ORDER}::test_every_row_of_a_source_comes_once_in_each_epoch",
    ),
    "G5": (f"{ORDER}::test_a_row_depends_on_its_number_alone",),
    "H1": (
        "trainer/config/test_wrong_recipes.py::"
        "test_a_wrong_setting_is_answered_with_key_value_reason_and_remedy",
    ),
    "H2": (
        "trainer/checkpoint/test_manifest.py::test_a_newer_format_says_which_program_to_use",
        "trainer/test_resume.py::test_another_model_cannot_continue_a_run",
    ),
    "I2": (
        f"{VERIFY}::test_a_manifest_cannot_lead_out_of_its_folder",
        f"{VERIFY}::test_what_is_not_a_regular_file_is_not_opened",
        "trainer/checkpoint/test_manifest.py::test_a_name_that_could_leave_the_folder_is_refused",
    ),
}
"""Tests outside tests/faults that show a point, as `path::function` under tests/."""

MISSING: dict[str, str] = {}
"""Points that nothing shows yet, and why."""


def tests_of(root: Path) -> dict[str, list[str]]:
    """Return the tests of every point, as `path::function` under tests/."""
    found = {point: list(ELSEWHERE.get(point, ())) for point in PLAN}
    for path, function in functions_under(root / "tests" / "faults"):
        if named := re.match(r"test_([a-j][0-9]+)_", function):
            where = path.relative_to(root / "tests").as_posix()
            found[named[1].upper()].append(f"{where}::{function}")
    return found


def only_elsewhere(root: Path) -> list[str]:
    """Return the tests of the points that no test in tests/faults shows, as pytest takes them."""
    return [
        f"tests/{name}"
        for names in tests_of(root).values()
        if not any(name.startswith("faults/") for name in names)
        for name in names
    ]


def functions_under(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield every test function below a folder."""
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield path, node.name


def table(root: Path) -> str:
    """Return the map as a Markdown table."""
    lines = ["| point | what is done | shown by, under tests/ |", "|---|---|---|"]
    for point, names in tests_of(root).items():
        shown = "<br>".join(f"`{name}`" for name in names)
        lines.append(f"| {point} | {PLAN[point]} | {shown or MISSING.get(point, 'nothing')} |")
    return "\n".join(lines)


def write_map(root: Path) -> None:
    """Write the table into docs/reliability.md."""
    replace_block(root / "docs" / "reliability.md", BEGIN, END, table(root))


if __name__ == "__main__":
    if sys.argv[1:] == ["elsewhere"]:
        print(*only_elsewhere(Path(__file__).resolve().parents[3]), sep="\n")
    else:
        write_map(Path(__file__).resolve().parents[3])
