"""The chain of derivatives of attention: forward, backward, double backward, and the tangent.

One identity organises it: for cotangents X, Y, Z of the gradients of q, k and v,

    <X, dq> + <Y, dk> + <Z, dv> = <grad_out, tangent of out> + <grad_lse, tangent of lse>

with tangents taken along (X, Y, Z). So double backward is the gradient of the tangent, its gradient
with respect to `grad_out` is the tangent itself, and by the symmetry of second derivatives the
tangent of backward (forward over reverse) is a double backward too. Four kernels serve them all.

`out` and `lse` enter backward as saved results, never as variables: the formulas of double backward
hold the dependence of both on q, k and v already, and their own gradient is None.
"""

from typing import Any, cast

import torch

from interlace.kernels.attention.operators import kernels_of
from interlace.kernels.attention.scoring import Scoring

Tensor = torch.Tensor

# torch declares Function's methods with a context first; with `setup_context` forward has none.
# pyright: reportIncompatibleMethodOverride=false

THIRD = (
    "attention: a third derivative was asked for, but the triton back end has two; "
    'call attention(..., backend="chunked"), which has any number'
)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, backend: str
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, differentiable as often as the back end can."""
    if torch.compiler.is_compiling():
        return torch.ops.interlace.attention_forward(backend, q, k, v, *scoring)
    return cast(tuple[Tensor, Tensor], Attend.apply(q, k, v, scoring, backend))


class Attend(torch.autograd.Function):
    """Output and log-sum-exp of attention."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, backend: str) -> Any:
        """Run the forward kernel."""
        return torch.ops.interlace.attention_forward(backend, q, k, v, *scoring)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what every derivative needs: O(T K) per head."""
        q, k, v, ctx.scoring, ctx.backend = inputs
        ctx.save_for_backward(q, k, v, *output)
        ctx.save_for_forward(q, k, v, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Pull cotangents of the output and the log-sum-exp back to q, k and v."""
        grad_out, grad_lse = gradients
        if grad_out is None and grad_lse is None:
            return (None,) * 5
        saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(saved[3])
        found = AttendBackward.apply(*saved, grad_out, grad_lse, ctx.scoring, ctx.backend)
        return *cast(Any, found), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Push tangents of q, k and v forward; the result can be differentiated in turn."""
        saved = ctx.saved_tensors
        along = filled(tangents[:3], saved[:3])
        return AttendTangent.apply(*saved, *along, ctx.scoring, ctx.backend)


class AttendBackward(torch.autograd.Function):
    """Gradients of q, k and v as a function that can itself be differentiated."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        scoring: Scoring,
        backend: str,
    ) -> Any:
        """Run the backward kernels."""
        saved = q, k, v, out, lse, grad_out, grad_lse
        return torch.ops.interlace.attention_backward(backend, *saved, *scoring)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the inputs, and dq, which the double backward needs again."""
        *tensors, ctx.scoring, ctx.backend = inputs
        ctx.save_for_backward(*tensors, output[0])
        ctx.save_for_forward(*tensors, output[0])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Differentiate the gradients."""
        saved = ctx.saved_tensors
        if all(each is None for each in gradients):
            return (None,) * 9
        along = filled(gradients, saved[:3])
        *inner, along_out, along_lse = twice(saved, along, ctx.scoring, ctx.backend)
        of_lse = None if saved[6] is None else along_lse
        return *inner, None, None, along_out, of_lse, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Forward over reverse: the second derivative is symmetric, so the same kernels serve."""
        saved = ctx.saved_tensors
        q, k, v, out, lse, grad_out, *_ = saved
        along = filled(tangents[:3], saved[:3])
        results = list(twice(saved, along, ctx.scoring, ctx.backend)[:3])
        if tangents[5] is not None or tangents[6] is not None:
            of_out = filled(tangents[5:6], (grad_out,))[0]
            more = AttendBackward.apply(
                q, k, v, out, lse, of_out, tangents[6], ctx.scoring, ctx.backend
            )
            results = [a + b for a, b in zip(results, cast(Any, more), strict=True)]
        return tuple(results)


class AttendTangent(torch.autograd.Function):
    """Tangents of output and log-sum-exp along tangents of q, k and v."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        along_q: Tensor,
        along_k: Tensor,
        along_v: Tensor,
        scoring: Scoring,
        backend: str,
    ) -> Any:
        """Run the tangent kernel."""
        along = along_q, along_k, along_v
        return kernels_of(backend).tangent(q, k, v, out, lse, *along, scoring)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the inputs."""
        *tensors, ctx.scoring, ctx.backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Reverse over forward: linear in the tangents, a double backward in q, k and v."""
        q, k, v, out, lse, *along = ctx.saved_tensors
        grad_out, grad_lse = gradients
        if grad_out is None and grad_lse is None:
            return (None,) * 10
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        saved = q, k, v, out, lse, grad_out, grad_lse
        linear = cast(Any, AttendBackward.apply(*saved, ctx.scoring, ctx.backend))
        bent = twice((*saved, linear[0]), tuple(along), ctx.scoring, ctx.backend)[:3]
        return *bent, None, None, *linear, None, None


class AttendTwice(torch.autograd.Function):
    """Double backward of a back end that ends there: a third derivative raises."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """Run the double-backward kernels."""
        *tensors, scoring, backend = inputs
        return kernels_of(backend).double_backward(*tensors, scoring)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept; torch.func transforms insist on this method."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Refuse: nothing here knows a third derivative."""
        raise RuntimeError(THIRD)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refuse likewise."""
        raise RuntimeError(THIRD)


def twice(
    saved: tuple[Any, ...], along: tuple[Tensor, ...], scoring: Scoring, backend: str
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, `grad_out` and `grad_lse` of the gradients along `along`.

    Args:
        saved: q, k, v, out, lse, grad_out, grad_lse (or None) and dq.
        along: Cotangents of the gradients of q, k and v, or tangents of q, k and v.
        scoring: What the logits are.
        backend: Whose kernels run.
    """
    if backend == "chunked" and torch.is_grad_enabled():
        # Recorded operation by operation, which gives all further orders.
        return kernels_of(backend).double_backward(*saved, *along, scoring)
    return cast(Any, AttendTwice.apply(*saved, *along, scoring, backend))


def filled(found: tuple[Any, ...], like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the tensors with zeros for those that are absent."""
    pairs = zip(found, like, strict=True)
    return tuple(torch.zeros_like(x) if each is None else each for each, x in pairs)
