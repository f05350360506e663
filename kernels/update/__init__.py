"""Update rules: one formula each, its plain twin, its one-pass CPU kernel and its GPU kernel."""

from interlace.kernels.update.api import accumulate, sum_of_squares, update, update_many, warm_up
from interlace.kernels.update.clip import CoordinateClip, clipped_sgd
from interlace.kernels.update.histogram import BINS, magnitude_histogram, quantile_of
from interlace.kernels.update.planes import merge_master, split_master
from interlace.kernels.update.rules import SGD, AdamW, Signum, UpdateRule
from interlace.kernels.update.slab import Slab, Step

__all__ = [
    "BINS",
    "SGD",
    "AdamW",
    "CoordinateClip",
    "Signum",
    "Slab",
    "Step",
    "UpdateRule",
    "accumulate",
    "clipped_sgd",
    "magnitude_histogram",
    "merge_master",
    "quantile_of",
    "split_master",
    "sum_of_squares",
    "update",
    "update_many",
    "warm_up",
]
