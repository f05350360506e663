"""Turns the many ways in which memory runs out into one error that says what to lower.

torch raises `OutOfMemoryError` for a device, and for the host a plain `RuntimeError` of its
allocator; Python and numpy raise `MemoryError`, a mapping that fails an `OSError`. All of them
leave `train` as `MemoryShort`, whose exit status tells a launcher that one more try is worth it,
and that a second failure at the same step would be the same again.
"""

import errno
import re
from collections.abc import Generator
from contextlib import contextmanager

import torch

from interlace.offload.schedule import MemoryShortage
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError, MemoryShort
from interlace.trainer.plan import microbatch_rows
from interlace.trainer.world import World

HOST_WORDS = re.compile(
    r"DefaultCPUAllocator|can't allocate memory|not enough memory|std::bad_alloc"
    r"|unable to allocate|cannot allocate memory",
    re.IGNORECASE,
)
"""What the allocators of host memory say; none of them has an exception type of its own."""

DEVICE_WORDS = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
)


@contextmanager
def memory_in_words(config: RunConfig, world: World) -> Generator[None]:
    """Raise `MemoryShort` in place of whatever tells that memory ran out inside the context.

    Raises:
        MemoryShort: Host or device memory ran out.
        ConfigError: Optimizer state does not fit where the recipe wants it.
    """
    try:
        yield
    except MemoryShortage as error:
        raise ConfigError([str(error)]) from error
    except Exception as error:
        where = short_of(error)
        if where is None:
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise MemoryShort(
            f"{where} memory ran out on rank {world.rank}: {said[:300]}. The newest checkpoint is "
            f"untouched; resume with {', or '.join(remedies(config, world, where))}"
        ) from error


def short_of(error: Exception) -> str | None:
    """Return `device` or `host` for an error that tells that memory ran out, None for others."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and DEVICE_WORDS.search(text)
    ):
        return "device"
    told = isinstance(error, RuntimeError) and HOST_WORDS.search(text)
    refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return "host" if isinstance(error, MemoryError) or told or refused else None


def remedies(config: RunConfig, world: World, where: str) -> list[str]:
    """Return what to type, what costs least first."""
    train, offload = config.train, config.offload
    share = train.tokens_per_step // config.data.sequence_length // world.size
    rows = microbatch_rows(config, share)
    found: list[str] = []
    if rows > 1:
        found.append(f"train.microbatch_rows={rows // 2}")
    if train.activation_checkpointing != "block":
        found.append("train.activation_checkpointing=block")
    if where == "device" and offload.strategy != "host":
        found.append(f"offload.strategy={'optimal' if offload.strategy == 'none' else 'host'}")
    if offload.strategy != "none" and offload.moments != "bfloat16":
        found.append("offload.moments=bfloat16")
    if where == "host" and config.checkpoint.asynchronous:
        found.append("checkpoint.asynchronous=false")
    return [*found, "more ranks that share the weights"]
