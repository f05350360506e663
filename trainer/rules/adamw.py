"""Rule `adamw`: Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

from interlace.kernels.update import AdamW
from interlace.trainer.config.schema import OptimizerSection
from interlace.trainer.rules import update_rule


@update_rule("adamw")
def adamw(settings: OptimizerSection) -> AdamW:
    """Return AdamW with the table's decays, epsilon and weight decay."""
    return AdamW(
        lr=settings.peak_lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay or 0.0,
    )
