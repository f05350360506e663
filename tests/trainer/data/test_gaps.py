"""Batches that are left out: every other one comes once, in order."""

from pathlib import Path

import pytest

from interlace.trainer.branching import check_gaps
from interlace.trainer.config import load_recipe
from interlace.trainer.data.gaps import batch_of, gap_text, parse_gaps, with_gap
from interlace.trainer.data.prepare import prepare
from interlace.trainer.data.rows import TrainingRows
from interlace.trainer.errors import ConfigError


@pytest.mark.parametrize("text", ["", "1:4", "7:9", "1:2,5:11,12:13", "2:4,4:5"])
def test_all_other_batches_come_once_and_in_order(text: str) -> None:
    gaps = parse_gaps(text)
    left_out = {number - 1 for first, last in gaps for number in range(first, last)}
    expected = [batch for batch in range(50) if batch not in left_out]
    assert [batch_of(step, gaps) for step in range(len(expected))] == expected


@pytest.mark.parametrize(
    ("gap", "text"),
    [
        ((1, 2), "1:2,5:8,20:30"),
        ((8, 9), "5:9,20:30"),
        ((3, 25), "3:30"),
        ((40, 50), "5:8,20:30,40:50"),
    ],
)
def test_another_gap_leaves_out_what_it_says_and_what_was_left_out(
    gap: tuple[int, int], text: str
) -> None:
    before = parse_gaps("5:8,20:30")
    assert gap_text(with_gap(before, *gap)) == text
    assert parse_gaps(text) == with_gap(before, *gap)


def test_rows_of_a_run_with_a_gap_are_those_of_the_run_without_it_but_for_the_gap(
    tmp_path: Path,
) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be, " * 2000, encoding="utf-8")
    words = [
        f"data.source={tmp_path / 'text.txt'}",
        f"data.prepared_dir={tmp_path / 'prepared'}",
        "data.sequence_length=32",
        "train.tokens_per_step=128",
    ]
    config = load_recipe("quickstart", words).config
    gapped = load_recipe("quickstart", [*words, "data.skip_batches=4:7"]).config
    corpus = prepare(config.data, announce=print)
    whole, shifted = TrainingRows(corpus, config), TrainingRows(corpus, gapped)
    ledger = [whole.place(step, number) for step in range(10) for number in range(4)]
    assert ledger == list(range(40))
    assert [shifted.place(step, n) for step in range(7) for n in range(4)] == [
        *range(12),
        *range(24, 40),
    ]
    assert (shifted.batch(3, range(4)) == whole.batch(6, range(4))).all()


def test_a_branch_may_not_leave_out_what_its_checkpoint_was_trained_on() -> None:
    words = ["run.branch_of=old", "run.branch_step=20"]
    config = load_recipe("quickstart", [*words, "data.skip_batches=5:8,24:30"]).config
    now = parse_gaps(config.data.skip_batches)
    check_gaps(config, parse_gaps("5:8"), now)
    with pytest.raises(ConfigError, match="add only batches from 21 on"):
        check_gaps(config, (), now)
    with pytest.raises(ConfigError, match="add only batches from 27 on"):
        check_gaps(config, parse_gaps("2:8"), now)
