"""What `attention` refuses; each message names the argument, its value and what would do."""

from itertools import pairwise

import torch

from interlace.kernels.attention.options import DTYPES, Both, Options


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, order: int) -> None:
    """Raise `ValueError` for the first thing that does not fit."""
    check_types({"q": q, "k": k, "v": v}, options)
    if type(order) is not int or order < 1:
        raise ValueError(f"attention: order={order!r}: must be a whole number, at least 1")
    check_tensors(q, k, v)
    check_window(options)
    check_numbers(options)
    check_segments(q, k, options)
    check_documents(q, k, options)
    check_heads(q, "alibi_slopes", options.alibi_slopes)
    check_heads(q, "sinks", options.sinks)
    check_dilation(q, k, options)
    if options.block_mask is not None:
        check_block_mask(q, k, options.block_mask)
    if options.alibi_slopes is not None and options.alibi_slopes.requires_grad:
        raise ValueError("attention: alibi_slopes are constants; pass alibi_slopes.detach()")


def check_types(tensors: dict[str, object], options: Options) -> None:
    """Raise where something is no tensor, or no number, that has to be one."""
    for name in ("segment_ids", "cu_seqlens", "alibi_slopes", "sinks"):
        value = getattr(options, name)
        several = isinstance(value, tuple) and name in ("segment_ids", "cu_seqlens")
        if several and len(value) != 2:
            raise ValueError(
                f"attention: {name} must be a tensor or a pair of them; got {len(value)} values"
            )
        named = zip((name, f"{name} of keys"), value if several else (value,), strict=False)
        tensors = tensors | dict(named)
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor | None) or (value is None and name in "qkv"):
            raise ValueError(f"attention: {name} must be a tensor; got {type(value).__name__}")
    for name in ("softcap", "scale"):
        value = getattr(options, name)
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"attention: {name}={value!r}: must be a number")


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise where shapes, dtypes or devices of queries, keys and values do not agree."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention takes q (B, H, T, K), k and v (B, G, S, K); got {shapes}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: batch, length or head width do not agree: {shapes}")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: query heads must be a multiple of key heads: {shapes}")
    if 0 in (q.shape[0], q.shape[2], k.shape[2], q.shape[3]):
        raise ValueError(f"attention: there is nothing to attend to: {shapes}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            "attention: one dtype of float64, float32, bfloat16, float16 is needed; got "
            f"{q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"attention: one device is needed; got {q.device}, {k.device}, {v.device}")


def check_window(options: Options) -> None:
    """Raise where a window is no size."""
    window = options.window
    if window is None:
        return
    sizes = window if isinstance(window, tuple) else (window,)
    whole = all(type(size) is int for size in sizes)
    least = -1 if isinstance(window, tuple) else 1
    if not whole or len(sizes) > 2 or not sizes or min(sizes) < least or window == (-1,):
        raise ValueError(
            f"attention: window={window!r}: give the number of keys a query sees up to its own, at "
            "least 1, or a pair (keys before, keys after), each at least 0, or -1 for all"
        )


def check_numbers(options: Options) -> None:
    """Raise where a factor or bound is no usable number."""
    if options.softcap is not None and not 0.0 < options.softcap < float("inf"):
        raise ValueError(
            f"attention: softcap={options.softcap}: must be a positive number, or None for no cap"
        )
    if options.scale is not None and not abs(options.scale) < float("inf"):
        raise ValueError(f"attention: scale={options.scale}: must be a finite number")


def check_segments(q: torch.Tensor, k: torch.Tensor, options: Options) -> None:
    """Raise where segment ids do not fit queries and keys."""
    if options.segment_ids is None:
        return
    if options.cu_seqlens is not None:
        raise ValueError("attention: segment_ids and cu_seqlens both name documents; give one")
    if isinstance(options.segment_ids, tuple):
        named = zip(("of queries", "of keys"), options.segment_ids, (q, k), strict=True)
        for name, ids, tensor in named:
            check_ids(f"segment_ids {name}", ids, (tensor.shape[0], tensor.shape[2]), k)
        return
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"attention: segment_ids name the keys' segments, and there are more queries "
            f"({q.shape[2]}) than keys ({k.shape[2]}); give a pair (of queries, of keys)"
        )
    check_ids("segment_ids", options.segment_ids, (k.shape[0], k.shape[2]), k)


def check_ids(name: str, ids: torch.Tensor, shape: tuple[int, ...], k: torch.Tensor) -> None:
    """Raise where ids are no integers of the given shape beside the keys."""
    if tuple(ids.shape) != shape:
        raise ValueError(f"attention: {name} must have shape {list(shape)}; got {list(ids.shape)}")
    check_integers(name, ids, k)


