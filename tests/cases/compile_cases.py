"""Triton kernels compiled for a GPU on a machine without one. In a process of its own: where tests
run kernels in Triton's interpreter, nothing can be compiled.
"""

from collections.abc import Mapping
from typing import Any


def ptx_of(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    capability: int = 90,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Return the PTX of a kernel whose pointers are aligned to 16 bytes, after the assembler took
    it.

    Args:
        kernel: A function under `triton.jit`.
        types: Types of its arguments as Triton writes them, "*bf16" or "i32"; "fp32" by default.
        constants: Its constexpr arguments.
        capability: 80 for A100, 90 for H100.
        options: Compiler options.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    signature = {
        name: "constexpr" if name in constants else types.get(name, "fp32") for name in names
    }
    attributes = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=dict(options or {})
    )
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]
