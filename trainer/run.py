"""The machinery behind the loop: one object holds everything a run owns, each method one step's
part.

`interlace.trainer.assembly` builds it. Everything that changes while training is in `Progress` and
in the tensors of `TrainingState`; both are saved and restored as a whole.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from interlace.offload.hardware import HardwareProfile, resident_bytes
from interlace.offload.report import UpdateReport
from interlace.trainer.batches import Batch, StepBatches
from interlace.trainer.checkpoint.failpoints import failpoint
from interlace.trainer.checkpoint.state import Progress, TrainingState, save
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.diagnostics import (
    AskedAfterUpdate,
    AskedEveryStep,
    Diagnostic,
    Draws,
    LooksAtTensors,
    TakesLosses,
)
from interlace.trainer.errors import NumericsError, SaveError
from interlace.trainer.evidence import save_evidence
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import Manifest
from interlace.trainer.objectives import Loss, Objective
from interlace.trainer.observe.console import Console, is_logged
from interlace.trainer.observe.expert_load import describe_loads
from interlace.trainer.observe.metrics import Histogram, MetricsWriter, StepRecord
from interlace.trainer.optimizer import check_rates, set_learning_rate
from interlace.trainer.plan import Plan
from interlace.trainer.run_folder import RunFolder
from interlace.trainer.schedules import learning_rate
from interlace.trainer.signals import StopRequest
from interlace.trainer.validation import Validation, validate
from interlace.trainer.world import World


@dataclass(frozen=True)
class Parts:
    """What a run is made of; built once by `interlace.trainer.assembly`."""

    config: RunConfig
    world: World
    folder: RunFolder
    plan: Plan
    hardware: HardwareProfile
    attempt: int
    corpus_digest: str
    batches: StepBatches
    manifest: Manifest
    model: Model
    objective: Objective
    state: TrainingState
    diagnostics: Sequence[Diagnostic]


class StepSums:
    """What the micro-batches of one rank add up to in one step."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.details: dict[str, float] = {}
        self.loads: list[torch.Tensor] = []

    def add(self, loss: Loss, accumulation: int) -> None:
        """Count one of `accumulation` micro-batches."""
        self.loss += float(loss.mean_nll.detach()) / accumulation
        for name, value in loss.details.items():
            share = float(value.detach()) / accumulation
            self.details[name] = self.details.get(name, 0.0) + share
        loads = [load.cpu().double() for load in loss.expert_loads]
        before = self.loads or [torch.zeros_like(load) for load in loads]
        self.loads = [total + load for total, load in zip(before, loads, strict=True)]

    def packed(self, stop: bool) -> torch.Tensor:
        """Return loss, wish to stop, details and loads as one vector to be summed over ranks."""
        head = torch.tensor([self.loss, float(stop), *self.details.values()], dtype=torch.float64)
        return torch.cat([head, *self.loads])

    def unpacked(
        self, total: torch.Tensor, ranks: int
    ) -> tuple[dict[str, float], list[torch.Tensor]]:
        """Return the details, as means over ranks, and the loads, as sums, of a summed vector."""
        first = 2 + len(self.details)
        means = [float(value) / ranks for value in total[2:first]]
        loads = list(total[first:].split([len(load) for load in self.loads])) if self.loads else []
        return dict(zip(self.details, means, strict=True)), loads


@dataclass
class StepNotes:
    """What one step leaves for the log line."""

    loss: float = 0.0
    gradient_norm: float = 0.0
    rate: float = 0.0
    skipped: bool = False
    details: dict[str, float] = field(default_factory=dict[str, float])
    expert_loads: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    histograms: dict[str, Histogram] = field(default_factory=dict[str, Histogram])
    of_tensors: dict[str, float] = field(default_factory=dict[str, float])
    validation: Validation | None = None
    started: float = field(default_factory=time.perf_counter)


