"""Numerics: one file or folder per operation, each with a plain twin that it is tested against."""

if __name__ != "interlace.kernels":
    raise ImportError(
        "import this package as interlace.kernels: the bare name 'kernels' belongs to other "
        "projects"
    )

from interlace.kernels.attention.api import attention
from interlace.kernels.cross_entropy import HeadLoss, linear_cross_entropy
from interlace.kernels.rms_norm import rms_norm
from interlace.kernels.rotary import apply_rotary, rotary_tables

__all__ = [
    "HeadLoss",
    "apply_rotary",
    "attention",
    "linear_cross_entropy",
    "rms_norm",
    "rotary_tables",
]
