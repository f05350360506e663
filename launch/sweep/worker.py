"""The process behind a trial: `python -m interlace.launch.sweep.worker STORE CODE`.

It reads one request a line and answers each with a line, so that one start of the interpreter
serves many trials. Whatever a trial prints goes to its log. When the other end of the pipe closes,
which it does however the sweep ends, the process leaves at once: nothing runs on without a sweep.
"""

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from queue import SimpleQueue
from typing import Any

SOURCES_CHANGED = 75
"""Exit status of a worker whose code is not that of the sweep."""

Message = dict[str, Any]


def main(store_folder: str, code: str) -> None:
    """Serve requests until there are no more.

    Args:
        store_folder: Folder of the store.
        code: Digest of the code that results are kept under.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    requests: SimpleQueue[Message] = SimpleQueue()
    threading.Thread(target=receive, args=(requests,), daemon=True).start()
    from interlace.launch.sweep.running import run_trial
    from interlace.launch.sweep.store import Store
    from interlace.launch.sweep.trials import code_version

    if code_version() != code:
        os._exit(SOURCES_CHANGED)
    store = Store(Path(store_folder))
    while True:
        request = requests.get()
        log_to(store.log_of(request["key"]))
        problem = ""
        try:
            run_trial(store, request["key"], request["recipe"])
        except Exception as error:
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error}"
        sys.stdout.flush()
        sys.stderr.flush()
        answers.write(json.dumps({"key": request["key"], "problem": problem}) + "\n")


def receive(requests: "SimpleQueue[Message]") -> None:
    """Hand on every request; leave the process when there will be none."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(0)


def log_to(path: Path) -> None:
    """Let both output streams end in a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    main(*sys.argv[1:])
