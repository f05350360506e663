"""Flash attention in Triton, differentiable twice: the four computations of the `triton` back end.

Deterministic: every number is written by one program, no atomics. Memory grows with the sequence,
never with its square. On a CPU the kernels run only in Triton's interpreter, for tests.
"""

from interlace.kernels.triton_language import require_triton

require_triton("the triton back end of attention")

from interlace.kernels.attention.triton.launch import (  # noqa: E402  (needs Triton)
    backward,
    double_backward,
    forward,
    tangent,
)

__all__ = ["backward", "double_backward", "forward", "tangent"]
