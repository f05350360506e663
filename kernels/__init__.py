"""Numerics: one file or folder per operation, each with a plain twin that it is tested against."""

if __name__ != "interlace.kernels":
    raise ImportError(
        "import this package as interlace.kernels: the bare name 'kernels' belongs to other "
        "projects"
    )

from interlace.kernels.attention.api import attention, explain_attention
from interlace.kernels.conv1d.api import causal_conv1d, causal_conv1d_step
from interlace.kernels.cross_entropy import HeadLoss, linear_cross_entropy
from interlace.kernels.linear import linear
from interlace.kernels.rms_norm import add_rms_norm, gated_rms_norm, rms_norm
from interlace.kernels.rotary import apply_rotary, rotary_tables
from interlace.kernels.ssd.api import ssd
from interlace.kernels.ssd.step import ssd_step
from interlace.kernels.swiglu import swiglu

__all__ = [
    "HeadLoss",
    "add_rms_norm",
    "apply_rotary",
    "attention",
    "causal_conv1d",
    "causal_conv1d_step",
    "explain_attention",
    "gated_rms_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rotary_tables",
    "ssd",
    "ssd_step",
    "swiglu",
]
