"""The entry of a watcher: `python -S -m interlace.trainer.watchdog DESCRIPTION MEMORY LINE`.

DESCRIPTION is the watched rank as JSON, MEMORY and LINE are inherited descriptors. It is started by
`interlace.trainer.watchdog.watch`, not by people.
"""

import json
import signal
import socket
import sys

from interlace.trainer.watchdog.watcher import Watched, Watcher

if __name__ == "__main__":
    # Signals to the whole group are for the rank, which may take its time to save.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    description, memory, line = sys.argv[1:]
    Watcher(Watched(**json.loads(description)), int(memory), socket.socket(fileno=int(line))).run()
