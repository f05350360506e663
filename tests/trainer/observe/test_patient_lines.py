"""A record on a disk that is full for a while."""

import logging
import resource
from pathlib import Path

import pytest

from interlace.trainer.observe.patient_lines import PatientLines


def test_lines_that_found_no_room_are_written_later_in_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = PatientLines(tmp_path / "lines")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING):
        for number in range(20):
            # The disk is full after 50 bytes, in the middle of a line, and until line 15.
            room = 50 if number < 15 else soft
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            try:
                lines.write(f"line {number:02}\n")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines.close()
    lines.close()
    expected = [f"line {number:02}" for number in range(20)]
    assert (tmp_path / "lines").read_text().splitlines() == expected
    [told] = [record.message for record in caplog.records]
    assert "File too large; lines are kept and written later" in told


def test_lines_that_never_found_room_are_counted_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = PatientLines(tmp_path / "lines")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, hard))
    try:
        for _ in range(3):
            lines.write("0123456789\n")
        lines.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "2 lines are lost" in caplog.text
    assert (tmp_path / "lines").read_text() == "0123456789\n0"
