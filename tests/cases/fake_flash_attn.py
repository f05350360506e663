"""A stand-in for Dao-AILab's package: same functions, layout and defaults, plain arithmetic.

It notes how it is called, and like the real one its gradients are cut off from the graph.
"""

from types import ModuleType
from typing import Any

import torch


class CutOff(torch.autograd.Function):
    """Computes a function whose backward leaves no graph behind, without an error."""

    @staticmethod
    def forward(ctx: Any, compute: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*inputs)
        return compute(*inputs)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        with torch.enable_grad():
            inputs = [each.detach().requires_grad_() for each in ctx.saved_tensors]
            found = torch.autograd.grad(ctx.compute(*inputs)[0], inputs, gradients[0].detach())
        return None, *found


def fake_flash_attn(version: str = "2.8.3") -> ModuleType:
    """Return the module; `calls` lists the name and the settings of every call."""
    module: Any = ModuleType("flash_attn")
    module.__version__ = version
    module.calls = []

    def flash_attn_func(q: Any, k: Any, v: Any, dropout_p: float = 0.0, **settings: Any) -> Any:
        module.calls.append(("flash_attn_func", settings))
        assert dropout_p == 0.0
        compute = lambda q, k, v: one(q, k, v, settings)  # noqa: E731
        return CutOff.apply(compute, q, k, v), compute(q, k, v)[1], None

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, **settings: Any,
    ) -> Any:  # fmt: skip
        lengths = {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}
        module.calls.append(("flash_attn_varlen_func", {**lengths, **settings}))
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert dropout_p == 0.0
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert max_seqlen_k == int(cu_seqlens_k.diff().max())

        def compute(q: Any, k: Any, v: Any) -> Any:
            parts = [
                one(q[None, a:b], k[None, c:d], v[None, c:d], settings)
                for a, b, c, d in zip(
                    cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:],
                    strict=True,
                )
            ]  # fmt: skip
            return torch.cat([p[0][0] for p in parts]), torch.cat([p[1][0] for p in parts], 1)

        return CutOff.apply(compute, q, k, v), compute(q, k, v)[1], None

    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    return module


def one(q: Any, k: Any, v: Any, settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend as the package's own reference does: (B, T, H, K) to (B, T, H, K) and (B, H, T)."""
    assert settings["return_attn_probs"] is True
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * settings["softmax_scale"]
    if settings["softcap"]:
        scores = settings["softcap"] * torch.tanh(scores / settings["softcap"])
    rows, columns = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    apart = columns - (rows + k.shape[1] - q.shape[1])
    if settings["alibi_slopes"] is not None:
        scores = scores - settings["alibi_slopes"][:, None, None] * apart.abs()
    left, right = settings["window_size"]
    right = 0 if settings["causal"] else right
    hidden = ((left >= 0) & (apart < -left)) | ((right >= 0) & (apart > right))
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v), scores.logsumexp(-1)
