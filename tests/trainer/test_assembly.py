"""What is left behind when a run ends hides nothing of how it ended, and is left only if there is
time.
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_run import config_of

from interlace.trainer.assembly import open_run
from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.errors import StorageError
from interlace.trainer.signals import StopRequest
from interlace.trainer.world import World


def test_a_storage_that_fails_to_the_end_does_not_hide_how_a_run_ended(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: CheckpointStore) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with pytest.raises(StorageError), open_run(config_of(tiny, tmp_path / "run"), World()):
        monkeypatch.setattr(CheckpointStore, "live_attempt", refuse)
        raise StorageError("nothing could be saved")


@pytest.mark.parametrize(("seconds_left", "drawn"), [(5.0, False), (500.0, True)])
def test_a_run_that_must_be_gone_soon_draws_nothing(
    seconds_left: float, drawn: bool, tiny: Sequence[str], tmp_path: Path
) -> None:
    stop = StopRequest(announce=False)
    with open_run(config_of(tiny, tmp_path / "run"), World(), stop):
        stop.ask("notice", seconds_left)
    assert (tmp_path / "run" / "report.html").exists() is drawn
