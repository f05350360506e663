"""The machinery behind the loop: one object holds everything a run owns, each method one step's
part.

`interlace.trainer.assembly` builds it. Everything that changes while training is in `Progress` and
in the tensors of `TrainingState`; both are saved and restored as a whole.
"""

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from interlace.offload.hardware import resident_bytes
from interlace.trainer.batches import Batch
from interlace.trainer.checkpoint.failpoints import disturbed, failpoint
from interlace.trainer.checkpoint.state import Progress
from interlace.trainer.diagnostics import (
    AskedAfterUpdate,
    AskedEveryStep,
    Draws,
    LooksAtTensors,
    TakesLosses,
)
from interlace.trainer.guarding import Guarding
from interlace.trainer.heartbeat import Heartbeat
from interlace.trainer.models.model import Model
from interlace.trainer.objectives import Loss
from interlace.trainer.observe.console import Console, is_logged
from interlace.trainer.observe.expert_load import describe_loads
from interlace.trainer.observe.memory_watch import MemoryWatch
from interlace.trainer.observe.metrics import Histogram, MetricsWriter, StepRecord
from interlace.trainer.optimizer import check_rates, set_learning_rate
from interlace.trainer.parts import Parts
from interlace.trainer.plan import Plan
from interlace.trainer.run_folder import RunFolder
from interlace.trainer.saving import Saving
from interlace.trainer.schedules import learning_rate
from interlace.trainer.signals import StopRequest
from interlace.trainer.step_sums import StepSums
from interlace.trainer.stragglers import Stragglers
from interlace.trainer.validation import Validation, validate


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
        self.saving = Saving(parts, progress.step, console, stop)
        self.guarding = Guarding(parts, console)
        self.heartbeat = parts.heartbeat
        self.stragglers = Stragglers(parts.world.size, parts.config.watchdog.straggler_factor)
        self.memory = MemoryWatch(console.note)
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
        plan = self.plan
        self.notes.rate = learning_rate(step, plan.steps, self.parts.config.optimizer)
        # Before backward: with overlap an update begins as soon as its gradients are complete.
        set_learning_rate(self.parts.state.engine.optimizer, self.notes.rate)
        self.guarding.integrity.idle.before_backward()
        sums = StepSums()
        self.heartbeat.enter("data", step + 1)
        for batch in self.parts.batches.of_step(step):
            loss = self.guarding.integrity.backward(batch, self.backward_of)
            sums.add(loss, plan.accumulation)
            self.heartbeat.enter("data")
        self.heartbeat.enter("exchange")
        flags = {"stop": float(self.stop.received), **self.saving.flags()}
        flags |= self.guarding.integrity.flags()
        heard = sums.exchange(self.parts.world, flags, self.heartbeat.own.take())
        self.guarding.integrity.hear(step, heard.flags, self.backward_of)
        self.saving.hear(heard.flags)
        self.stop_requested = heard.flags["stop"] > 0
        self.notes.details, self.notes.expert_loads = heard.details, heard.loads
        for rank, sentence in self.stragglers.observe(heard.seconds).items():
            self.console.note(f"step {step + 1}: {sentence}")
            self.notes.details.setdefault("straggler", float(rank))
        return heard.loss

    def backward_of(self, batch: Batch) -> Loss:
        """Run one micro-batch forward and backward; return its losses."""
        self.heartbeat.enter("forward")
        failpoint("step.forward")
        loss = self.parts.objective.loss(self.parts.model, batch)
        self.heartbeat.enter("backward")
        failpoint("step.backward")
        last = self.parts.batches.is_last(batch)
        share = disturbed("step.loss", loss.objective / self.plan.accumulation)
        self.parts.state.engine.backward(share, last)
        return loss

    def gradient_norm(self) -> float:
        """Return the global gradient norm over all ranks."""
        self.heartbeat.enter("norm")
        return self.parts.state.engine.gradient_norm()

    def diagnose(self, step: int) -> None:
        """Ask the recipe's diagnostics about a gradient: about that of every step, or of those
        whose line will be printed. With these, see that every group still has its learning rate.
        """
        logged = is_logged(step + 1, self.plan.steps, self.parts.config.observe.log_every_steps)
        if logged:
            check_rates(self.parts.state.engine.optimizer, self.notes.rate)
        for diagnostic in self.parts.diagnostics:
            if logged or isinstance(diagnostic, AskedEveryStep):
                self.heartbeat.enter("diagnose")
                with forwards_beat(self.parts.model, self.heartbeat):
                    self.notes.details.update(diagnostic.after_backward(step + 1))
                if isinstance(diagnostic, Draws):
                    self.notes.histograms.update(diagnostic.histograms())
                if isinstance(diagnostic, LooksAtTensors):
                    self.notes.of_tensors.update(diagnostic.of_tensors())

    def diagnose_update(self, step: int) -> None:
        """Ask those diagnostics that look at updates."""
        for diagnostic in self.parts.diagnostics:
            if isinstance(diagnostic, AskedAfterUpdate):
                with forwards_beat(self.parts.model, self.heartbeat):
                    self.notes.details.update(diagnostic.after_update(step + 1))

    def update_or_skip(self, step: int, batch_loss: float, norm: float) -> None:
        """Clip and update; leave a step out whose numbers cannot be right, on all ranks alike.

        Raises:
            NumericsError: Too many such steps in a row; the evidence is in the run folder.
        """
        self.heartbeat.enter("update")
        failpoint("step.update")
        engine = self.parts.state.engine
        before = self.progress
        self.progress = self.guarding.judged(step, before, batch_loss, norm)
        skipped = self.progress.skipped_steps > before.skipped_steps
        self.notes.loss, self.notes.gradient_norm = batch_loss, norm
        self.notes.skipped = skipped
        if skipped:
            engine.drop_gradients()
        else:
            engine.step()
            self.parts.model.balance_experts(self.notes.expert_loads)
        self.guarding.integrity.idle.after_update(step)
        self.diagnose_update(step)

    def validate_if_due(self) -> None:
        """Measure the held-out loss every so many steps and after the last."""
        every, step = self.parts.config.train.validate_every_steps, self.progress.step
        if step != self.plan.steps and not (every and step % every == 0):
            return
        parts = self.parts
        self.heartbeat.enter("validate")
        self.notes.validation = validate(
            parts.model, parts.objective, parts.batches, parts.world, self.heartbeat.beat
        )
        self.last_validation_loss = self.notes.validation.loss

    def observe(self) -> None:
        """Write the step's record; print it when a line is due."""
        self.heartbeat.enter("observe")
        if self.metrics is None:
            return
        record = self.record()
        self.metrics.write(record)
        self.metrics.write_histograms(self.notes.histograms, record.step)
        self.metrics.write_of_tensors(self.notes.of_tensors, record.step)
        self.console.step(record)
        if is_logged(record.step, self.plan.steps, self.parts.config.observe.log_every_steps):
            self.memory.look()

    def record(self) -> StepRecord:
        """Return what is known of the finished step."""
        notes, plan, hardware = self.notes, self.plan, self.parts.hardware
        validation = notes.validation
        seconds = time.perf_counter() - notes.started
        spent_training = seconds - (validation.seconds if validation else 0.0)
        speed = plan.tokens_per_step / spent_training
        peak = hardware.matmul_flops * plan.world_size
        update = self.parts.state.engine.newest_report()
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

    def checkpoint_if_due(self) -> None:
        """Save every so many steps, unless the run is about to end, which saves anyway."""
        if not self.stop_requested:
            self.saving.save_if_due(self.progress)

    def conclude(self) -> None:
        """Save what is not saved yet, after the last step or when asked to stop.

        Raises:
            Preempted: Asked to stop, and there is no time to save.
            StorageError: The last state could not be saved; the newest checkpoint is older.
        """
        self.saving.conclude(self.progress)


@contextmanager
def forwards_beat(model: Model, heartbeat: Heartbeat) -> Generator[None]:
    """Take every forward pass for a sign of life while the context is open: a diagnostic may make
    dozens of them between two marks of a step.
    """

    def beat(module: nn.Module, arguments: Any) -> None:
        heartbeat.beat()

    handle = model.register_forward_pre_hook(beat)
    try:
        yield
    finally:
        handle.remove()