class Run:
    """A run in progress, as the loop sees it."""

    def __init__(
        self,
        parts: Parts,
        progress: Progress,
        console: Console,
        metrics: MetricsWriter | None,
        stop: StopRequest,
    ) -> None:
        self.parts = parts
        self.progress = progress
        self.console = console
        self.metrics = metrics
        self.stop = stop
        self.stop_requested = False
        self.saved_step = progress.step
        self.last_validation_loss: float | None = None
        self.notes = StepNotes()
        for diagnostic in parts.diagnostics:
            if isinstance(diagnostic, TakesLosses):
                diagnostic.provide(parts.objective, parts.batches)

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return self.parts.folder

    @property
    def plan(self) -> Plan:
        """What was resolved before the first step."""
        return self.parts.plan

    def remaining_steps(self) -> Iterator[int]:
        """Yield the numbers, from 0, of the steps that are still to do."""
        for step in range(self.progress.step, self.plan.steps):
            self.notes = StepNotes()
            yield step

    def forward_backward(self, step: int) -> float:
        """Accumulate the gradient of one step; return its mean loss over all ranks (nats per
        token).

        The same exchange tells every rank whether any of them was asked to stop, and what the
        objective and the experts report.
        """
        plan, world = self.plan, self.parts.world
        self.notes.rate = learning_rate(step, plan.steps, self.parts.config.optimizer)
        # Before backward: with overlap an update begins as soon as its gradients are complete.
        set_learning_rate(self.parts.state.optimizer, self.notes.rate)
        sums = StepSums()
        for batch in self.parts.batches.of_step(step):
            sums.add(self.backward_of(batch), plan.accumulation)
        total = world.sum(sums.packed(self.stop.received))
        self.stop_requested = bool(total[1] > 0)
        self.notes.details, self.notes.expert_loads = sums.unpacked(total, world.size)
        return float(total[0]) / world.size

    def backward_of(self, batch: Batch) -> Loss:
        """Run one micro-batch forward and backward; return its losses."""
        failpoint("step.forward")
        loss = self.parts.objective.loss(self.parts.model, batch)
        failpoint("step.backward")
        (loss.objective / self.plan.accumulation).backward()
        return loss

    def gradient_norm(self) -> float:
        """Return the global gradient norm over all ranks."""
        return self.parts.state.optimizer.gradient_norm()

    def diagnose(self, step: int) -> None:
        """Ask the recipe's diagnostics about a gradient: about that of every step, or of those
        whose line will be printed. With these, see that every group still has its learning rate.
        """
        logged = is_logged(step + 1, self.plan.steps, self.parts.config.observe.log_every_steps)
        if logged:
            check_rates(self.parts.state.optimizer, self.notes.rate)
        for diagnostic in self.parts.diagnostics:
            if logged or isinstance(diagnostic, AskedEveryStep):
                self.notes.details.update(diagnostic.after_backward(step + 1))
                if isinstance(diagnostic, Draws):
                    self.notes.histograms.update(diagnostic.histograms())
                if isinstance(diagnostic, LooksAtTensors):
                    self.notes.of_tensors.update(diagnostic.of_tensors())

    def diagnose_update(self, step: int) -> None:
        """Ask those diagnostics that look at updates."""
        for diagnostic in self.parts.diagnostics:
            if isinstance(diagnostic, AskedAfterUpdate):
                self.notes.details.update(diagnostic.after_update(step + 1))

    def update_or_skip(self, step: int, batch_loss: float, norm: float) -> None:
        """Clip and update; leave a step out whose loss or gradient is not finite, on all ranks
        alike, unless the update rule guards against single coordinates that are not.

        Raises:
            NumericsError: Too many such steps in a row; the evidence is in the run folder.
        """
        failpoint("step.update")
        optimizer = self.parts.state.optimizer
        bad = not (is_finite(batch_loss) and is_finite(norm))
        skipped = bad and not optimizer.guards
        self.notes.loss, self.notes.gradient_norm = batch_loss, norm
        self.notes.skipped = skipped
        self.progress = advance(self.progress, self.plan.tokens_per_step, bad, skipped)
        if bad:
            self.report_bad_step(step, batch_loss, norm)
        if not skipped:
            optimizer.step()
            self.parts.model.balance_experts(self.notes.expert_loads)
        optimizer.zero_grad()
        self.diagnose_update(step)

    def report_bad_step(self, step: int, loss: float, norm: float) -> None:
        """Tell of a step that is not finite, before its update where there is one; stop the run
        when there were too many.
        """
        parts = self.parts
        optimizer, limit = parts.state.optimizer, parts.config.train.max_bad_steps
        count = self.progress.skipped_in_a_row
        outcome = "coordinates that are not count as 0" if optimizer.guards else "update skipped"
        self.console.note(
            f"step {step + 1}: loss {loss} or gradient norm {norm} is not finite; {outcome} "
            f"({count} in a row, {limit} stop the run)"
        )
        begun = optimizer.update_begun and not optimizer.guards
        if count < limit and not begun:
            return
        folder = save_evidence(self.folder.path, step, parts.batches, parts.state)
        lower = f"optimizer.peak_lr={parts.config.optimizer.peak_lr}"
        if begun:
            raise NumericsError(
                f"step {step + 1}: loss {loss} or gradient norm {norm} is not finite, and "
                "offload.overlap=backward had begun the update. The evidence is in "
                f"{folder}; resume from the newest checkpoint, with a lower {lower} or with "
                "offload.overlap=forward, which skips such steps."
            )
        also = "" if optimizer.guards else " or turn on optimizer.clip"
        raise NumericsError(
            f"{count} steps in a row had a loss or gradient that is not finite "
            f"(train.max_bad_steps={limit}); "
            f"last loss {loss}, gradient norm {norm}. The evidence is in {folder}; the newest "
            f"checkpoint is untouched. Lower {lower}{also}, and resume."
        )

    def validate_if_due(self) -> None:
        """Measure the held-out loss every so many steps and after the last."""
        every, step = self.parts.config.train.validate_every_steps, self.progress.step
        if step != self.plan.steps and not (every and step % every == 0):
            return
        parts = self.parts
        self.notes.validation = validate(parts.model, parts.objective, parts.batches, parts.world)
        self.last_validation_loss = self.notes.validation.loss

    def observe(self) -> None:
        """Write the step's record; print it when a line is due."""
        if self.metrics is None:
            return
        record = self.record()
        self.metrics.write(record)
        self.metrics.write_histograms(self.notes.histograms, record.step)
        self.metrics.write_of_tensors(self.notes.of_tensors, record.step)
        self.console.step(record)

    def record(self) -> StepRecord:
        """Return what is known of the finished step."""
        notes, plan, hardware = self.notes, self.plan, self.parts.hardware
        validation = notes.validation
        seconds = time.perf_counter() - notes.started
        spent_training = seconds - (validation.seconds if validation else 0.0)
        speed = plan.tokens_per_step / spent_training
        peak = hardware.matmul_flops * plan.world_size
        update = self.newest_update()
        on_gpu = self.parts.world.device.type == "cuda"
        return StepRecord(
            step=self.progress.step,
            tokens=self.progress.tokens,
            loss=notes.loss,
            lr=notes.rate,
            grad_norm=notes.gradient_norm,
            tokens_per_second=speed,
            mfu=speed * plan.flops_per_token / peak,
            device_memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
            host_memory_bytes=resident_bytes(),
            step_seconds=spent_training,
            update_seconds=update.update_seconds if update else None,
            exposed_update_seconds=update.exposed_seconds if update else None,
            val_loss=validation.loss if validation else None,
            val_bits_per_byte=validation.bits_per_byte if validation else None,
            val_perplexity=validation.perplexity if validation else None,
            skipped=True if notes.skipped else None,
            details=notes.details | describe_loads(notes.expert_loads),
        )

    def newest_update(self) -> UpdateReport | None:
        """Return the report of the newest update that is complete; with overlap one may be under
        way, which is not waited for.
        """
        optimizer = self.parts.state.optimizer
        return optimizer.finish_report() if optimizer.overlap == "none" else optimizer.monitor.last

    def checkpoint_if_due(self) -> None:
        """Commit a checkpoint every so many steps; a save that fails does not stop the training."""
        every, step = self.parts.config.checkpoint.every_steps, self.progress.step
        if every and step % every == 0 and step < self.plan.steps and not self.stop_requested:
            self.save_checkpoint()

    def save_checkpoint(self) -> str | None:
        """Commit the state after the last finished step and let old checkpoints go.

        Returns:
            None, or why the checkpoint could not be written.
        """
        parts, keep = self.parts, self.parts.config.checkpoint
        scalars = {
            "config": parts.config.model_dump(mode="json"),
            "corpus_digest": parts.corpus_digest,
            "vocabulary_size": self.plan.vocabulary_size,
            "manifest": parts.manifest.document,
        }
        try:
            save(self.folder.store, parts.attempt, parts.state, scalars, self.progress)
        except SaveError as error:
            self.console.note(f"checkpoint at step {self.progress.step} failed: {error}")
            return str(error)
        self.saved_step = self.progress.step
        if parts.world.is_main:
            self.folder.store.retain(keep.keep_last, keep.keep_every_steps)
        return None

    def conclude(self) -> None:
        """Commit what is not committed yet, after the last step or on a stop signal.

        Raises:
            SaveError: The last state could not be saved; the newest checkpoint is older.
        """
        if self.saved_step == self.progress.step and self.folder.store.committed_steps():
            return
        failure = self.save_checkpoint()
        if failure is not None:
            raise SaveError(
                f"the state after step {self.progress.step} is not saved: {failure}; "
                f"the newest checkpoint is of step {self.saved_step}"
            )


def advance(progress: Progress, tokens: int, bad: bool, skipped: bool) -> Progress:
    """Return the counters after one more step, bad or not, whose update was skipped or not."""
    return Progress(
        step=progress.step + 1,
        tokens=progress.tokens + tokens,
        skipped_steps=progress.skipped_steps + skipped,
        skipped_in_a_row=progress.skipped_in_a_row + 1 if bad else 0,
    )


def is_finite(value: float) -> bool:
    """Whether a number is neither infinite nor NaN."""
    return value - value == 0.0
