"""What a checkpoint of a training run holds, and how all ranks load it together (`saves` has how
they save it).

Tensors: fp32 weights, optimizer moments and learnt clip thresholds under canonical names
(`model.<parameter>`, `optimizer.<parameter>.<moment>`), buffers of the model beside its weights,
and what the objective remembers (`objective.<name>`). Scalars, as JSON in the manifest: step,
tokens, skipped steps, the RNG state of every rank, the digest of the corpus and the configuration.
The learning rate schedule and the data order are pure functions of the step and need nothing more.
"""

import base64
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from interlace.offload.subgroup import THRESHOLD
from interlace.trainer.checkpoint.commit import CheckpointStore, Manifest
from interlace.trainer.checkpoint.failpoints import failpoint
from interlace.trainer.checkpoint.live import Live
from interlace.trainer.checkpoint.tensors import TensorReader, parse_index
from interlace.trainer.engines import Engine
from interlace.trainer.errors import CheckpointError
from interlace.trainer.guards.spikes import SpikeMemory
from interlace.trainer.world import World


class Progress(BaseModel):
    """The scalars of a run after some step; all of them are stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int = 0
    """Finished optimizer steps, skipped ones included."""

    tokens: int = 0
    """Tokens consumed."""

    skipped_steps: int = 0
    """Steps whose update was left out: loss or gradient was not finite, or a spike."""

    skipped_in_a_row: int = 0
    """Steps since the last good one whose loss or gradient was not finite, skipped or not."""

    spikes: SpikeMemory = SpikeMemory()
    """What the spike rule remembers."""


class RandomState(BaseModel):
    """The state of one rank's random generators."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    torch_cpu: str
    torch_device: str | None
    python: tuple[int, tuple[int, ...], float | None]
    numpy_words: tuple[int, ...]
    numpy_position: int
    numpy_has_gauss: int
    numpy_cached_gaussian: float

    @classmethod
    def capture(cls, device: torch.device) -> "RandomState":
        """Read the generators of this process."""
        words = numpy.random.get_state(legacy=True)
        assert isinstance(words, tuple)
        on_gpu = device.type == "cuda"
        return cls(
            torch_cpu=encode(torch.get_rng_state()),
            torch_device=encode(torch.cuda.get_rng_state(device)) if on_gpu else None,
            python=random.getstate(),
            numpy_words=tuple(int(word) for word in words[1]),
            numpy_position=int(words[2]),
            numpy_has_gauss=int(words[3]),
            numpy_cached_gaussian=float(words[4]),
        )

    def restore(self, device: torch.device) -> None:
        """Set the generators of this process."""
        torch.set_rng_state(decode(self.torch_cpu))
        if self.torch_device is not None and device.type == "cuda":
            torch.cuda.set_rng_state(decode(self.torch_device), device)
        random.setstate(self.python)
        words = numpy.array(self.numpy_words, dtype=numpy.uint32)
        numpy.random.set_state(
            (
                "MT19937",
                words,
                self.numpy_position,
                self.numpy_has_gauss,
                self.numpy_cached_gaussian,
            )
        )


