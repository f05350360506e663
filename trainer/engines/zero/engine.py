"""The engine `deepspeed`: the model in DeepSpeed's ZeRO, its state updated by our schedule.

`deepspeed.initialize` gets the model, an optimizer of torch and the JSON that follows from the
recipe. Where the recipe offloads, `attach` puts the interleaved update into ZeRO; where it does
not, ZeRO steps torch's optimizer. Loop, data, schedule, guards and checkpoints stay ours: state is
saved under canonical names as boxes of the whole tensors, so that a run moves between ZeRO, FSDP2
and one process. ZeRO: Rajbhandari et al. 2020 (arXiv 1910.02054).
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from interlace.offload.deepspeed import Attachment
from interlace.offload.hardware import HardwareProfile
from interlace.offload.options import Overlap
from interlace.offload.report import UpdateReport
from interlace.offload.timeline import Timeline
from interlace.offload.watched import Watched
from interlace.trainer.checkpoint.boxes import boxes_of
from interlace.trainer.checkpoint.live import Fragment, Live
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.engines import OnReport
from interlace.trainer.engines.zero.opening import SETTINGS_NAME, Opened, open_zero
from interlace.trainer.engines.zero.stages import Part, stage_of
from interlace.trainer.errors import CheckpointError
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import Manifest
from interlace.trainer.plan import Plan
from interlace.trainer.world import World


class ZeroEngine:
    """What `Engine` says, by DeepSpeed.

    Args:
        opened: DeepSpeed's engine, what is attached to it, and what to say of it.
        moments: What the update rule remembers, by name.
        world: The ranks.

    Attributes:
        updates: How many there were, those before a checkpoint included.
    """

    guards = False
    overlap: Overlap = "none"

    def __init__(self, opened: Opened, moments: Sequence[str], world: World) -> None:
        self.engine: Any = opened.engine
        self.attachment: Attachment | None = opened.attachment
        self.notes = opened.notes
        self.documents = {SETTINGS_NAME: opened.settings}
        self.moments = moments
        self.world = world
        self.updates = 0
        self.zero: Any = self.engine.optimizer
        self.stage = stage_of(self.engine, world.rank)
        self.report: UpdateReport | None = None
        self.tell: OnReport | None = None
        self._end = opened.end
        self._norm: float | None = None
        self._owners: list[Watched] = [Watched() for _ in self.stage.flats]
        self._remember()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Torch's, which DeepSpeed was given."""
        return self.zero.optimizer

    @property
    def update_begun(self) -> bool:
        """Never before the step."""
        return False

    # ---- gradients --------------------------------------------------------------------------

    def backward(self, objective: torch.Tensor, last: bool) -> None:
        """Differentiate through DeepSpeed, which reduces as gradients come."""
        # What DeepSpeed does at the beginning of its own forward: the model was called directly.
        self.zero.clear_backward_seen_flag()
        self.engine.set_gradient_accumulation_boundary(last)

        def begin(gradient: torch.Tensor) -> None:
            self.engine._backward_prologue()

        hook = objective.register_hook(begin)
        try:
            self.engine.backward(objective, scale_wrt_gas=False)
        finally:
            hook.remove()
        self._norm = None

    def gradient_norm(self) -> float:
        """Return the norm over all partitions, as ZeRO computes it for its step."""
        if self._norm is None:
            self._norm = self.stage.norm()
        return self._norm

    def gradients(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield parameters and this rank's part of their gradients, 1-D."""
        # Those that are offloaded may still be on their way, on streams of DeepSpeed's.
        self._synchronize()
        for parameter in self.engine.module.parameters():
            if parameter.requires_grad:
                gradient = self.stage.gradient_of(parameter)
                if gradient is not None:
                    yield parameter, gradient

    def squares(self) -> Iterator[tuple[torch.Tensor, float]]:
        """Yield parameters and the sums of squares of these parts."""
        for parameter, gradient in self.gradients():
            yield parameter, float(gradient.double().square().sum())

    def weight_of(self, parameter: Any) -> torch.Tensor:
        """Return all of it, or in stage 3 this rank's equal share, 1-D, without ZeRO's padding."""
        if not hasattr(parameter, "ds_tensor"):
            return parameter.detach()
        share = parameter.ds_tensor.detach().view(-1)
        return share[: max(0, parameter.ds_numel - self.world.rank * share.numel())]

    def copies_of(self, parameter: torch.Tensor) -> int:
        """Return 1: every element of a gradient is on one rank only, once it is reduced."""
        return 1

    # ---- the step ---------------------------------------------------------------------------

    def step(self) -> None:
        """Let ZeRO clip and update; nothing of it goes on afterwards."""
        if self.attachment is None:
            for owner in self._owners:
                owner.about_to_change()
        began = time.perf_counter()
        self.engine.step()
        if self.attachment is None:
            self._measure(began)
        self.updates += 1
        self._norm = None

    def _measure(self, began: float) -> None:
        """Report an update of ZeRO's own, of which only the duration is known."""
        self._synchronize()
        seconds = time.perf_counter() - began
        self.report = UpdateReport(self.updates + 1, Timeline(()), seconds, seconds, None)
        if self.tell is not None:
            self.tell(self.report, None, None)

    def _synchronize(self) -> None:
        """Wait for all work on the device, whoever submitted it."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def drop_gradients(self) -> None:
        """Let ZeRO skip the update, as it does where a gradient overflows."""
        with self.stage.skipping():
            self.engine.step()
        self._norm = None

    def finish_step(self) -> None:
        """Wait for what a device has still to do of the step."""
        self._synchronize()

    def newest_report(self) -> UpdateReport | None:
        """Return the report of the newest update."""
        return self.report if self.attachment is None else self.attachment.last_report

    def finish_report(self) -> UpdateReport | None:
        """Return the report of the newest update."""
        return self.newest_report()

    def on_report(self, take: OnReport) -> None:
        """Have every report given to `take`."""
        self.tell = take
        attachment = self.attachment
        if attachment is not None:

            def told(report: UpdateReport) -> None:
                take(report, attachment.schedule, attachment.placement.profile)

            attachment.monitor.on_report = told

    # ---- checkpoints ------------------------------------------------------------------------

    def live(self, model: nn.Module) -> list[Live]:
        """Return this rank's boxes of masters and moments, and how many updates there were."""
        found: list[Live] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                found += self.frozen(name, parameter)
                continue
            part = self.stage.part_of(parameter)
            if part is not None:
                shape = self.stage.shape_of(parameter)
                owner = self.owner_of(part.flat)
                for key, vector in self.vectors_of(name, part).items():
                    found += fragments(key, vector, shape, part.start, self.world.size, owner)
            count = torch.full((), float(self.updates), dtype=torch.float32, device="cpu")
            found.append(Live(f"optimizer.{name}.step", count))
        return found

    def frozen(self, name: str, parameter: Any) -> list[Live]:
        """Return what this rank has of weights that are not trained: a share in stage 3."""
        key, share = f"model.{name}", self.weight_of(parameter)
        if not hasattr(parameter, "ds_tensor"):
            return [Live(key, share, frozen=True)]
        start = self.world.rank * parameter.ds_tensor.numel()
        return fragments(key, share, tuple(parameter.ds_shape), start, self.world.size, None)

    def vectors_of(self, name: str, part: Part) -> dict[str, torch.Tensor]:
        """Return master and moments of a part, 1-D, by canonical name."""
        flat = self.stage.flats[part.flat]
        state = self.optimizer.state[flat]
        moments = {f"optimizer.{name}.{key}": part.of(state[key]) for key in self.moments}
        return {f"model.{name}": part.of(flat.detach()), **moments}

    def owner_of(self, flat: int) -> Watched:
        """Return who announces that a flat partition changes."""
        return self._owners[flat] if self.attachment is None else self.attachment.flats[flat]

    def adopt(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over how many updates there were, and make weights from the masters, which were
        filled where they lie.

        Raises:
            CheckpointError: Parameters had different numbers of updates, which ZeRO cannot have.
        """
        trained = [name for name, each in model.named_parameters() if each.requires_grad]
        counts = {name: int(tensors[f"optimizer.{name}.step"]) for name in trained}
        least, most = min(trained, key=counts.__getitem__), max(trained, key=counts.__getitem__)
        if counts[least] != counts[most]:
            raise CheckpointError(
                f"{least} had {counts[least]} updates and {most} had {counts[most]}, and "
                "parallel.engine=deepspeed counts them for all parameters together; resume with "
                "parallel.engine=fsdp2"
            )
        self.updates = counts[most]
        self._remember()
        with torch.no_grad():
            self.stage.weights_from_masters()

    def _remember(self) -> None:
        """Write how many updates there were where torch's optimizer looks for it, and give it
        moments where it has none yet: it makes them in its first step.
        """
        for flat in self.stage.flats:
            state = self.optimizer.state[flat]
            for key in self.moments:
                if key not in state:
                    state[key] = torch.zeros_like(flat, requires_grad=False)
            if isinstance(self.optimizer, torch.optim.AdamW):
                state["step"] = torch.full((), float(self.updates), dtype=torch.float32)

    def close(self) -> None:
        """Take DeepSpeed's hooks off, and end the process group of a single rank."""
        self._end()


def fragments(
    key: str,
    vector: torch.Tensor,
    shape: tuple[int, ...],
    start: int,
    ranks: int,
    owner: Watched | None,
) -> list[Live]:
    """Return the boxes of a tensor that a run of its elements fills.

    Args:
        key: Canonical name.
        vector: The elements, 1-D, as they lie.
        shape: Of the whole tensor.
        start: Where the run begins in the flattened tensor.
        ranks: That share such tensors evenly.
        owner: Who announces that it changes; None for what nobody changes.
    """
    found: list[Live] = []
    first = 0
    for number, box in enumerate(boxes_of(shape, start, start + vector.numel())):
        memory = vector[first : first + math.prod(box.shape)].view(box.shape)
        first += memory.numel()
        where = Fragment(box.offset, shape, number, ranks)
        found.append(Live(key, memory, owner=owner, frozen=owner is None, fragment=where))
    return found


def spread(model: Model, config: RunConfig, world: World, dtype: torch.dtype) -> None:
    """Give the weights memory on the host, all of it on every rank: ZeRO takes them from there
    tensor by tensor. All have the compute dtype, which ZeRO asks for. Buffers, which ZeRO-3 would
    leave where they are, begin on the device.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device="cpu")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=world.device))


def open_engine(
    model: Model,
    config: RunConfig,
    plan: Plan,
    hardware: HardwareProfile,
    manifest: Manifest,
    world: World,
) -> ZeroEngine:
    """Return the engine of a model that has its first values.

    Raises:
        ConfigError: The recipe and the user's JSON conflict, or this DeepSpeed is another one.
    """
    opened, moments = open_zero(model, config, plan, hardware, manifest, world)
    try:
        return ZeroEngine(opened, moments, world)
    except BaseException:
        opened.end()
        raise
