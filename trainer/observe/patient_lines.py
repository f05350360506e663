"""A file of lines that outlives a disk without room: what cannot be written now is kept and written
later, in order, so that a full disk costs a run neither its life nor its record.
"""

import logging
from pathlib import Path

_LOG = logging.getLogger(__name__)


class PatientLines:
    """Appends lines to a file.

    Args:
        path: The file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("ab", buffering=0)
        self.unwritten = b""
        self.told = False

    def write(self, line: str) -> None:
        """Append a line, after those that could not be written before."""
        self.unwritten += line.encode("utf-8")
        try:
            self.put()
        except OSError as error:
            if not self.told:
                _LOG.warning("%s: %s; lines are kept and written later", self.path, error.strerror)
            self.told = True
        else:
            self.told = False

    def put(self) -> None:
        """Write what is kept.

        Raises:
            OSError: Not all of it could be written; the rest is kept.
        """
        while self.unwritten:
            # A full disk takes the beginning of a line, and the next call the rest of it.
            written = self.file.write(self.unwritten)
            self.unwritten = self.unwritten[written:]

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self.file.closed:
            return
        try:
            self.put()
        except OSError as error:
            lost = self.unwritten.count(b"\n")
            _LOG.warning("%s: %s; %d lines are lost", self.path, error.strerror, lost)
        finally:
            self.file.close()
