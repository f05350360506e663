"""Sequence mixer `M`: Mamba-2, a linear recurrence whose decay depends on the input (Dao and Gu
2024, arXiv 2405.21060, section 7.1).

One projection gives a gate z, the inputs x, the keys B and C of writing and reading, and a step dt
per head. A short causal convolution mixes x, B and C with their neighbours; every head then keeps a
state of P by N numbers that fades by exp(dt A), takes in dt x B^T and is read with C. What is read,
plus D x, is gated, normed and projected back. Memory of the past has a fixed size, so decoding
costs the same at every position; the kernels are in `interlace.kernels.ssd`.

The layout is that of mamba_ssm, so weights export by renaming. Steps and decays are fp32 whatever
the compute dtype: small differences in a decay add up over a long row.
"""

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from interlace.kernels import (
    causal_conv1d,
    causal_conv1d_step,
    gated_rms_norm,
    ssd,
    ssd_step,
)
from interlace.kernels.ssd.api import CHUNKS
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.context import BlockContext, MambaCache
from interlace.trainer.models.initial import matrix_value, residual_matrix_value
from interlace.trainer.models.layers import Linear
from interlace.trainer.models.registry import (
    Flops,
    Role,
    RowBlocks,
    SavedElements,
    Traits,
    sequence_mixer,
)
from interlace.trainer.models.shapes import (
    mamba_conv_channels,
    mamba_heads,
    mamba_inner_width,
    mamba_projection_width,
)

DECAY_RATES = (1.0, 16.0)
"""Range of -A at the start, uniform."""

STEPS = (1e-3, 1e-1)
"""Range of the steps at the start where their input is zero, log-uniform."""

SMALLEST_STEP = 1e-4


class Dynamics(nn.Module):
    """How fast each head forgets: the few numbers that stay in fp32."""

    keeps_fp32: ClassVar[bool] = True

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))

    def forward(self, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return A (H,), the steps dt in the shape of `raw` (..., H), and D (H,), all in fp32 (fp64
        for fp64).
        """
        wide = torch.promote_types(raw.dtype, torch.float32)
        dt = functional.softplus(raw.to(wide) + self.dt_bias.to(wide))
        # Sharding frees the parameters when this returns; what leaves must not be one of them.
        return -self.A_log.to(wide).exp(), dt, self.D.to(wide).clone()


class Convolution(nn.Module):
    """Causal depthwise convolution with bias, and SiLU behind it."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(
        self, x: torch.Tensor, segments: torch.Tensor | None, cache: MambaCache | None
    ) -> torch.Tensor:
        """Map (B, T, C) to (B, T, C); with a cache, go on from its inputs and put the new ones
        there.
        """
        if cache is None:
            return causal_conv1d(x, self.weight, self.bias, activation="silu", segment_ids=segments)
        if x.shape[1] == 1:
            y, cache.inputs = causal_conv1d_step(
                cache.inputs, x[:, 0], self.weight, self.bias, activation="silu"
            )
            return y.unsqueeze(1)
        y, inputs = causal_conv1d(
            x,
            self.weight,
            self.bias,
            activation="silu",
            segment_ids=segments,
            initial_states=cache.inputs,
            return_final_states=True,
        )
        # A view would keep the inputs of the whole prompt.
        cache.inputs = inputs.clone()
        return y


