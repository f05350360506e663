"""A log of commits outside the run folder, against which fault tests hold what they find there.

If the environment variable INTERLACE_ACK_LOG names a file, every published checkpoint adds the line
`step S attempt A committed` to it, fsynced, after the checkpoint is durable and before anybody else
learns of it. Whatever the log names must be there after any fault, but for what retention let go.
"""

import os

VARIABLE = "INTERLACE_ACK_LOG"


def acknowledge(step: int, attempt: int) -> None:
    """Add a commit to the log, if there is one.

    Raises:
        OSError: It cannot be written.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        # One write of a short line to a file opened for appending: lines never mix.
        os.write(descriptor, f"step {step} attempt {attempt} committed\n".encode("ascii"))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
