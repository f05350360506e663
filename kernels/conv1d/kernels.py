"""Triton kernels of the causal depthwise convolution: one pass forward, one backward.

A program works on a block of rows (positions of the batch laid end to end) and channels. What lies
before the first position of a document is not read; what lies before a row of the batch comes from
the state. Backward computes the convolution again where an activation needs it; gradients of weight
and bias are summed inside a block and added up over blocks afterwards, in a fixed order.
"""

# Triton compiles these functions from their source; pyright cannot follow its language.
# pyright: basic, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from interlace.kernels.update.gpu import store_nearest


@triton.jit
def numbers_at(documents, row, length, rows, has_documents: tl.constexpr):
    """Return a number for the document of each row, -1 outside the batch; the first document of a
    row of the batch has the place of its first position as number.
    """
    inside = (row >= 0) & (row < rows)
    number = row // length * length
    if has_documents:
        # The numbers of documents begin at 0 in every row of the batch.
        number += tl.load(documents + row, mask=inside, other=0).to(tl.int64)
    return tl.where(inside, number, -1)


@triton.jit
def earlier_rows(
    x, state, row, back, own, documents, length, rows, channel, channels, x_stride,
    taps: tl.constexpr, has_documents: tl.constexpr, has_state: tl.constexpr,
):  # fmt: skip
    """Load what lies `back` positions before each row, from the batch or the state; zero where that
    is of another document.
    """
    there = (numbers_at(documents, row - back, length, rows, has_documents) == own) & (own >= 0)
    columns = (channel < channels)[None, :]
    place = (row - back)[:, None] * x_stride + channel[None, :]
    found = tl.load(x + place, mask=there[:, None] & columns, other=0.0).to(tl.float32)
    if has_state:
        # Only the first document of a row of the batch continues the state.
        first = row // length
        continues = (own >= 0) & (own == first * length)
        before = (row % length < back) & continues
        slot = first * (taps - 1) + taps - 1 + row % length - back
        mask = before[:, None] & columns
        place = state + slot[:, None] * channels + channel[None, :]
        found += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    return found


@triton.jit
def convolved(
    x, weight, bias, state, row, own, documents, length, rows, channel, channels, x_stride,
    taps: tl.constexpr, has_bias: tl.constexpr,
    has_documents: tl.constexpr, has_state: tl.constexpr, block: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Return the convolution without activation of a block (rows, channels)."""
    total = tl.zeros((block, wide), dtype=tl.float32)
    if has_bias:
        total += tl.load(bias + channel, mask=channel < channels, other=0.0)[None, :]
    for back in tl.static_range(taps):
        found = earlier_rows(
            x, state, row, back, own, documents, length, rows, channel, channels, x_stride,
            taps, has_documents, has_state,
        )  # fmt: skip
        place = weight + channel * taps + (taps - 1 - back)
        total += found * tl.load(place, mask=channel < channels, other=0.0)[None, :]
    return total


@triton.jit
def forward(
    x, weight, bias, state, documents, y, length, rows, channels, x_stride,
    taps: tl.constexpr, silu: tl.constexpr, has_bias: tl.constexpr,
    has_documents: tl.constexpr, has_state: tl.constexpr, block: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Write the output of a block."""
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    own = numbers_at(documents, row, length, rows, has_documents)
    total = convolved(
        x, weight, bias, state, row, own, documents, length, rows, channel, channels, x_stride,
        taps, has_bias, has_documents, has_state, block, wide,
    )  # fmt: skip
    if silu:
        total = total * tl.sigmoid(total)
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    store_nearest(y + row[:, None] * channels + channel[None, :], total, mask)


@triton.jit
def gradient_before_activation(
    dy, x, weight, bias, state, row, own, documents, length, rows, channel, channels, x_stride,
    taps: tl.constexpr, silu: tl.constexpr, has_bias: tl.constexpr,
    has_documents: tl.constexpr, has_state: tl.constexpr, block: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Return the gradient of what the activation is applied to, of a block; zero outside."""
    mask = (own >= 0)[:, None] & (channel < channels)[None, :]
    place = row[:, None] * channels + channel[None, :]
    gradient = tl.load(dy + place, mask=mask, other=0.0).to(tl.float32)
    if silu:
        total = convolved(
            x, weight, bias, state, row, own, documents, length, rows, channel, channels, x_stride,
            taps, has_bias, has_documents, has_state, block, wide,
        )  # fmt: skip
        gate = tl.sigmoid(total)
        gradient *= gate * (1 + total * (1 - gate))
    return gradient


@triton.jit
def backward(
    dy, x, weight, bias, state, documents, dx, weight_parts, bias_parts,
    length, rows, channels, x_stride,
    taps: tl.constexpr, silu: tl.constexpr, has_bias: tl.constexpr,
    has_documents: tl.constexpr, has_state: tl.constexpr, block: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x of a block, and this block's part of those of weight (W, C) and
    bias.
    """
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    own = numbers_at(documents, row, length, rows, has_documents)
    total = tl.zeros((block, wide), dtype=tl.float32)
    part = tl.program_id(0).to(tl.int64)
    for back in tl.static_range(taps):
        later = numbers_at(documents, row + back, length, rows, has_documents)
        gradient = gradient_before_activation(
            dy, x, weight, bias, state, row + back, later, documents, length, rows, channel,
            channels, x_stride, taps, silu, has_bias, has_documents, has_state, block, wide,
        )  # fmt: skip
        place = weight + channel * taps + (taps - 1 - back)
        tap = tl.load(place, mask=channel < channels, other=0.0)
        # What came later reads this row if it is of the same document.
        total += tl.where((later == own)[:, None], gradient * tap[None, :], 0.0)
        if back == 0:
            tl.store(
                bias_parts + part * channels + channel, tl.sum(gradient, 0), mask=channel < channels
            )
            for ago in tl.static_range(taps):
                found = earlier_rows(
                    x, state, row, ago, own, documents, length, rows, channel, channels, x_stride,
                    taps, has_documents, has_state,
                )  # fmt: skip
                place = weight_parts + (part * taps + taps - 1 - ago) * channels + channel
                tl.store(place, tl.sum(gradient * found, 0), mask=channel < channels)
    mask = (own >= 0)[:, None] & (channel < channels)[None, :]
    store_nearest(dx + row[:, None] * channels + channel[None, :], total, mask)


@triton.jit
def state_gradient(
    dy, x, weight, bias, state, documents, d_state, length, rows, channels, x_stride,
    taps: tl.constexpr, silu: tl.constexpr, has_bias: tl.constexpr,
    has_documents: tl.constexpr, block: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the state of one row of the batch; slot s is read by the positions up
    to s of the row's first document.
    """
    batch = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    position = tl.arange(0, block)
    # Positions behind the row belong to nobody.
    row = tl.where(position < length, batch * length + position, -1)
    own = numbers_at(documents, row, length, rows, has_documents)
    gradient = gradient_before_activation(
        dy, x, weight, bias, state, row, own, documents, length, rows, channel, channels, x_stride,
        taps, silu, has_bias, has_documents, True, block, wide,
    )  # fmt: skip
    for slot in tl.static_range(taps - 1):
        # The tap that weighs the slot at each position.
        tap = slot - position
        read = (tap >= 0) & (own == batch * length)
        place = weight + channel[None, :] * taps + tap[:, None]
        factor = tl.load(place, mask=read[:, None] & (channel < channels)[None, :], other=0.0)
        found = tl.sum(gradient * factor, 0)
        place = d_state + (batch * (taps - 1) + slot) * channels + channel
        tl.store(place, found, mask=channel < channels)
