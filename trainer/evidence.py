"""What is kept of a step that went wrong: enough to repeat and study it without the run."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from interlace.trainer.batches import StepBatches
from interlace.trainer.checkpoint.state import TrainingState
from interlace.trainer.run_folder import write_json


def save_evidence(run_dir: Path, step: int, batches: StepBatches, state: TrainingState) -> Path:
    """Write this rank's micro-batches, which rows of the whole order they are, and the names of
    tensors that are not finite.

    Returns:
        The folder `evidence/step-<number>` of the run.
    """
    folder = run_dir / "evidence" / f"step-{step + 1:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    rank = state.world.rank
    tokens = {
        f"pass-{number}.{name}": tensor.cpu()
        for number, batch in enumerate(batches.of_step(step))
        for name, tensor in (("tokens", batch.tokens), ("targets", batch.targets))
    }
    save_file(tokens, folder / f"rank-{rank:05d}.safetensors")
    named = list(state.model.named_parameters())
    names = {id(parameter): name for name, parameter in named}
    write_json(
        folder / f"rank-{rank:05d}.json",
        {
            "step": step + 1,
            "weights_not_finite": [
                name
                for name, parameter in named
                if not all_finite(state.engine.weight_of(parameter))
            ],
            "gradients_not_finite": [
                names[id(parameter)]
                for parameter, gradient in state.engine.gradients()
                if not all_finite(gradient)
            ],
            "rows": [
                [batches.training.place(step, row) for row in rows]
                for rows in batches.rows_of_step(step)
            ],
        },
    )
    return folder


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether this rank's part of a tensor has only finite elements."""
    local = tensor.detach()
    local = local.to_local() if isinstance(local, DTensor) else local
    return bool(torch.isfinite(local).all())
