"""Rule `signum`: the sign of the momentum (Bernstein et al. 2018, arXiv 1802.04434)."""

from interlace.kernels.update import Signum
from interlace.trainer.config.schema import OptimizerSection
from interlace.trainer.rules import update_rule


@update_rule("signum")
def signum(settings: OptimizerSection) -> Signum:
    """Return Signum; `beta1` is its momentum, and decay is decoupled."""
    return Signum(
        lr=settings.peak_lr, momentum=settings.beta1, weight_decay=settings.weight_decay or 0.0
    )
