"""The `[model]` table: the shape of the stack, and the settings of every block it may hold."""

from typing import Annotated, Literal

from pydantic import Field

from interlace.trainer.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class ModelSection(Section):
    """The shape of the model: a stack of layers, each the residual blocks that `pattern` spells."""

    pattern: Annotated[str, Field(min_length=1)] = "AF"
    """Residual blocks, a letter each (A: attention, F: SwiGLU, M: Mamba-2, E: mixture of experts).
    Words separated by spaces are layers, and `*N` repeats one: `AMF*7 MF*50`.
    """

    layers: PositiveInt = 4
    """How often the whole pattern is repeated."""

    depth_plan: str = "repeat"
    """How the pattern becomes layers: `repeat` in its order; `spread` mixes its words as evenly as
    it can, the rarest never first.
    """

    plugins: list[str] = []
    """Python files that register blocks or other parts of your own; relative to the recipe."""

    options: dict[str, bool | int | float | str] = {}
    """Settings of plug-in blocks, by name; the blocks that come with the project read none."""

    width: PositiveInt = 192
    """Width of the residual stream."""

    heads: PositiveInt = 4
    """Query heads of an attention block."""

    kv_heads: PositiveInt | None = None
    """Key and value heads (grouped-query attention); unset means as many as query heads."""

    head_width: PositiveInt | None = None
    """Width of one head; unset means `width / heads`."""

    ffn_width: PositiveInt | None = None
    """Hidden width of a feed-forward block; unset means 8/3 of the width, rounded up to a
    multiple of 64.
    """

    query_key_norm: bool = False
    """Normalise queries and keys per head (RMSNorm) before the rotary embedding."""

    tie_embeddings: bool = False
    """Use the embedding matrix as the output head as well."""

    positions: Literal["rope", "none"] = "rope"
    """What attention knows of positions: rotary embedding, or nothing (NoPE), as hybrids may."""

    rope_base: Annotated[float, Field(gt=1.0)] = 10_000.0
    """Base of the rotary position embedding's wavelengths."""

    norm_epsilon: PositiveFloat = 1e-5
    """Added to the mean square inside RMSNorm."""

    attention_backend: Literal[
        "auto", "reference", "chunked", "sdpa", "flex", "flash_attn", "triton"
    ] = "auto"
    """Kernels of attention; auto: as measured, `interlace doctor RECIPE` says which and why. A name
    wins over the environment variable INTERLACE_ATTENTION.
    """

    mamba_expand: PositiveFloat = 2.0
    """Inner width of a Mamba-2 block as a multiple of `width`."""

    mamba_head_width: PositiveInt = 64
    """Channels of one head of Mamba-2; the inner width is a multiple of it."""

    mamba_state_width: PositiveInt = 128
    """Width of the state that each channel of Mamba-2 carries along."""

    mamba_groups: PositiveInt = 1
    """Groups of heads of Mamba-2 that share B and C, and are normed together."""

    mamba_conv_width: Annotated[PositiveInt, Field(ge=2)] = 4
    """Taps of the causal convolution before the scan of Mamba-2."""

    moe_experts: PositiveInt = 8
    """Routed experts of a mixture-of-experts block."""

    moe_top_k: PositiveInt = 2
    """Routed experts that each token goes through."""

    moe_shared_experts: NonNegativeInt = 1
    """Experts that every token goes through, as one block of their joint width."""

    moe_expert_width: PositiveInt | None = None
    """Hidden width of one expert; unset means that of a feed-forward block, divided by `moe_top_k`
    and the shared experts together, rounded up to a multiple of 8.
    """

    moe_router: Literal["softmax", "sigmoid"] = "softmax"
    """How scores become weights: softmax over the chosen logits, or sigmoids, normalised over the
    chosen ones.
    """

    moe_balance_loss: NonNegativeFloat = 0.01
    """Weight of the load-balance loss, row by row (DeepSeek-V3, equation 17); 0 turns it off."""

    moe_bias_rate: NonNegativeFloat = 0.0
    """Step of the bias that moves the choice of experts towards equal load without a loss
    (DeepSeek-V3, section 2.1.2); 0 turns it off.
    """
