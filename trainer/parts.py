"""What a run is made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from interlace.offload.hardware import HardwareProfile
from interlace.trainer.batches import StepBatches
from interlace.trainer.checkpoint.state import TrainingState
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.diagnostics import Diagnostic
from interlace.trainer.heartbeat import Heartbeat
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import Manifest
from interlace.trainer.objectives import Objective
from interlace.trainer.plan import Plan
from interlace.trainer.run_folder import RunFolder
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
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
