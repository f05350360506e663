"""Whether Triton is here, and what to type when it is not.

Triton compiles the kernels for a GPU. It comes with the CUDA builds of torch; CPU builds do without
it, and nothing that runs on a CPU needs it. A module of Triton kernels imports `triton` at its top,
so whoever imports such a module calls `require_triton` first, and a router that would rather choose
something else asks `why_no_triton`.
"""

OLDEST = (3, 6)
"""The oldest version that the kernels are tested with."""


def why_no_triton() -> str | None:
    """Return why Triton cannot be used here and what to type next, or None where it can."""
    oldest = ".".join(str(number) for number in OLDEST)
    remedy = f"type  pip install 'triton>={oldest}'  (CUDA builds of torch bring it along)"
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); {remedy}"
    found: str = triton.__version__
    major, minor = (int(number) for number in found.split(".")[:2])
    if (major, minor) < OLDEST:
        return f"Triton {found} is older than {oldest}; {remedy}"
    return None


def require_triton(what: str) -> None:
    """Raise unless Triton can be used.

    Args:
        what: What needs it, the beginning of the message: "attention on a GPU".

    Raises:
        ImportError: Triton is missing or too old; the message says what to type.
    """
    problem = why_no_triton()
    if problem is not None:
        raise ImportError(f"{what} needs Triton. {problem}", name="triton")
