"""Attention spelled out pair by pair, and the calls that every back end is held to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask


@dataclass(frozen=True)
class Case:
    """One call: shapes, and options as `attention` takes them."""

    heads: int = 2
    groups: int = 2
    queries: int = 21
    keys: int = 21
    batch: int = 1
    width: int = 8
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def tensors(
        self, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k and v that want gradients."""
        generator = torch.Generator().manual_seed(seed)
        shapes = (self.heads, self.queries), *(2 * ((self.groups, self.keys),))
        drawn = [
            torch.randn(self.batch, *shape, self.width, generator=generator, dtype=torch.float64)
            for shape in shapes
        ]
        q, k, v = (x.to(dtype).requires_grad_() for x in drawn)
        return q, k, v


def documents(*lengths: int) -> torch.Tensor:
    """Return (1, S) segment ids of documents of these lengths."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def letters(b: Any, h: Any, i: Any, j: Any) -> Any:
    """A mask with hidden, partial and whole blocks of 16."""
    return ((i // 16 + j // 16) % 2 == 0) | (i == j)


BLOCKS = create_block_mask(letters, None, None, 40, 40, device="cpu", BLOCK_SIZE=16)
PER_HEAD = create_block_mask(
    lambda b, h, i, j: ((i + h) // 16 + 1 >= j // 16) & (j % 5 != b),
    2, 2, 20, 33, device="cpu", BLOCK_SIZE=16,
)  # fmt: skip

CASES = {
    "causal": Case(),
    "full": Case(options={"causal": False}),
    "one key head": Case(heads=3, groups=1),
    "grouped": Case(heads=4, groups=2, batch=2, queries=18, keys=18),
    "window": Case(options={"window": 4}),
    "window to both sides": Case(options={"window": (3, 2), "causal": False}),
    "window to the left only": Case(options={"window": (-1, 0), "causal": False}),
    "fewer queries": Case(queries=9, groups=1, options={"softcap": 1.5}),
    "one query": Case(queries=1),
    "more queries": Case(queries=25, keys=14),
    "more queries, full": Case(queries=25, keys=14, options={"causal": False}),
    "segments": Case(batch=2, options={"segment_ids": documents(5, 1, 15).expand(2, -1)}),
    "segments that come back": Case(
        options={"segment_ids": torch.tensor([[7, 7, -3, 7, 2**40, 7, 7, -3] + [1] * 13])}
    ),
    "segments of both sides": Case(
        queries=6,
        options={"segment_ids": (torch.tensor([[0, 0, 9, 2, 2, 4]]), documents(9, 7, 5))},
    ),
    "documents": Case(
        options={"cu_seqlens": torch.tensor([0, 6, 6, 19], dtype=torch.int32), "window": 5}
    ),
    "documents of both sides": Case(
        queries=12,
        options={"cu_seqlens": (torch.tensor([0, 2, 8, 12]), torch.tensor([0, 6, 9, 21]))},
    ),
    "softcap": Case(options={"softcap": 0.8, "scale": 0.9}),
    "ALiBi": Case(queries=13, options={"alibi_slopes": torch.tensor([0.5, 0.1])}),
    "ALiBi in documents": Case(
        queries=12,
        options={
            "cu_seqlens": (torch.tensor([0, 2, 8, 12]), torch.tensor([0, 6, 9, 21])),
            "alibi_slopes": torch.tensor([0.5, 0.1]),
            "softcap": 2.0,
        },
    ),
    "sinks": Case(options={"sinks": torch.tensor([0.3, -1.0], dtype=torch.float64)}),
    "dilated": Case(options={"dilation": 3}),
    "dilated window": Case(
        queries=17,
        options={
            "dilation": 2,
            "window": (2, 3),
            "causal": False,
            "segment_ids": documents(8, 13),
            "alibi_slopes": torch.tensor([0.2, 0.4]),
        },
    ),
    "block sparse": Case(queries=40, keys=40, options={"block_mask": BLOCKS}),
    "block sparse per head": Case(
        heads=2, batch=2, queries=20, keys=33, options={"block_mask": PER_HEAD, "causal": True}
    ),
    "narrow heads": Case(width=3, options={"softcap": 3.0, "window": 6}),
}


def sides(value: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the queries' and the keys' tensor of an option that may be a pair."""
    return value if isinstance(value, tuple) else (value, value)


