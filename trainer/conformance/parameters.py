"""Names, starts and the way through a checkpoint of a mixer's parameters and buffers."""

from typing import cast, get_args

import torch
from safetensors.torch import load, save
from torch import nn

from interlace.trainer.conformance.outcome import Outcome, exempt, judged
from interlace.trainer.conformance.subject import Subject, distance, forward
from interlace.trainer.models.model import Balances
from interlace.trainer.models.registry import Fused, Role, Traits, registered_letters

SAME = 1e-5
"""Share of the largest value by which doubled weights may miss doubled results."""


def declarations(subject: Subject) -> Outcome:
    """Letter, name and traits can be told apart and read."""
    wrong: list[str] = []
    name, letters = subject.name, registered_letters()
    if not (name.isidentifier() and name == name.lower()):
        wrong.append(f"the name {name!r} is not one lower-case word")
    others = [letter for letter, known in letters.items() if known == name]
    if len(others) > 1:
        wrong.append(f"the name {name!r} stands for {', '.join(sorted(others))}")
    traits: object = getattr(subject.kind, "traits", None)
    if not isinstance(traits, Traits):
        wrong.append("there is no `traits = Traits(...)` on the class")
    elif not (traits.order == "any" or traits.order >= 1):
        wrong.append(f"traits.order={traits.order} is neither 1 or more nor 'any'")
    return judged(
        not wrong,
        "; ".join(wrong) or f"{subject.letter}, {name}",
        "one letter, one word, traits",
        'register with @sequence_mixer("X", "one_word") or @channel_mixer, and declare traits',
    )


def roles(subject: Subject) -> Outcome:
    """Every parameter has a role, and nothing else has."""
    shapes = {name: value.ndim for name, value in subject.empty().named_parameters()}
    declared = dict(subject.kind.roles(subject.config))
    wrong = [f"{name} has none" for name in shapes if name not in declared]
    wrong += [f"{name} is no parameter" for name in declared if name not in shapes]
    known = get_args(Role)
    wrong += [
        f"{name}={role} is none of {known}" for name, role in declared.items() if role not in known
    ]
    wrong += [
        f"{name} is {declared[name]} but no matrix"
        for name, dimensions in shapes.items()
        if dimensions < 2 and declared.get(name, "vector") != "vector"
    ]
    return judged(
        not wrong,
        "; ".join(wrong) or f"{len(shapes)} parameters",
        "one role each",
        "roles(config) names exactly the parameters that the module has at this config: `hidden` "
        "for a matrix between widths, `residual` for one that writes into the residual stream, "
        "`readout` from the width to a fixed number, else `vector`",
    )


def row_blocks(subject: Subject) -> Outcome:
    """The parts of a tensor whose rows are several things have names of their own, and cover it."""
    kind = subject.kind
    if not isinstance(kind, Fused):
        return exempt("no tensor of it is declared to be several things side by side")
    shapes = {name: tuple(value.shape) for name, value in subject.empty().named_parameters()}
    wrong: list[str] = []
    for name, blocks in kind.row_blocks(subject.config).items():
        names, counts = [each for each, _ in blocks], [rows for _, rows in blocks]
        if name not in shapes:
            wrong.append(f"{name} is no parameter")
        elif sum(counts) != shapes[name][0]:
            wrong.append(f"{name} has {shapes[name][0]} rows, and its parts {sum(counts)}")
        wrong += [f"{name}[{each}] has {rows} rows" for each, rows in blocks if rows < 1]
        wrong += [f"{name}[{each}] is there twice" for each in names if names.count(each) > 1]
    return judged(
        not wrong,
        "; ".join(dict.fromkeys(wrong)) or "all rows, each once",
        "all rows, each once",
        "row_blocks(config) lists name and number of rows of every part, from the first row, at "
        "this config and at every other width",
    )


@torch.no_grad()
def residual(subject: Subject) -> Outcome:
    """What is declared to write into the residual stream, and nothing else, scales the output."""
    names = [
        name for name, role in subject.kind.roles(subject.config).items() if role == "residual"
    ]
    if not names:
        return exempt("no parameter of it is declared to write into the residual stream")
    module, x = subject.module(), subject.rows(2)
    expected = 2.0 * forward(module, x, subject.context(x))
    for name in names:
        module.get_parameter(name).mul_(2.0)
    off = distance(forward(module, x, subject.context(x)), expected)
    return judged(
        off <= SAME,
        f"{off:.1e} off when {', '.join(names)} are doubled",
        f"the double, within {SAME:.0e}",
        "muP puts a block's multiplier into these weights when it is exported: `residual` is the "
        "role of the last matrix, behind which nothing is added",
    )


def initial_values(subject: Subject) -> Outcome:
    """Every parameter and buffer has a start, decided by the generator it is handed and by nothing
    else.
    """
    module = subject.empty()
    wrong: list[str] = []
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        found = [start_of(subject, name, tuple(tensor.shape), seed) for seed in (1, 2)]
        first = found[0]
        if first.shape != tensor.shape or first.dtype is not torch.float32:
            wrong.append(f"{name} starts as {first.dtype} {tuple(first.shape)}")
        elif not bool(torch.isfinite(first).all()):
            wrong.append(f"{name} starts with numbers that are not finite")
        elif not torch.equal(*found):
            wrong.append(f"{name} starts differently each time")
    return judged(
        not wrong,
        "; ".join(wrong) or "fp32, finite, equal bits",
        "all of them",
        "initial_value(name, shape, config, generator) returns an fp32 tensor of that shape for "
        "every parameter and buffer; pass `generator=generator` to all that draws",
    )


def start_of(subject: Subject, name: str, shape: tuple[int, ...], global_seed: int) -> torch.Tensor:
    """Return an initial value, torch's global generator seeded; it is put back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(global_seed)
        generator = torch.Generator().manual_seed(0)
        return subject.kind.initial_value(name, shape, subject.config, generator)


def checkpoint(subject: Subject) -> Outcome:
    """What a checkpoint saves is all there is: a fresh module goes on with the same bits."""
    module, x = subject.module(), subject.rows(2)
    with torch.no_grad():
        forward(module, x, subject.context(x))
    if isinstance(module, Balances):
        mixed = module(x, subject.context(x))
        cast(Balances, module).balance(mixed.load.double())
    saved = load(save({name: value.contiguous() for name, value in tensors_of(module).items()}))
    fresh = subject.empty()
    missing = sorted(set(tensors_of(fresh)) ^ set(saved))
    if missing:
        return judged(False, f"differ: {', '.join(missing)}", "equal names", ADVICE)
    with torch.no_grad():
        for name, tensor in tensors_of(fresh).items():
            tensor.copy_(saved[name])
        expected = forward(module, x, subject.context(x))
        found = forward(fresh, x, subject.context(x))
    wrong = [
        name
        for name, tensor in tensors_of(fresh).items()
        if not torch.equal(tensor, tensors_of(module)[name])
    ]
    if not torch.equal(found, expected):
        wrong.append("the output")
    return judged(
        not wrong,
        f"differ: {', '.join(wrong)}" if wrong else f"{len(saved)} tensors, equal output",
        "equal bits",
        ADVICE,
    )


ADVICE = (
    "what decides the output must be a parameter or a buffer, or follow from the config: look for "
    "plain attributes that are drawn or that change"
)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds: parameters and buffers."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