def check_integers(name: str, ids: torch.Tensor, k: torch.Tensor) -> None:
    """Raise where a tensor holds no integers or lies elsewhere."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        raise ValueError(f"attention: {name} must be integers; got {ids.dtype}")
    if ids.device != k.device:
        raise ValueError(f"attention: {name} are on {ids.device}, keys on {k.device}")


def check_documents(q: torch.Tensor, k: torch.Tensor, options: Options) -> None:
    """Raise where document boundaries do not fit queries and keys."""
    if options.cu_seqlens is None:
        return
    pair = isinstance(options.cu_seqlens, tuple)
    if not pair and q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: cu_seqlens for {q.shape[2]} queries and {k.shape[2]} keys must be a pair "
            "(of queries, of keys)"
        )
    both: Both = options.cu_seqlens
    of_queries, of_keys = both if isinstance(both, tuple) else (both, both)
    if of_queries.shape != of_keys.shape:
        raise ValueError(
            "attention: cu_seqlens of queries and of keys must name as many documents; got "
            f"{len(of_queries) - 1} and {len(of_keys) - 1}"
        )
    for ids, length in ((of_queries, q.shape[2]), (of_keys, k.shape[2])):
        check_boundaries(ids, length, k)


def check_boundaries(ids: torch.Tensor, length: int, k: torch.Tensor) -> None:
    """Raise where boundaries are no rising positions; values are read only where that is cheap."""
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(
            "attention: cu_seqlens must be (documents + 1,), from 0 to the length; got shape "
            f"{list(ids.shape)}"
        )
    check_integers("cu_seqlens", ids, k)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        values = ids.tolist()
        rising = all(a <= b for a, b in pairwise(values))
        if values[0] != 0 or not rising or values[-1] > length:
            raise ValueError(
                f"attention: cu_seqlens must rise from 0 to at most the length {length}; got "
                f"{values}"
            )


def check_heads(q: torch.Tensor, name: str, values: torch.Tensor | None) -> None:
    """Raise where a tensor has not one number per query head."""
    if values is None:
        return
    if list(values.shape) != [q.shape[1]] or not values.is_floating_point():
        raise ValueError(
            f"attention: {name} must be one float per query head, ({q.shape[1]},); got "
            f"{list(values.shape)} of {values.dtype}"
        )
    if values.device != q.device:
        raise ValueError(f"attention: {name} are on {values.device}, queries on {q.device}")


def check_dilation(q: torch.Tensor, k: torch.Tensor, options: Options) -> None:
    """Raise where a dilation is no step, or meets an option it does not go with."""
    step = options.dilation
    if type(step) is not int or step < 1:
        raise ValueError(f"attention: dilation={step!r}: must be a whole number, at least 1")
    if step == 1:
        return
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"attention: dilation={step} with more queries ({q.shape[2]}) than keys ({k.shape[2]}) "
            "is not defined"
        )
    for name in ("block_mask", "cu_seqlens", "segment_ids"):
        value = getattr(options, name)
        if name == "block_mask" and value is not None:
            raise ValueError(f"attention: dilation={step} cannot be combined with a block_mask")
        if isinstance(value, tuple):
            raise ValueError(f"attention: dilation={step} takes one tensor of {name}, not a pair")


def check_block_mask(q: torch.Tensor, k: torch.Tensor, block_mask: object) -> None:
    """Raise where a block mask is none, or was made for other lengths."""
    needed = ("kv_num_blocks", "kv_indices", "mask_mod", "BLOCK_SIZE", "seq_lengths")
    if not all(hasattr(block_mask, name) for name in needed):
        raise ValueError(
            "attention: block_mask must be a torch.nn.attention.flex_attention.BlockMask; got "
            f"{type(block_mask).__name__}"
        )
    counts: torch.Tensor = getattr(block_mask, "kv_num_blocks")  # noqa: B009
    lengths: tuple[int, int] = getattr(block_mask, "seq_lengths")  # noqa: B009
    if tuple(lengths) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"attention: the block_mask is for {lengths[0]} queries and {lengths[1]} keys; got "
            f"{q.shape[2]} and {k.shape[2]}"
        )
    if counts.shape[0] not in (1, q.shape[0]) or counts.shape[1] not in (1, q.shape[1]):
        raise ValueError(
            f"attention: the block_mask is for batch {counts.shape[0]} and {counts.shape[1]} "
            f"heads; got {q.shape[0]} and {q.shape[1]}"
        )
    if counts.device != q.device:
        raise ValueError(f"attention: the block_mask is on {counts.device}, queries on {q.device}")
