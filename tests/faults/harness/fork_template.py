"""A process that has imported everything and does nothing but fork ranks.

Most of the seconds that a small run takes are imports; a rank forked from here starts in a tenth of
them, so that runs can be broken in hundreds. The template starts no thread and opens no process
group: a fork of it is as good as a new process. It takes orders as lines of JSON, and ends with its
standard input:

    {"words": [...], "environment": {...}, "hooks": {...}, "folder": PATH, "output": PATH}
                     starts a rank; the answer is its pid. Hooks: see rank_hooks.py
    {"reap": PID}    the answer is the exit code, minus the signal where it was killed

A rank ends by itself, as `interlace` does, or is killed by those who ordered it.
"""

import importlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from rank_hooks import apply

from interlace.launch.launchers.parents import end_with_parent

MODULES = (
    "interlace.kernels.update.cpu",
    "interlace.launch.commands",
    "interlace.trainer.loop",
    "torch.utils.tensorboard.writer",
    "torch.distributed.fsdp",
    "interlace.trainer.observe.plots",
    "interlace.trainer.observe.report",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "safetensors.torch",
)
"""What a run imports at the latest while it runs."""


def become_rank(order: dict[str, Any]) -> NoReturn:
    """Run one command of `interlace` in this process, and end it."""
    # No rank outlives the test that started it, however that ends.
    end_with_parent(signal.SIGKILL)
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    sys.stdout.reconfigure(line_buffering=True)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.chdir(order["folder"])
    os.environ.update(order["environment"])
    apply(order["hooks"])
    from interlace.launch import cli

    try:
        cli.run(order["words"])
    except SystemExit as ended:
        os._exit(ended.code if isinstance(ended.code, int) else 1)


def obey(order: dict[str, Any]) -> int:
    """Carry out one order; return what is asked for."""
    if "reap" in order:
        return os.waitstatus_to_exitcode(os.waitpid(order["reap"], 0)[1])
    child = os.fork()
    if child == 0:
        become_rank(order)
    return child


def main() -> None:
    """Import, then take orders."""
    for module in MODULES:
        importlib.import_module(module)
    tasks = len(list(Path("/proc/self/task").iterdir()))
    assert threading.active_count() == tasks == 1, "a fork would not have the threads that run here"
    print("ready", flush=True)
    for line in sys.stdin:
        print(obey(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
