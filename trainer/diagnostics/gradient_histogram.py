"""Diagnostic `gradient_histogram`: how large the coordinates of the gradient are.

A threshold of clipping cuts the right end of these histograms: `coordinate_clip.threshold` at the
90 % quantile clips a tenth of the coordinates that are not zero. TensorBoard gets the binary
logarithms of the magnitudes, of the whole model and of every block; the record the quantiles of the
whole model. Magnitudes are counted in bins of an eighth of an octave, over all shards, after
accumulation and averaging and before any clipping.
"""

import math
from collections.abc import Mapping

import torch

from interlace.kernels.update.histogram import magnitude_histogram, quantile_of
from interlace.trainer.checkpoint.state import TrainingState
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.diagnostics import diagnostic
from interlace.trainer.diagnostics.gradient_norms import part_of
from interlace.trainer.observe.metrics import Histogram

QUANTILES = {"p10": 0.9, "p50": 0.5, "p90": 0.1, "p99": 0.01}
"""Names, and the share of coordinates that are larger."""

BINS_PER_OCTAVE = 8
"""Of `magnitude_histogram`, whose bins are the top bits of a float32: exponent, then mantissa."""

FIRST_OCTAVE = -127
"""Binary logarithm of the lower edge of its first octave; numbers without a leading 1 are in it."""


@diagnostic("gradient_histogram")
class GradientHistogram:
    """One histogram per block and one of all."""

    def __init__(self, config: RunConfig, state: TrainingState) -> None:
        self.engine, self.world = state.engine, state.world
        named = dict(state.model.named_parameters())
        self.parts = {id(each): part_of(name) for name, each in named.items()}
        self.names = list(dict.fromkeys(self.parts.values()))
        self.newest: dict[str, Histogram] = {}

    def after_backward(self, step: int) -> Mapping[str, float]:
        """Return `gradient_p10`, `_p50`, `_p90` and `_p99`, magnitudes below which so many percent
        of the coordinates are that are not zero; `gradient_max`, the largest; and `gradient_zeros`,
        the share that is zero or not finite.
        """
        empty = magnitude_histogram(torch.zeros(0), 1.0)
        counts = torch.zeros(len(self.names), len(empty), dtype=torch.float64)
        elements, largest = 0.0, 0.0
        for parameter, gradient in self.engine.gradients():
            share = 1 / self.engine.copies_of(parameter)
            found = magnitude_histogram(gradient.reshape(-1), 1.0)
            counts[self.names.index(self.parts[id(parameter)])] += share * found.cpu()
            elements += share * gradient.numel()
            largest = max(largest, largest_magnitude(gradient))
        counts = self.world.sum(counts)
        elements = float(self.world.sum(torch.tensor([elements], dtype=torch.float64)))
        largest = max(self.world.gather(largest))
        whole = counts.sum(0)
        self.newest = {
            f"gradient_histogram.{name}": in_octaves(part)
            for name, part in zip(("all", *self.names), (whole, *counts), strict=True)
        }
        zeros = 1 - float(whole.sum()) / elements if elements else math.nan
        quantiles = {
            f"gradient_{name}": quantile_of(whole, share) for name, share in QUANTILES.items()
        }
        return quantiles | {"gradient_max": largest, "gradient_zeros": zeros}

    def histograms(self) -> Mapping[str, Histogram]:
        """Return log2 of the magnitudes: of `all`, and of every part of the model."""
        return self.newest


def largest_magnitude(gradient: torch.Tensor) -> float:
    """Return the largest magnitude of the finite coordinates; 0 if there are none."""
    finite = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return float(finite.abs().max()) if finite.numel() else 0.0


def in_octaves(counts: torch.Tensor) -> Histogram:
    """Return a histogram over binary logarithms, octave by octave, without empty ends.

    Args:
        counts: What `magnitude_histogram` counted.
    """
    octaves = counts.view(-1, BINS_PER_OCTAVE).sum(1)
    filled = octaves.nonzero().flatten()
    first, last = (int(filled[0]), int(filled[-1])) if len(filled) else (0, 0)
    edges = [float(FIRST_OCTAVE + number) for number in range(first, last + 2)]
    return Histogram(edges, octaves[first : last + 1].tolist())
