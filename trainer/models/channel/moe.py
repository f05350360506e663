"""Channel mixer `E`: a mixture of experts, shared ones for every token and routed ones by choice.

A router scores all experts for a token, the best k are run, and their results are added with
weights that sum to one (Shazeer et al. 2017, arXiv 1701.06538). Experts that every token goes
through, as one block, keep what is common out of the others (DeepSeekMoE, Dai et al. 2024, arXiv
2401.06066). No token is dropped; see `experts`.

Left alone a router prefers few experts. Two remedies, and both may be on. The load-balance loss
(Switch Transformer, Fedus et al. 2021, arXiv 2101.03961, equation 4) pulls towards an equal load,
row by row (as in DeepSeek-V3, 2024, arXiv 2412.19437, equations 17 to 20): a loss over a whole
micro-batch would depend on how a step is cut into them, and so on the number of ranks. The balance
bias (section 2.1.2 there) is added to the scores when experts are chosen, never to the weights, and
moves a little after every step against the load of the whole step on all ranks.

With several ranks the experts are sharded like all other weights, by FSDP2 along their first
dimension, which is that of the experts, and gathered layer by layer. They are not kept apart with
the tokens sent to them (expert parallelism by all-to-all): torch 2.13 has no such style among those
for tensor parallelism, experts would need a mesh and a gradient scale of their own beside FSDP2's,
and what a checkpoint holds of them would depend on both.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.channel.experts import Experts, through_experts
from interlace.trainer.models.channel.swiglu import SwiGLU
from interlace.trainer.models.context import BlockContext, Routed
from interlace.trainer.models.initial import embedding_value, matrix_value, residual_matrix_value
from interlace.trainer.models.layers import Linear
from interlace.trainer.models.registry import Flops, Role, SavedElements, Traits, channel_mixer
from interlace.trainer.models.shapes import expert_width


class Choice(NamedTuple):
    """Where the router sends tokens.

    Attributes:
        experts: (N, k) int64.
        weights: (N, k), fp32 at least; each row sums to one.
        probabilities: (N, E), fp32 at least, of all experts, as the balance loss takes them.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    probabilities: torch.Tensor


