"""One rank's part of a checkpoint, written by a thread of its own while training goes on.

The thread reads what the ledger hands out, writes it with digests into one safetensors file, and
never talks to another rank: how far it is, is asked for.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from interlace.trainer.checkpoint.files import write_file
from interlace.trainer.checkpoint.ledger import Ledger, Pool
from interlace.trainer.checkpoint.live import Source
from interlace.trainer.checkpoint.manifest import FileRecord
from interlace.trainer.checkpoint.tensors import TensorIndex, index_of, safetensors_head
from interlace.trainer.errors import SaveError

_LOG = logging.getLogger(__name__)

Written = tuple[FileRecord, TensorIndex]
"""What a rank tells the others of its file."""


class Snapshot:
    """This rank's state after one step, on its way to a file. Making one begins to write.

    Args:
        sources: This rank's parts of all tensors, in the order of the file.
        pool: Room for what updates have to copy.
        path: The file.
        device: Where the model is.

    Attributes:
        written: The file and its index, once it is complete.
        error: Why there is none, once that is clear.
        seconds: How long it took, once it is over.
    """

    def __init__(
        self, sources: Sequence[Source], pool: Pool, path: Path, device: torch.device
    ) -> None:
        self.path = path
        self.device = device
        self.written: Written | None = None
        self.error: str | None = None
        self.seconds = 0.0
        self.parts = {source.key: source.placed for source in sources}
        pool.provide_for(sum(placed.bytes for placed in self.parts.values()))
        self.ledger = Ledger(sources, pool)
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether the thread is done, well or badly."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Block until it is over."""
        self._thread.join()

    def give_up(self, seconds: float | None = None) -> None:
        """Stop writing as soon as possible, and leave nothing of the file; returns when the thread
        is gone, or after so many seconds.
        """
        self.ledger.close()
        self._thread.join(seconds)

    def _run(self) -> None:
        began = time.perf_counter()
        on_gpu = self.device.type == "cuda"
        try:
            # Copies must not queue behind the kernels of the forward pass.
            stream = torch.cuda.stream(torch.cuda.Stream(self.device)) if on_gpu else nullcontext()
            with stream:
                record = write_file(self.path, self._contents())
            self.written = record, index_of(self.path.name, self.parts)
        except SaveError as error:
            self.error = str(error)
        except BaseException as error:
            _LOG.exception("the thread that saves failed")
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self.ledger.close()
            self.seconds = time.perf_counter() - began

    def _contents(self) -> Iterator[bytes | memoryview]:
        yield safetensors_head(self.parts)
        yield from self.ledger.contents()