class SavedScalars(BaseModel):
    """The JSON part of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    progress: Progress
    config: dict[str, object]
    corpus_digest: str
    vocabulary_size: int
    manifest: dict[str, object] = {}
    random_states: tuple[RandomState, ...]


class Remembers(Protocol):
    """What a checkpoint needs of an objective."""

    def state(self) -> dict[str, torch.Tensor]: ...

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None: ...


@dataclass(frozen=True)
class TrainingState:
    """The live objects that a checkpoint saves and restores."""

    model: nn.Module
    engine: Engine
    objective: Remembers
    world: World

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor of the state by key, which is its canonical name where this rank has
        one part of it; parts of it are this rank's shards.

        The names and precisions are the same wherever the optimizer keeps its state; no update is
        under way any more.
        """
        return {live.key: live.whole() for live in self.live()}

    def live(self) -> list[Live]:
        """Return where every tensor of the state lies, in the order of a checkpoint: what belongs
        to a parameter together, parameters in the order of the model, which is about that of
        updates. No update is under way any more.
        """
        self.engine.finish_step()
        found = self.engine.live(self.model)
        found += [Live(f"model.{name}", buffer) for name, buffer in self.model.named_buffers()]
        remembered = self.objective.state()
        return found + [Live(f"objective.{name}", tensor) for name, tensor in remembered.items()]

    def adopt(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make what `tensors` returned, after it was filled from a checkpoint, the live state."""
        self.engine.adopt(self.model, tensors)
        remembered = {
            name.removeprefix("objective."): tensor
            for name, tensor in tensors.items()
            if name.startswith("objective.")
        }
        self.objective.restore(remembered)


def encode(state: torch.Tensor) -> str:
    """Return a byte tensor as base64 text."""
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def decode(text: str) -> torch.Tensor:
    """Return base64 text as a byte tensor."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose manifest is valid: its step, scalars and a reader of its tensors."""

    step: int
    scalars: SavedScalars
    reader: TensorReader
    manifest: Manifest


def open_checkpoint(store: CheckpointStore, step: int) -> OpenCheckpoint:
    """Read and check the manifest of one committed step; file digests are checked by the caller.

    Raises:
        CheckpointError: The manifest is broken or does not hold what a training run saves.
    """
    manifest = store.read_manifest(step)
    try:
        scalars = SavedScalars.model_validate(manifest.payload.get("scalars"))
    except ValidationError as error:
        raise CheckpointError(f"checkpoint {step}: its scalars are malformed: {error}") from error
    index = parse_index(manifest.payload.get("tensors"))
    files = {record.name: store.committed_path(step) / record.name for record in manifest.files}
    strangers = {part.file for entry in index.values() for part in entry.slices} - files.keys()
    if strangers:
        raise CheckpointError(
            f"checkpoint {step}: its index names unknown files {sorted(strangers)}"
        )
    return OpenCheckpoint(step, scalars, TensorReader(index, files), manifest)


@dataclass(frozen=True)
class Restored:
    """What was restored, and the newer steps that were passed over because they are broken."""

    scalars: SavedScalars
    broken_steps: tuple[int, ...]
    messages: tuple[str, ...]


def load_newest(store: CheckpointStore, state: TrainingState) -> Restored:
    """Restore the newest checkpoint whose files are intact, on every rank, and say which were not.

    Every rank checks the digests of the files it reads before any tensor is touched; if one rank
    finds a broken file, all ranks turn to the checkpoint before.

    Raises:
        CheckpointError: There is a checkpoint, but none is intact, or it does not fit the model.
    """
    world = state.world
    broken: dict[int, str] = {}
    for step in reversed(world.broadcast(store.committed_steps())):
        opened: OpenCheckpoint | None = None
        problem: str | None = None
        try:
            opened = open_checkpoint(store, step)
            verify_needed(store, opened, state)
        except CheckpointError as error:
            problem = str(error)
        problems = [text for text in world.gather(problem) if text is not None]
        if problems:
            broken[step] = problems[0]
            continue
        assert opened is not None
        restore(opened, state)
        return Restored(opened.scalars, tuple(broken), tuple(broken.values()))
    raise CheckpointError("no intact checkpoint to resume from:\n" + "\n".join(broken.values()))


def verify_needed(store: CheckpointStore, opened: OpenCheckpoint, state: TrainingState) -> None:
    """Check the digest and the header of every file that this rank will read."""
    rank = state.world.rank
    wanted = [(live.name, live.part(live.whole(), rank)) for live in held(opened, state)]
    for name in sorted(opened.reader.files_for(wanted)):
        store.verified_path(opened.step, name, opened.manifest)
        opened.reader.check_file(name)


def held(opened: OpenCheckpoint, state: TrainingState) -> list[Live]:
    """Return what a checkpoint must hold of the state: all but thresholds of clipping, which a run
    that clipped otherwise has none of, and which the next step learns anew.

    Raises:
        CheckpointError: It has not what the update rule remembers.
    """
    index = opened.reader.index
    kept: list[Live] = []
    for live in state.live():
        owner, _, key = live.name.rpartition(".")
        updated = live.name not in index and f"{owner}.step" in index
        if updated and key in state.engine.moments:
            raise CheckpointError(
                f"tensor {live.name}: missing from the checkpoint, which was saved with another "
                "optimizer.rule, or with optimizer.beta1=0, which remembers no momentum; restore "
                "these settings, or start a new run with another run.dir"
            )
        if not (updated and key == THRESHOLD):
            kept.append(live)
    return kept


def restore(opened: OpenCheckpoint, state: TrainingState) -> None:
    """Copy a verified checkpoint into the live state and this rank's generators."""
    tensors: dict[str, torch.Tensor] = {}
    for live in held(opened, state):
        tensors[live.key] = live.whole()
        opened.reader.read_into(live.name, live.part(tensors[live.key], state.world.rank))
        failpoint("load.mid")
    state.adopt(tensors)
    random_states = opened.scalars.random_states
    # A rank that did not exist when the checkpoint was saved keeps its fresh generators.
    if state.world.rank < len(random_states):
        random_states[state.world.rank].restore(state.world.device)


def read_weights(store: CheckpointStore) -> tuple[dict[str, torch.Tensor], SavedScalars]:
    """Return the model weights of the newest intact checkpoint, whole and on the CPU, and its
    scalars.

    Raises:
        CheckpointError: There is no intact checkpoint.
    """
    step, _ = store.newest_usable()
    opened = open_checkpoint(store, step)
    for name in opened.reader.files:
        opened.reader.check_file(name)
    weights = {
        name.removeprefix("model."): opened.reader.read_whole(name)
        for name in opened.reader.index
        if name.startswith("model.")
    }
    return weights, opened.scalars
