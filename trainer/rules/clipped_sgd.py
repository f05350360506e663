"""Rule `clipped_sgd`: gradient descent with momentum and decoupled decay, its coordinates clipped.

Pan and Li 2023 (arXiv 2306.00204). This is the descent; `interlace.trainer.rules.rule_of` puts the
clip around it, as around any rule.
"""

from interlace.kernels.update import SGD
from interlace.trainer.config.schema import OptimizerSection
from interlace.trainer.rules import update_rule


@update_rule("clipped_sgd")
def clipped_sgd(settings: OptimizerSection) -> SGD:
    """Return SGD; `beta1` is its momentum, and with 0 it keeps no state."""
    return SGD(
        lr=settings.peak_lr,
        momentum=settings.beta1,
        weight_decay=settings.weight_decay or 0.0,
        nesterov=settings.nesterov,
        decoupled=True,
    )
