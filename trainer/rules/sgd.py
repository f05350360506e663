"""Rule `sgd`: stochastic gradient descent with momentum, as torch.optim.SGD."""

from interlace.kernels.update import SGD
from interlace.trainer.config.schema import OptimizerSection
from interlace.trainer.rules import update_rule


@update_rule("sgd")
def sgd(settings: OptimizerSection) -> SGD:
    """Return SGD; `beta1` is its momentum, and the decay is part of the gradient."""
    return SGD(
        lr=settings.peak_lr,
        momentum=settings.beta1,
        weight_decay=settings.weight_decay or 0.0,
        nesterov=settings.nesterov,
    )
