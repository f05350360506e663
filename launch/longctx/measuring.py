"""Prompts of growing length, read and continued: times in rounds, then memory and operators.

At every length all models take turns, in an order that turns round by round, so that whatever else
the machine does meets them alike. Prefill and decoding are timed apart: the time to the first token
is that of making the caches, reading the prompt and choosing a token; the time per token is the
mean over the tokens decoded after it. Logits are of the last position only, as decoding needs; the
memory of all logits, which a careless prefill makes, is measured beside it.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from interlace.launch.longctx.contenders import Contender
from interlace.launch.longctx.operators import marked, peak_bytes, profiling, shares
from interlace.offload.hardware import host_memory_bytes
from interlace.trainer.models.context import KeyValueCache
from interlace.trainer.models.model import Caches

OBSERVED_TOKENS = 8
"""Most decoded tokens whose operations are looked at: one alone is too short to go by."""

FULL_LOGITS_SHARE = 0.25
"""All logits are made only if they take no more than this share of the machine's memory."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at the peak of a pass.

    Attributes:
        weights: Parameters and buffers.
        kv_cache: Keys and values, with room for the tokens that follow.
        state: What recurrent blocks carry: states and the inputs of convolutions.
        logits: Logits, fp32, and in the compute dtype where that is another.
        other: The rest.
    """

    weights: int
    kv_cache: int
    state: int
    logits: int
    other: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.state + self.logits + self.other


@dataclass(frozen=True)
class Pass:
    """One kind of pass, at one length, of one model.

    Attributes:
        seconds: Of every round; per token for decoding.
        memory: At the peak.
        shares: Of the time, by kind of operation.
    """

    seconds: list[float]
    memory: Memory
    shares: dict[str, float]


@dataclass(frozen=True)
class Sample:
    """What one length costs one model; `full_logits` is None where they were not made."""

    name: str
    length: int
    prefill: Pass
    decode: Pass
    full_logits: Memory | None


@dataclass
class Times:
    """Seconds of every round so far: to the first token, and per token."""

    first: list[float] = field(default_factory=list[float])
    each: list[float] = field(default_factory=list[float])


@dataclass(frozen=True, kw_only=True)
class Session:
    """What to measure.

    Attributes:
        lengths: Of the prompts, in tokens, ascending.
        repeats: Rounds at every length.
        decode_tokens: Tokens decoded after each prompt.
        vocabulary: Entries.
        budget: Seconds; a length that would go beyond it is left out, unless it is the first.
        device: Where the models are.
    """

    lengths: tuple[int, ...]
    repeats: int
    decode_tokens: int
    vocabulary: int
    budget: float
    device: torch.device


@torch.no_grad()
def measure(
    found: Sequence[Contender], session: Session, progress: Callable[[int, int], None]
) -> list[Sample]:
    """Return a sample of every model at every length that the budget holds.

    Args:
        found: The models.
        session: What to measure.
        progress: Told of the rounds done and of those there are.
    """
    begun, samples = time.perf_counter(), list[Sample]()
    rounds, total = 0, len(session.lengths) * session.repeats
    for number, length in enumerate(session.lengths):
        started = time.perf_counter()
        prompt = prompt_of(length, session)
        gc.collect()
        # Once without a clock: buffers and kernels come into being.
        for each in found:
            timed(each, prompt, session, Times())
        now = time.perf_counter()
        if number and now - begun + (now - started) * (session.repeats + 3) > session.budget:
            break
        times = [Times() for _ in found]
        for turn in range(session.repeats):
            for place in range(len(found)):
                chosen = (place + turn) % len(found)
                timed(found[chosen], prompt, session, times[chosen])
            rounds += 1
            progress(rounds, total)
        samples += [weighed(*pair, prompt, session) for pair in zip(found, times, strict=True)]
    progress(total, total)
    return samples


def prompt_of(length: int, session: Session) -> torch.Tensor:
    """Return (1, T) tokens that are the same every time."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(session.vocabulary, (1, length), generator=generator).to(session.device)


def timed(each: Contender, prompt: torch.Tensor, session: Session, times: Times) -> None:
    """Read the prompt and decode, once; add both times."""
    synchronise(session.device)
    start = time.perf_counter()
    caches = each.model.new_caches(1, prompt.shape[1] + session.decode_tokens)
    token = prefill(each, prompt, caches)
    synchronise(session.device)
    middle = time.perf_counter()
    decode(each, token, caches, session.decode_tokens)
    synchronise(session.device)
    times.first.append(middle - start)
    times.each.append((time.perf_counter() - middle) / session.decode_tokens)


