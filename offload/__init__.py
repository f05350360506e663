"""Where optimizer state lives and who updates it: a drop-in optimizer, the performance model that
drives it, and the machine it runs on.
"""

if __name__ != "interlace.offload":
    raise ImportError(
        "import this package as interlace.offload: the bare name 'offload' belongs to other "
        "projects"
    )

from interlace.kernels.update import SGD, AdamW, CoordinateClip, Signum, UpdateRule, clipped_sgd
from interlace.offload.hardware import HardwareProfile, load_profile
from interlace.offload.optimizer import NonFiniteGradient, OffloadedOptimizer
from interlace.offload.options import OffloadOptions
from interlace.offload.schedule import Home, MemoryBudget, MemoryShortage

__all__ = [
    "SGD",
    "AdamW",
    "CoordinateClip",
    "HardwareProfile",
    "Home",
    "MemoryBudget",
    "MemoryShortage",
    "NonFiniteGradient",
    "OffloadOptions",
    "OffloadedOptimizer",
    "Signum",
    "UpdateRule",
    "clipped_sgd",
    "load_profile",
]