class GatedNorm(nn.Module):
    """Root mean square norm of `x * silu(gate)` in groups of channels, with a gain."""

    def __init__(self, width: int, groups: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.groups = groups
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Gate and normalise (..., inner)."""
        return gated_rms_norm(x, gate, self.weight, self.epsilon, groups=self.groups)


class Scanned(NamedTuple):
    """What the recurrence works on, as `ssd` takes it."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor


@sequence_mixer("M", "mamba2")
class Mamba2(nn.Module):
    """Selective state space inside documents.

    Differentiable once where Triton's kernels run, on a GPU; any number of times elsewhere.
    """

    traits: ClassVar[Traits] = Traits(order=1, decoding="state")

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        inner, channels = mamba_inner_width(config), mamba_conv_channels(config)
        keys = config.mamba_groups * config.mamba_state_width
        self.parts = [inner, channels, mamba_heads(config)]
        self.convolved = [inner, keys, keys]
        self.head_width = config.mamba_head_width
        self.state_width = config.mamba_state_width
        self.in_proj = Linear(config.width, mamba_projection_width(config))
        self.conv = Convolution(channels, config.mamba_conv_width)
        self.dynamics = Dynamics(mamba_heads(config))
        self.norm = GatedNorm(inner, config.mamba_groups, config.norm_epsilon)
        self.out_proj = Linear(inner, config.width)

    def forward(self, x: torch.Tensor, context: BlockContext) -> torch.Tensor:
        """Map (B, T, D) to (B, T, D); with a cache, go on from its state and advance it."""
        cache = context.cache
        assert cache is None or isinstance(cache, MambaCache), "Mamba-2 decodes with a state"
        gate, mixed, raw = self.in_proj(x).split(self.parts, -1)
        mixed = self.conv(mixed, context.segments, cache)
        inputs, write, read = mixed.split(self.convolved, -1)
        A, dt, D = self.dynamics(raw)
        scanned = Scanned(
            x=inputs.unflatten(-1, (-1, self.head_width)),
            dt=dt,
            A=A,
            B=write.unflatten(-1, (-1, self.state_width)),
            C=read.unflatten(-1, (-1, self.state_width)),
            D=D,
        )
        y = scan(scanned, context.segments, cache)
        return self.out_proj(self.norm(y.flatten(2), gate))

    def new_cache(self, batch: int, length: int, like: torch.Tensor) -> MambaCache:
        """Return the state before the first position, on the device of `like`; its size does not
        depend on the `length` to come.
        """
        channels, taps = self.conv.weight.shape
        heads = self.dynamics.A_log.shape[0]
        wide = torch.promote_types(like.dtype, torch.float32)
        return MambaCache(
            like.new_zeros(batch, taps - 1, channels),
            like.new_zeros(batch, heads, self.head_width, self.state_width, dtype=wide),
        )

    @classmethod
    def initial_value(
        cls,
        name: str,
        shape: tuple[int, ...],
        config: ModelSection,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Rates, steps and convolution start as in mamba_ssm, gains and D at one; the output
        projection writes into the residual stream.
        """
        match name:
            case "dynamics.A_log":
                return torch.empty(shape).uniform_(*DECAY_RATES, generator=generator).log()
            case "dynamics.dt_bias":
                low, high = (math.log(bound) for bound in STEPS)
                steps = torch.empty(shape).uniform_(low, high, generator=generator).exp()
                return inverse_softplus(steps.clamp(min=SMALLEST_STEP))
            case "dynamics.D" | "norm.weight":
                return torch.ones(shape)
            case "conv.weight" | "conv.bias":
                bound = 1.0 / math.sqrt(config.mamba_conv_width)
                return torch.empty(shape).uniform_(-bound, bound, generator=generator)
            case "out_proj.weight":
                return residual_matrix_value(shape, config, generator)
            case _:
                return matrix_value(shape, generator)

    @classmethod
    def roles(cls, config: ModelSection) -> Mapping[str, Role]:
        """Two matrices between widths; taps, gains and the dynamics are per channel or head."""
        return {
            "in_proj.weight": "hidden",
            "conv.weight": "vector",
            "conv.bias": "vector",
            "dynamics.A_log": "vector",
            "dynamics.dt_bias": "vector",
            "dynamics.D": "vector",
            "norm.weight": "vector",
            "out_proj.weight": "residual",
        }

    @classmethod
    def row_blocks(cls, config: ModelSection) -> Mapping[str, RowBlocks]:
        """B and C have a fixed number of rows, which all heads share, beside z, x and the steps."""
        inner = mamba_inner_width(config)
        keys = config.mamba_groups * config.mamba_state_width
        convolved = [("x", inner), ("B", keys), ("C", keys)]
        return {
            "in_proj.weight": [("z", inner), *convolved, ("dt", mamba_heads(config))],
            "conv.weight": convolved,
            "conv.bias": convolved,
        }

    @classmethod
    def parameter_count(cls, config: ModelSection) -> int:
        """Weights of the projections, the convolution, the dynamics and the norm."""
        inner = mamba_inner_width(config)
        projections = config.width * (mamba_projection_width(config) + inner)
        convolution = mamba_conv_channels(config) * (config.mamba_conv_width + 1)
        return projections + convolution + 3 * mamba_heads(config) + inner

    @classmethod
    def flops_per_token(cls, config: ModelSection, sequence_length: int) -> Flops:
        """Projections, and the products of the scan in the chunks that a CPU takes.

        Rows are filled up to whole chunks. Of a row of one chunk the state at its end is not
        needed, nor the gradient of the one before it, which is zeros.
        """
        inner, chunk = mamba_inner_width(config), CHUNKS["chunked"]
        keys = config.mamba_groups * config.mamba_state_width
        projections = 2 * config.width * (mamba_projection_width(config) + inner)
        inside, state = 2 * chunk * (keys + inner), 2 * inner * config.mamba_state_width
        forward, backward = inside + 2 * state, 2 * (inside + 2 * state)
        if sequence_length <= chunk:
            backward -= 3 * state
        filled = filled_length(sequence_length)
        return Flops(
            projections + forward * filled // sequence_length,
            2 * projections + backward * filled // sequence_length,
        )

    @classmethod
    def saved_elements(cls, config: ModelSection, sequence_length: int) -> SavedElements:
        """Of the convolution its input, once per tap, and its sum; the scan's decays and products
        of every pair of a chunk; states between chunks; five stages of the gated norm.

        All of it is fp32. In an fp32 model the projection's result is the convolution's input and
        the gate, and the convolution's result is the scan's input, without copies; a narrower one
        casts each, and x twice. `kept` is that difference, and can be negative.
        """
        inner, heads, chunk = mamba_inner_width(config), mamba_heads(config), CHUNKS["chunked"]
        groups, channels = config.mamba_groups, mamba_conv_channels(config)
        keys, states = groups * config.mamba_state_width, inner * config.mamba_state_width
        filled = filled_length(sequence_length)
        chunks = filled // chunk
        # The last chunk's state is nobody's input; where it is the only one, nor is what adds to
        # it.
        used = 1 if chunks == 1 else 2
        # Products copy the keys of several groups, which do not lie side by side.
        copied = 2 * keys * (used if groups > 1 else 1)
        in_chunks = (2 + used) * inner + copied + 3 * heads + chunk * (2 * heads + groups)
        masks = (config.mamba_conv_width - 1 + (chunk + 1) * filled / sequence_length) / 4
        wide = channels * (config.mamba_conv_width + 1) + 6 * inner + heads + groups + round(masks)
        wide += (in_chunks * filled + (2 * chunks - 1) * states) // sequence_length
        uncast = heads
        if filled > sequence_length:
            uncast += channels
        elif groups > 1:
            uncast += 2 * keys
        scanned = (groups * chunk + 2 * inner) * filled + chunks * states
        return SavedElements(
            kept=2 * uncast - inner,
            kept_wide=wide + inner - uncast,
            products=mamba_projection_width(config) + config.width,
            products_wide=scanned // sequence_length,
        )

    @classmethod
    def cache_bytes(cls, config: ModelSection, length: int, element_bytes: int) -> int:
        """Inputs of the convolution, and the state in fp32, whatever the length."""
        inputs = (config.mamba_conv_width - 1) * mamba_conv_channels(config)
        state = mamba_inner_width(config) * config.mamba_state_width
        return inputs * element_bytes + state * max(element_bytes, 4)


def scan(scanned: Scanned, segments: torch.Tensor | None, cache: MambaCache | None) -> torch.Tensor:
    """Return (B, T, H, P), what the heads read; with a cache, go on from its state and advance
    it.
    """
    x, dt, A, B, C, D = scanned
    if cache is None:
        return ssd(x, dt, A, B, C, D=D, segment_ids=segments)
    cache.length += x.shape[1]
    if x.shape[1] == 1:
        y, cache.state = ssd_step(cache.state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D=D)
        return y.unsqueeze(1)
    y, cache.state = ssd(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        segment_ids=segments,
        initial_states=cache.state,
        return_final_states=True,
    )
    return y


def inverse_softplus(value: torch.Tensor) -> torch.Tensor:
    """Return the number whose softplus is `value`, without loss where it is small."""
    return value + (-torch.expm1(-value)).log()


def filled_length(sequence_length: int) -> int:
    """Return the positions of a row once the last of its chunks is filled up, on a CPU."""
    chunk = CHUNKS["chunked"]
    return -(-sequence_length // chunk) * chunk