def prefill(each: Contender, prompt: torch.Tensor, caches: Caches) -> torch.Tensor:
    """Read a prompt; return the likeliest next token, (1, 1)."""
    return each.model.logits(prompt, caches, last_only=True)[:, -1:].argmax(-1)


def decode(each: Contender, token: torch.Tensor, caches: Caches, count: int) -> None:
    """Decode so many tokens after `token`, always the likeliest."""
    for _ in range(count):
        token = each.model.logits(token, caches, last_only=True)[:, -1:].argmax(-1)


def weighed(each: Contender, times: Times, prompt: torch.Tensor, session: Session) -> Sample:
    """Add memory and operators, in passes of their own that nobody times."""
    model, length = each.model, prompt.shape[1]
    room = length + session.decode_tokens
    caches = model.new_caches(1, room)
    token = prefill(each, prompt, caches)
    kv_cache, state = cache_bytes(caches)
    bare = Memory(weights=each.weight_bytes, kv_cache=kv_cache, state=state, logits=0, other=0)
    per_position = session.vocabulary * (4 + (0 if is_fp32(each) else model.compute_dtype.itemsize))
    # States are replaced by new ones; the old ones stay while they are watched.
    before = [vars(cache).copy() for layer in caches for cache in layer if cache is not None]
    count = min(session.decode_tokens, OBSERVED_TOKENS)
    decoding, decode_shares = observed(each, partial(decode, each, token, caches, count), session)
    del before
    prefilling, prefill_shares = observed(
        each, lambda: prefill(each, prompt, model.new_caches(1, room)), session
    )
    decoded = filled(bare, decoding + kv_cache + state, per_position)
    last_only = filled(bare, prefilling, per_position)
    return Sample(
        name=each.name,
        length=length,
        prefill=Pass(times.first, last_only, prefill_shares),
        decode=Pass(times.each, decoded, decode_shares),
        full_logits=all_logits(each, prompt, bare, per_position * length, session),
    )


def all_logits(
    each: Contender, prompt: torch.Tensor, bare: Memory, logits: int, session: Session
) -> Memory | None:
    """Return the peak of a prefill that makes the logits of every position, or None if they are
    too many to be made.
    """
    if logits > FULL_LOGITS_SHARE * machine_bytes(session.device):
        return None
    room = prompt.shape[1] + session.decode_tokens
    peak, _ = observed(
        each, lambda: each.model.logits(prompt, each.model.new_caches(1, room)), session
    )
    return filled(bare, peak, logits)


def filled(bare: Memory, allocated: int, logits: int) -> Memory:
    """Return the split of a peak: what is neither cache nor logits of the bytes allocated besides
    the weights is other. Logits that were gone at the peak count no more than there is.
    """
    rest = max(0, allocated - bare.kv_cache - bare.state)
    logits = min(logits, rest)
    return replace(bare, logits=logits, other=rest - logits)


def observed(
    each: Contender, action: Callable[[], object], session: Session
) -> tuple[int, dict[str, float]]:
    """Run an action; return the most bytes it had allocated at once, and shares of its time."""
    gc.collect()
    on_gpu = session.device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(session.device)
        before = torch.cuda.memory_allocated(session.device)
    with marked(each.model), profiling(session.device) as profiled:
        action()
        synchronise(session.device)
    if on_gpu:
        return torch.cuda.max_memory_allocated(session.device) - before, shares(profiled)
    return peak_bytes(profiled), shares(profiled)


def cache_bytes(caches: Caches) -> tuple[int, int]:
    """Return the bytes of keys and values, and of all other decoding state."""
    kv_cache = state = 0
    for cache in (cache for layer in caches for cache in layer if cache is not None):
        tensors = [value for value in vars(cache).values() if isinstance(value, torch.Tensor)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if isinstance(cache, KeyValueCache):
            kv_cache += size
        else:
            state += size
    return kv_cache, state


def is_fp32(each: Contender) -> bool:
    """Whether logits need no copy to be fp32."""
    return each.model.compute_dtype == torch.float32


def machine_bytes(device: torch.device) -> int:
    """Return the memory of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory_bytes()


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
