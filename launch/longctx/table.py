"""The benchmark of long contexts as a page of text."""

from collections.abc import Sequence

from interlace.launch.longctx.comparison import (
    MEASURES,
    Lead,
    Measure,
    interval,
    leads,
    seconds_of,
)
from interlace.launch.longctx.contenders import Contender
from interlace.launch.longctx.measuring import Memory, Pass, Sample, Session
from interlace.launch.longctx.operators import KINDS
from interlace.launch.typeset import typeset
from interlace.trainer.observe.units import human_bytes, human_count, human_seconds

TITLES: dict[Measure, str] = {
    "first token": "Time to the first token",
    "each token": "Time per token after it",
}
MEMORY_KINDS = {
    "weights": "weights",
    "kv_cache": "KV cache",
    "state": "SSM and conv state",
    "logits": "logits",
    "other": "other",
    "total": "total",
}


def longctx_page(
    found: Sequence[Contender], samples: Sequence[Sample], session: Session, notes: Sequence[str]
) -> str:
    """Return the whole page."""
    lengths = sorted({sample.length for sample in samples})
    names = [each.name for each in found]
    lines = [*model_lines(found), "", *notes]
    lines.append(
        f"Batch 1, {session.vocabulary:,} entries, {session.decode_tokens} tokens decoded, "
        f"{session.repeats} rounds in turns; median, and where it lies."
    )
    for measure in MEASURES:
        lines += ["", TITLES[measure], *time_lines(samples, names, lengths, measure)]
    lines += ["", "Who is faster", *lead_lines(leads(samples), names)]
    lines += ["", *memory_lines(samples, names, lengths[-1])]
    lines += ["", *growth_lines(samples, names, lengths)]
    lines += ["", *share_lines(samples, names, [lengths[0], lengths[-1]])]
    left_out = [f"{length:,}" for length in session.lengths if length not in lengths]
    if left_out:
        lines += [
            "",
            f"Left out, for want of time: {', '.join(left_out)} tokens; give a higher "
            f"--budget than {session.budget:g} seconds.",
        ]
    return "\n".join(lines)


def model_lines(found: Sequence[Contender]) -> list[str]:
    """Who is compared."""
    rows = [
        [
            each.name,
            human_count(each.parameters),
            human_bytes(each.weight_bytes),
            f"{each.blocks}{', trained' if each.trained else ''}",
        ]
        for each in found
    ]
    return typeset(["Model", "parameters", "weights", "blocks"], rows, left=(0, 3))


def time_lines(
    samples: Sequence[Sample], names: Sequence[str], lengths: Sequence[int], measure: Measure
) -> list[str]:
    """A row for each length: median and interval of each model."""
    rows = [
        [
            f"  {length:,}",
            *(spread(seconds_of(sample_of(samples, name, length), measure)) for name in names),
        ]
        for length in lengths
    ]
    return typeset(["  tokens", *names], rows)


def spread(seconds: Sequence[float]) -> str:
    """Return a median and its interval: `12.3 ms (12.1 to 12.6)`."""
    found = interval(seconds)
    low, middle, high = (human_seconds(each) for each in (found.low, found.middle, found.high))
    unit = middle.split()[-1]
    return f"{middle} ({low.removesuffix(f' {unit}')} to {high.removesuffix(f' {unit}')})"


def lead_lines(found: Sequence[Lead], names: Sequence[str]) -> list[str]:
    """Say from where on which model is faster."""
    if len(names) == 1:
        return ["  there is nobody to compare with"]
    lines = [f"  {lead_words(lead)}" for lead in found]
    return lines or ["  nobody, beyond what rounds differ by"]


def lead_words(lead: Lead) -> str:
    """Return one lead in words."""
    ratio = lead.ratio
    where = "at all lengths" if lead.always else f"from {lead.length:,} tokens on"
    measure = "to the first token" if lead.measure == "first token" else "per token"
    return (
        f"{measure}, {lead.faster} is faster than {lead.slower} {where}: {ratio.middle:.2f} of the "
        f"time at {lead.length:,} ({ratio.low:.2f} to {ratio.high:.2f}, "
        f"{100 * ratio.confidence:.0f}%)"
    )


def memory_lines(samples: Sequence[Sample], names: Sequence[str], length: int) -> list[str]:
    """The split of memory at one length: prefill, decoding, and prefill with all logits."""
    chosen = [sample_of(samples, name, length) for name in names]
    head = [f"Memory at {length:,} tokens", *names]
    prefill = memory_rows([each.prefill.memory for each in chosen])
    decode = memory_rows([each.decode.memory for each in chosen])
    full = [
        ["    logits", *(size(each.full_logits and each.full_logits.logits) for each in chosen)],
        ["    total", *(size(each.full_logits and each.full_logits.total) for each in chosen)],
    ]
    rows = [
        ["  prefill, last logits only", *[""] * len(names)],
        *prefill,
        ["  decoding", *[""] * len(names)],
        *decode,
        ["  prefill, all logits", *[""] * len(names)],
        *full,
    ]
    return typeset(head, rows)


def memory_rows(memories: Sequence[Memory]) -> list[list[str]]:
    """A row for each kind that anyone has."""
    return [
        [f"    {title}", *(size(getattr(memory, kind)) for memory in memories)]
        for kind, title in MEMORY_KINDS.items()
        if any(getattr(memory, kind) for memory in memories)
    ]


def growth_lines(
    samples: Sequence[Sample], names: Sequence[str], lengths: Sequence[int]
) -> list[str]:
    """Memory of the prefill at every length."""
    rows = [
        [
            f"  {length:,}",
            *(size(sample_of(samples, name, length).prefill.memory.total) for name in names),
        ]
        for length in lengths
    ]
    return ["Memory of the prefill, last logits only", *typeset(["  tokens", *names], rows)]


def share_lines(
    samples: Sequence[Sample], names: Sequence[str], lengths: Sequence[int]
) -> list[str]:
    """Where the time goes, at some lengths."""
    rows: list[list[str]] = []
    for length in dict.fromkeys(lengths):
        for name in names:
            sample = sample_of(samples, name, length)
            for title, part in (("prefill", sample.prefill), ("decoding", sample.decode)):
                rows.append([f"  {name}, {title} at {length:,}", *percentages(part)])
    return typeset(["Where the time goes", *KINDS], rows)


def percentages(part: Pass) -> list[str]:
    """Return the shares of a pass in percent."""
    return [f"{100 * part.shares.get(kind, 0.0):.0f}%" for kind in KINDS]


def size(value: int | None) -> str:
    """Return a size, or a dash for nothing."""
    return human_bytes(value) if value else "-"


def sample_of(samples: Sequence[Sample], name: str, length: int) -> Sample:
    """Return the sample of one model at one length."""
    return next(each for each in samples if (each.name, each.length) == (name, length))