@channel_mixer("E", "moe")
class MixtureOfExperts(nn.Module):
    """Shared experts, and the best k of the routed ones."""

    traits: ClassVar[Traits] = Traits(decoding="nothing")

    balance_bias: torch.Tensor | None

    def __init__(self, config: ModelSection) -> None:
        super().__init__()
        self.top_k = config.moe_top_k
        self.kind = config.moe_router
        self.balance_loss = config.moe_balance_loss
        self.bias_rate = config.moe_bias_rate
        self.router = Router(config.width, config.moe_experts)
        self.experts = Experts(config.moe_experts, config.width, expert_width(config))
        self.shared = SwiGLU(joint_block(config)) if config.moe_shared_experts else None
        moving = self.bias_rate > 0
        self.register_buffer("balance_bias", torch.empty(config.moe_experts) if moving else None)

    def forward(self, x: torch.Tensor, context: BlockContext) -> Routed:
        """Map (B, T, D) to (B, T, D), each position alone; also return loss and load."""
        tokens = x.flatten(0, 1)
        choice = self.choose(tokens)
        output = through_experts(tokens, choice.experts, choice.weights, self.experts)
        output = output.unflatten(0, x.shape[:2])
        if self.shared is not None:
            output = output + self.shared(x, context)
        load = choice_counts(choice.experts, choice.probabilities.shape[1])
        if not self.balance_loss:
            return Routed(output, choice.probabilities.new_zeros(()), load)
        rows = choice.probabilities.unflatten(0, x.shape[:2])
        loss = balance_loss(rows, choice.experts.unflatten(0, x.shape[:2]))
        return Routed(output, self.balance_loss * loss, load)

    def choose(self, tokens: torch.Tensor) -> Choice:
        """Return the experts of (N, D) tokens."""
        logits = self.router(tokens)
        scores = logits.softmax(-1) if self.kind == "softmax" else logits.sigmoid()
        ranked = scores if self.balance_bias is None else scores + self.balance_bias
        chosen = ranked.detach().topk(self.top_k, dim=-1).indices
        if self.kind == "softmax":
            return Choice(chosen, logits.gather(1, chosen).softmax(-1), scores)
        weights = scores.gather(1, chosen)
        total = scores.sum(-1, keepdim=True)
        return Choice(chosen, weights / weights.sum(-1, keepdim=True), scores / total)

    @torch.no_grad()
    def balance(self, load: torch.Tensor) -> None:
        """Move the bias against the choices per expert, (E,), of a whole step on all ranks, unless
        the router is frozen.
        """
        if self.balance_bias is not None and self.router.weight.requires_grad:
            load = load.to(self.balance_bias.device, torch.float64)
            self.balance_bias += self.bias_rate * (load.mean() - load).sign().float()

    def new_cache(self, batch: int, length: int, like: torch.Tensor) -> None:
        """Nothing is remembered between positions."""
        return

    @classmethod
    def initial_value(
        cls,
        name: str,
        shape: tuple[int, ...],
        config: ModelSection,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Like a feed-forward block, expert by expert; the router starts small, like a head, so
        that the first choices are nearly even, and the bias at zero.
        """
        if name == "balance_bias":
            return torch.zeros(shape)
        if name == "router.weight":
            return embedding_value(shape, generator)
        if name in {"experts.down", "shared.down.weight"}:
            return residual_matrix_value(shape, config, generator)
        return matrix_value(shape, generator)

    @classmethod
    def roles(cls, config: ModelSection) -> Mapping[str, Role]:
        """Matrices between widths; the router has a fixed number of outputs."""
        roles: dict[str, Role] = {"router.weight": "readout"}
        for name, role in SwiGLU.roles(config).items():
            roles[f"experts.{name.removesuffix('.weight')}"] = role
            if config.moe_shared_experts:
                roles[f"shared.{name}"] = role
        return roles

    @classmethod
    def parameter_count(cls, config: ModelSection) -> int:
        """Weights of the router and of all experts."""
        return cls.weights_of(config, config.moe_experts)

    @classmethod
    def active_parameter_count(cls, config: ModelSection) -> int:
        """Weights that one token meets."""
        return cls.weights_of(config, config.moe_top_k)

    @classmethod
    def weights_of(cls, config: ModelSection, routed: int) -> int:
        """Weights of the router, the shared experts and so many routed ones."""
        experts = 3 * config.width * expert_width(config) * (routed + config.moe_shared_experts)
        return config.width * config.moe_experts + experts

    @classmethod
    def flops_per_token(cls, config: ModelSection, sequence_length: int) -> Flops:
        """The router, the shared experts and k routed ones."""
        forward = 2 * cls.active_parameter_count(config)
        return Flops(forward, 2 * forward)

    @classmethod
    def saved_elements(cls, config: ModelSection, sequence_length: int) -> SavedElements:
        """Each chosen expert's input, its gate, up and gated product, and its result; the router's
        scores in fp32, the chosen weights, and 64-bit indices, which count as two elements each.
        """
        k, hidden, width = config.moe_top_k, expert_width(config), config.width
        scores = config.moe_experts if config.moe_balance_loss else 0
        if config.moe_router == "sigmoid":
            # The scores, k chosen ones, and the sums that both are divided by.
            scores = config.moe_experts + k + 1 + (1 if config.moe_balance_loss else 0)
        joint = config.moe_shared_experts * hidden
        return SavedElements(
            kept=k * (2 * width + 3 * hidden) + 3 * joint,
            products=k * (2 * hidden + width) + (2 * joint + width if joint else 0),
            kept_wide=scores + k + 4 * k,
            products_wide=config.moe_experts,
        )

    @classmethod
    def cache_bytes(cls, config: ModelSection, length: int, element_bytes: int) -> int:
        """Nothing is remembered between positions."""
        return 0


class Router(Linear):
    """Logits in fp32 at least, whatever the precision of its input.

    Attributes:
        multiplier: Factor on the logits, which follows the width under muP.
    """

    keeps_fp32 = True
    multiplier: float = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, D) to (N, E)."""
        logits = WideProduct.apply(x, self.weight)
        assert isinstance(logits, torch.Tensor)
        return logits if self.multiplier == 1.0 else logits * self.multiplier


class WideProduct(torch.autograd.Function):
    """`x @ weight.T` in fp32 at least; keeps x as it is, not its wide copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Map x (N, D) and weight (E, D) to (N, E)."""
        ctx.save_for_backward(x, weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        return functional.linear(x.to(wide), weight.to(wide))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute both gradients, to be differentiated again where that is asked for."""
        (gradient,) = grad_outputs
        x, weight = ctx.saved_tensors
        of_x = gradient @ weight.to(gradient.dtype)
        of_weight = gradient.transpose(0, 1) @ x.to(gradient.dtype)
        return of_x.to(x.dtype), of_weight.to(weight.dtype)


def choice_counts(chosen: torch.Tensor, experts: int) -> torch.Tensor:
    """Return how many of the choices (N, k) fell on each expert, (E,) int64."""
    counts = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
    # Whole numbers: the order in which they are added does not matter.
    return counts.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())


def balance_loss(probabilities: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the mean over rows of E times the sum over experts of their share of the row's choices
    times their mean probability in it: 1 if the load is even, E if one expert has it all.

    Args:
        probabilities: (B, T, E), summing to one over E. The softmax over all logits, or the
            sigmoids divided by their sum over all experts (DeepSeek-V3, equation 19).
        chosen: (B, T, k) experts; all k choices of a token count, and no gradient goes through.
    """
    rows, _, experts = probabilities.shape
    flat = chosen.flatten(1)
    share = probabilities.new_zeros(rows, experts)
    share.scatter_add_(1, flat, torch.full_like(flat, 1, dtype=share.dtype))
    return experts * (share / flat.shape[1] * probabilities.mean(1)).sum(-1).mean()


def joint_block(config: ModelSection) -> ModelSection:
    """Return the settings of the feed-forward block that the shared experts are together."""
    joint = config.moe_shared_experts * expert_width(config)
    return config.model_copy(update={"ffn_width": joint})
