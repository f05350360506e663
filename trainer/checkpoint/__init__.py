"""Checkpoints that are committed or invisible.

`commit` holds the protocol (reserve, write, publish, retain), `verify` checks what was published,
`manifest` is the file that makes a folder a checkpoint, `failpoints` are the places where tests
break the program. Everything exported here is plain Python: it loads neither torch nor numpy, so it
starts quickly and can be killed hundreds of times in a test.
"""

from interlace.trainer.checkpoint.commit import CheckpointStore, Superseded, Usable
from interlace.trainer.checkpoint.files import write_file
from interlace.trainer.checkpoint.manifest import FileRecord, JsonValue, Manifest
from interlace.trainer.checkpoint.verify import StepReport, verify_run, verify_step

__all__ = [
    "CheckpointStore",
    "FileRecord",
    "JsonValue",
    "Manifest",
    "StepReport",
    "Superseded",
    "Usable",
    "verify_run",
    "verify_step",
    "write_file",
]
