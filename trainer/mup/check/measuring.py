"""A few steps of a recipe at one width, and the size of everything on the way.

The same micro-batch is passed in every step, so that a change of an activation is due to the
weights alone. Sizes are means of absolute values, and root mean squares of gradients and updates
divided by what muP expects of them: under muP no number here depends on the width.
"""

from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from interlace.offload.hardware import profile_hardware
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.trainer.assembly import build_model
from interlace.trainer.batches import Batch, StepBatches
from interlace.trainer.config.clip_checks import clip_stage
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.data.rows import TrainingRows, ValidationRows
from interlace.trainer.data.shards import PreparedCorpus
from interlace.trainer.models.language_model import Block, LanguageModel
from interlace.trainer.models.layers import RMSNorm
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import Entry, Manifest, is_scale_free, manifest_of
from interlace.trainer.objectives import objective_of
from interlace.trainer.optimizer import build_optimizer, set_learning_rate
from interlace.trainer.plan import Plan, Setting, resolve
from interlace.trainer.world import World

Statistic = Literal["size", "change", "gradient", "update", "clipped"]
"""What is measured: of activations their size and their change since the first step; of parameters
the gradient, the update, and the share of clipped coordinates.
"""


OBJECTIVE = "objective."
"""Begins the titles of what an objective reports."""

REPORTED = ("inner_gradient_norm",)
"""What is a size of all that objectives report; losses and differences of energies are none."""

FEW = 8
"""Tensors with fewer elements are chance, not size."""


class Key(NamedTuple):
    """One series of numbers: of which module or parameter, and what."""

    title: str
    statistic: Statistic


Series = defaultdict[Key, list[float]]
"""A number for every step."""


@dataclass
class Activations:
    """Sizes of what modules return, and changes since the first step.

    Attributes:
        rows: Names and sizes of the parts that a module's results are made of, by its name.
        first: Results of the first step, in the order in which they came.
        sizes: Of this step so far.
        changes: Of this step so far.
    """

    rows: dict[str, list[tuple[str, int]]]
    first: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    sizes: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    changes: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    begun: bool = False

    def note(self, title: str, value: torch.Tensor) -> None:
        """Note one result."""
        value = value.detach().float()
        place = len(self.sizes[title])
        self.sizes[title].append(float(value.abs().mean()))
        if not self.begun:
            self.first[title].append(value.clone())
        elif place < len(self.first[title]) and self.first[title][place].shape == value.shape:
            self.changes[title].append(float((value - self.first[title][place]).abs().mean()))

    def end_step(self, into: Series) -> None:
        """Move the means of this step into the series."""
        for title, found in self.sizes.items():
            into[Key(title, "size")].append(mean(found))
        for title, found in self.changes.items():
            into[Key(title, "change")].append(mean(found))
        self.sizes.clear()
        self.changes.clear()
        self.begun = True


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


@contextmanager
def watched(model: Model, manifest: Manifest) -> Generator[Activations]:
    """Note what every module with weights returns, and what every block adds to the stream."""
    rows = {
        name.rpartition(".")[0]: [(entry.rows, entry.shape[0]) for entry in entries]
        for name, entries in manifest.by_name.items()
        if len(entries) > 1 and name.endswith(".weight")
    }
    notes = Activations(rows)
    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if isinstance(module, Block):
            handles.append(module.register_forward_hook(partial(note_block, notes, name)))
        elif name and any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_hook(partial(note_result, notes, name)))
    if isinstance(model, LanguageModel):
        # The loss takes the output matrix itself.
        handles.append(model.norm.register_forward_hook(partial(note_logits, notes, model)))
    try:
        yield notes
    finally:
        for handle in handles:
            handle.remove()


def note_block(
    notes: Activations, name: str, block: nn.Module, given: tuple[torch.Tensor, ...], result: object
) -> None:
    """Forward hook of a block: note what it adds to the residual stream."""
    assert isinstance(result, tuple), "a block returns the stream and what it reports"
    notes.note(name, result[0] - given[0])


def note_result(
    notes: Activations, name: str, module: nn.Module, given: object, result: object
) -> None:
    """Forward hook of a module with weights: note what it returns, part by part."""
    if not isinstance(result, torch.Tensor):
        return
    parts = notes.rows.get(name, [])
    if parts and result.shape[-1] == sum(size for _, size in parts):
        for (part, _), piece in zip(
            parts, result.split([size for _, size in parts], dim=-1), strict=True
        ):
            notes.note(f"{name}[{part}]", piece)
        return
    # The norm before the outputs divides by the width on purpose; what it divides is looked at.
    notes.note(name, result / module.multiplier if isinstance(module, RMSNorm) else result)


def note_logits(
    notes: Activations, model: LanguageModel, norm: nn.Module, given: object, result: torch.Tensor
) -> None:
    """Forward hook of the norm before the outputs: note the logits."""
    with torch.no_grad():
        notes.note("head", functional.linear(result, model.head_weight().to(result.dtype)))


@dataclass(frozen=True)
class Trial:
    """One width and seed.

    Attributes:
        recipe: As it is trained.
        wanted: Its manifest with all rules, which says what to expect of every size.
        corpus: Where the rows come from.
        steps: How many are taken.
    """

    recipe: RunConfig
    wanted: Manifest
    corpus: PreparedCorpus
    steps: int


