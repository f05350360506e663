"""A tiny run of this process, its state, and ways to damage its files."""

import contextlib
import hashlib
import io
import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from interlace.trainer.assembly import assemble
from interlace.trainer.checkpoint.state import TrainingState
from interlace.trainer.config import load_recipe
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.loop import train
from interlace.trainer.world import World


def config_of(words: Sequence[str], run: Path, *more: str) -> RunConfig:
    """Return the recipe that these words of a command line mean, for a run in a folder."""
    recipe, *overrides = words
    return load_recipe(recipe, [*overrides, f"run.dir={run}", *more]).config


def train_here(words: Sequence[str], run: Path, *more: str) -> str:
    """Train in this process; return what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train(config_of(words, run, *more), World())
    return said.getvalue()


def state_of(words: Sequence[str], run: Path, *more: str) -> TrainingState:
    """Return the live state that a start of a run in a folder builds."""
    with contextlib.redirect_stdout(io.StringIO()):
        parts, _, _ = assemble(config_of(words, run, *more), World())
    return parts.state


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def bit_flipped(path: Path, bit: int) -> Generator[None]:
    """Flip one bit of a file, counted from its beginning, inside the context."""
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        yield
    finally:
        path.write_bytes(sound)


def sign(manifest: Path, document: dict[str, object]) -> None:
    """Write a manifest with a digest that fits, as somebody with write access could."""

    def text_of(content: object) -> str:
        return json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n"

    rest = {key: value for key, value in document.items() if key != "self_digest"}
    digest = hashlib.sha256(text_of(rest).encode("ascii")).hexdigest()
    manifest.write_text(text_of({**rest, "self_digest": digest}), encoding="ascii")