def alignment(case: Case) -> list[int]:
    """Return the key that each query is aligned with."""
    if "cu_seqlens" not in case.options:
        return [i + case.keys - case.queries for i in range(case.queries)]
    of_queries, of_keys = (side.tolist() for side in sides(case.options["cu_seqlens"]))
    of_queries.append(case.queries)
    of_keys.append(case.keys)
    aligned: list[int] = []
    for document in range(len(of_queries) - 1):
        end = of_queries[document + 1]
        for i in range(of_queries[document], end):
            aligned.append(i - end + of_keys[document + 1])
    return aligned


def document_of(boundaries: torch.Tensor, position: int) -> int:
    """Return the number of the document that a position lies in."""
    return sum(position >= start for start in boundaries.tolist()[1:])


def is_seen(case: Case, b: int, h: int, i: int, j: int, aligned: int) -> bool:
    """Say whether query i sees key j, option by option as the documentation has it."""
    options = case.options
    block_mask, window, step = (options.get(n) for n in ("block_mask", "window", "dilation"))
    causal = options.get("causal", block_mask is None)
    seen = not (causal and j > aligned)
    ahead, step = j - aligned, step or 1
    seen = seen and ahead % step == 0
    if isinstance(window, int):
        seen = seen and abs(ahead) < window * step
    elif window is not None:
        left, right = window
        seen = seen and (left == -1 or -ahead <= left * step)
        seen = seen and (right == -1 or ahead <= right * step)
    if "segment_ids" in options:
        value = options["segment_ids"]
        place = i if isinstance(value, tuple) else aligned
        mine, theirs = sides(value)
        seen = seen and bool(mine[b, place] == theirs[b, j])
    if "cu_seqlens" in options:
        mine, theirs = sides(options["cu_seqlens"])
        seen = seen and document_of(mine, i) == document_of(theirs, j)
    if block_mask is not None:
        seen = seen and bool(block_mask.mask_mod(*(torch.tensor(n) for n in (b, h, i, j))))
    return seen


def plain(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and log-sum-exp by the formula, one dense matrix per batch row and head."""
    aligned = alignment(case)
    options = case.options
    scale = options.get("scale", case.width**-0.5)
    outs: list[torch.Tensor] = []
    totals: list[torch.Tensor] = []
    for b in range(case.batch):
        for h in range(case.heads):
            g = h // (case.heads // case.groups)
            scores = scale * (q[b, h] @ k[b, g].T)
            if "softcap" in options:
                scores = options["softcap"] * torch.tanh(scores / options["softcap"])
            pairs = [
                [is_seen(case, b, h, i, j, aligned[i]) for j in range(case.keys)]
                for i in range(case.queries)
            ]
            if "alibi_slopes" in options:
                distance = torch.tensor(aligned)[:, None] - torch.arange(case.keys)
                scores = scores - options["alibi_slopes"][h].double() * distance.abs()
            # Not minus infinity: then rows that see nothing have no derivatives but NaN.
            weights = scores.exp() * torch.tensor(pairs)
            total = weights.sum(-1)
            if "sinks" in options:
                total = total + options["sinks"][h].exp()
            empty = total == 0.0
            total = total.masked_fill(empty, 1.0)
            outs.append((weights / total[:, None]) @ v[b, g])
            totals.append(total.log().masked_fill(empty, float("-inf")))
    shape = case.batch, case.heads, case.queries
    return torch.stack(outs).view(*shape, case.width), torch.stack(totals).view(shape)


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def objective(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Return a number that bends with everything; queries that see nothing count for nothing."""
    seen = lse.detach() > float("-inf")
    return (out + out.square()).sin().sum() + lse[seen].cos().sum()


def derivatives(call: Attention, tensors: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Return output, log-sum-exp, gradients, and Hessian-vector products along fixed directions."""
    generator = torch.Generator().manual_seed(9)
    out, lse = call(*tensors)
    found = {"out": out, "lse": lse}
    first = torch.autograd.grad(objective(out, lse), tensors, create_graph=True)
    along = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in tensors
    ]
    slope = sum(((x * y).sum() for x, y in zip(first, along, strict=True)), first[0].new_zeros(()))
    second = torch.autograd.grad(slope, tensors)
    names = ("q", "k", "v", "sinks")
    found |= {f"gradient of {name}": x for name, x in zip(names, first, strict=False)}
    found |= {f"HVP in {name}": x for name, x in zip(names, second, strict=False)}
    return {name: x.detach() for name, x in found.items()}


def assert_near(
    found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Compare everything, relative to the largest number of each."""
    for name, value in exact.items():
        scale = float(value[value.isfinite()].abs().max().clamp(min=1e-3))
        torch.testing.assert_close(
            found[name].double(), value, rtol=0, atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
