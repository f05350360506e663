"""A worker that is killed the first time it has a task that it was told."""

import os
import signal
from pathlib import Path

from interlace.trainer.data import prepare

RUN_TASK = prepare.run_task
PLAN = "TEST_DEADLY_TASK"
"""Variable that holds `NUMBER:WHEN:FOLDER[:always]`; FOLDER remembers who was killed."""


def run_task(task: prepare.Task) -> prepare.TaskResult:
    """Do the task; or be killed before it, in the middle of a shard, or behind it."""
    number, when, folder, *always = os.environ[PLAN].split(":")
    mark = Path(folder) / number
    deadly = str(task.number) == number and (always or not mark.exists())
    if deadly:
        mark.touch()
    if deadly and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = RUN_TASK(task)
    if deadly and when == "within":
        for split in (result.train, result.validation):
            for shard in split.shards:
                path = task.folder / shard.file
                os.truncate(path, path.stat().st_size // 2)
    if deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