def measure(trial: Trial) -> Series:
    """Train a few steps on one micro-batch and return every series.

    A step that is not finite ends the trial; its series are then shorter.
    """
    recipe, world, series = trial.recipe, World(), Series(list)
    vocabulary = trial.corpus.index.vocabulary_size
    profile = profile_hardware(world.device, torch.float32)
    setting = Setting(1, world.device.type, vocabulary, None, profile)
    plan = resolve(recipe, setting)
    manifest = manifest_of(recipe, vocabulary)
    torch.manual_seed(recipe.run.seed)
    objective = objective_of(recipe)(recipe, plan, world)
    model = build_model(recipe, plan, manifest, world)
    optimizer = build_optimizer(model, recipe, plan, profile, manifest)
    set_learning_rate(optimizer, recipe.optimizer.peak_lr)
    weights = Weights(model, optimizer, trial.wanted, manifest, recipe)
    batch = first_batch(recipe, trial.corpus, plan, world)
    try:
        with watched(model, trial.wanted) as activations:
            for _ in range(trial.steps):
                loss = objective.loss(model, batch)
                loss.objective.backward()
                if not is_finite(loss.objective, optimizer):
                    break
                activations.end_step(series)
                for name in REPORTED:
                    if name in loss.details:
                        size = float(loss.details[name])
                        series[Key(f"{OBJECTIVE}{name}", "size")].append(size)
                weights.note_gradients(series)
                optimizer.step()
                optimizer.zero_grad()
                weights.note_updates(series)
    finally:
        optimizer.close()
    return series


def is_finite(loss: torch.Tensor, optimizer: OffloadedOptimizer) -> bool:
    """Whether the loss and all gradients are finite; a rule that clips coordinates would go on."""
    values = [loss, *(gradient for _, gradient in optimizer.gradients())]
    return all(bool(value.isfinite().all()) for value in values)


def first_batch(recipe: RunConfig, corpus: PreparedCorpus, plan: Plan, world: World) -> Batch:
    """Return the first micro-batch of a run."""
    batches = StepBatches(
        training=TrainingRows(corpus, recipe),
        validation=ValidationRows(corpus, recipe),
        plan=plan,
        world=world,
        end_of_text=corpus.index.end_of_text,
        respect_documents=recipe.data.respect_documents,
        validation_bytes_per_token=1.0,
    )
    return next(batches.of_step(0))


class Weights:
    """Gradients and updates of all parameters, against what muP expects of them."""

    def __init__(
        self,
        model: Model,
        optimizer: OffloadedOptimizer,
        wanted: Manifest,
        manifest: Manifest,
        recipe: RunConfig,
    ) -> None:
        self.parameters = dict(model.named_parameters())
        self.optimizer, self.wanted = optimizer, wanted
        self.scale_free = is_scale_free(recipe)
        # What a threshold on updates cuts is not seen in gradients.
        seen = recipe.coordinate_clip.policy == "fixed" and clip_stage(recipe) == "gradient"
        threshold = optimizer.rule.hyperparameters().get("threshold") if seen else None
        factors = {entry.title: entry.factors.threshold for entry in manifest.entries}
        # A recipe without a rule for rows, or without muP, has one threshold for a whole tensor.
        self.thresholds = {
            entry.title: threshold * factors.get(entry.title, factors.get(entry.name, 1.0))
            for entry in wanted.entries
            if threshold is not None
        }
        self.before = self.copies()

    def copies(self) -> dict[str, torch.Tensor]:
        """Return all weights as they are."""
        return {name: each.detach().clone() for name, each in self.parameters.items()}

    def note_gradients(self, series: Series) -> None:
        """Note gradients over the scale they should have, before the update."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for parameter, gradient in self.optimizer.gradients():
            for entry, piece in self.pieces(names[id(parameter)], gradient):
                size = root_mean_square(piece) / entry.factors.eps
                series[Key(entry.title, "gradient")].append(size)
                if entry.title in self.thresholds:
                    cut = piece.abs() > self.thresholds[entry.title]
                    series[Key(entry.title, "clipped")].append(float(cut.double().mean()))

    def note_updates(self, series: Series) -> None:
        """Note what a step changed, over the learning rate that Adam should have."""
        self.optimizer.synchronize()
        after = self.copies()
        for name, weight in after.items():
            for entry, piece in self.pieces(name, weight - self.before[name]):
                factors = entry.factors
                rate = factors.lr if self.scale_free else factors.lr * factors.eps
                series[Key(entry.title, "update")].append(root_mean_square(piece) / rate)
        self.before = after

    def pieces(self, name: str, value: torch.Tensor) -> Iterator[tuple[Entry, torch.Tensor]]:
        """Yield the blocks of rows of one tensor, but for those of a few numbers."""
        entries = self.wanted.by_name[name]
        blocks = value.split([entry.shape[0] for entry in entries])
        for entry, block in zip(entries, blocks, strict=True):
            if block.numel() >= FEW:
                yield entry, block


def root_mean_square(values: torch.Tensor) -> float:
    """Return the root of the mean square."""
    return float(values.double().square().mean().sqrt())
