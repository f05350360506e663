"""What the offload engine decides while a run goes on, where a person sees it: between the lines of
the console and in the run folder.

The engine logs and knows nothing of runs; without this its messages would reach nobody at a command
line.
"""

import logging
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from interlace.trainer.observe.console import Console

ENGINE = "interlace.offload"
LOG_NAME = "offload.log"


class Notes(logging.Handler):
    """Hands the engine's messages to a console and a file; the file exists once there is one."""

    def __init__(self, console: Console, path: Path) -> None:
        super().__init__(logging.INFO)
        self.console = console
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Note one message."""
        text = record.getMessage()
        self.console.note(f"offload: {text}")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")


@contextmanager
def engine_messages(console: Console, run_dir: Path) -> Generator[None]:
    """Show what the engine says, on the rank that prints."""
    logger = logging.getLogger(ENGINE)
    if not console.is_main:
        yield
        return
    handler, before = Notes(console, run_dir / LOG_NAME), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
