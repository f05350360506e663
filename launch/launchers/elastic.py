"""One start of this machine's ranks: torchrun with another ending.

`python -m interlace.launch.launchers.elastic WORDS` takes torchrun's words. Where torchrun prints
a page and exits with 1 whatever happened, this exits with the status of the rank that failed first
(128 plus the signal's number, if one ended it) and leaves the telling to the launcher. Where
torchrun allows ranks 30 seconds after a signal, this hands the signal on and waits (on Linux): how
long saving may take, the sender knows.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from interlace.launch.launchers.parents import children, end_with_parent

FORWARDED = (signal.SIGTERM, signal.SIGINT)


def forward(number: int, frame: FrameType | None) -> None:
    """Hand a signal to every rank; with none started yet there is nothing to save."""
    ranks = children()
    if not ranks:
        os._exit(128 + number)
    for process in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def main(words: Sequence[str]) -> int:
    """Run torchrun's agent without restarts; return the exit status."""
    end_with_parent()
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    # Failures are told once, by the launcher, of the rank that failed first.
    logging.disable(logging.ERROR)
    fixed = ["--max-restarts", "0"]
    if sys.platform == "linux":
        for number in FORWARDED:
            signal.signal(number, forward)
        # The agent must not catch what is forwarded; it would stop waiting for the ranks.
        fixed += ["--signals-to-handle", "SIGQUIT"]
    try:
        run(parse_args([*fixed, *words]))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        code = first.exitcode
        return code if code >= 0 else 128 - code
    except SignalException as caught:
        # Where nobody can list the ranks, torchrun has told them, and waited for 30 seconds.
        return 128 + caught.sigval
    except (RendezvousError, DistError) as error:
        # Behind the first line there may be a stack of C++.
        said = str(error).strip().splitlines() or [type(error).__name__]
        print(f"interlace: the other machines are out of reach: {said[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
