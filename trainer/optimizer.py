"""The optimizer of a run: AdamW with decay on matrices only, and the global gradient norm.

Reference: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, algorithm 2. torch's
fused implementation does the arithmetic, on plain tensors and on FSDP2's sharded ones alike.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from interlace.trainer.config.schema import OptimizerSection


def build_optimizer(model: nn.Module, settings: OptimizerSection) -> torch.optim.AdamW:
    """Return AdamW over the model's parameters: matrices decay, vectors (norms) do not."""
    parameters = list(model.parameters())
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.ndim >= 2],
            "weight_decay": settings.weight_decay,
        },
        {
            "params": [parameter for parameter in parameters if parameter.ndim < 2],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.AdamW(
        groups,
        lr=settings.peak_lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def gradient_norm(model: nn.Module) -> torch.Tensor:
    """Return the 2-norm of all gradients, over all shards of all ranks (0-d tensor)."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def scale_gradients(model: nn.Module, norm: float, limit: float) -> None:
    """Scale all gradients by `limit / norm` where the norm is larger than a limit above zero."""
    if limit <= 0.0 or norm <= limit:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for gradient in gradients:
        gradient.mul_(limit / (norm + 1e-6))
