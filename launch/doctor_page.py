"""`interlace doctor`: what this machine has, and which back end attention takes on it, in words.

Only this machine is spoken of; what a recipe would do on another one, `interlace plan --hardware`
predicts.
"""

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch

from interlace.kernels.attention.backends import BACKENDS
from interlace.kernels.attention.flash_attn import missing
from interlace.kernels.attention.measurements import rows_of, user_path
from interlace.kernels.attention.request import Request, architecture
from interlace.kernels.attention.router import FORCED_BY
from interlace.kernels.triton_language import why_no_triton
from interlace.launch.doctor_host import Cores, core_lines
from interlace.offload.cores import usable_cores
from interlace.trainer.attention_choice import choice_for
from interlace.trainer.config import RunConfig
from interlace.trainer.config.load import Recipe
from interlace.trainer.engines.zero.installed import deepspeed_version, why_no_deepspeed
from interlace.trainer.plan import microbatch_rows

WIDTH = 100


@dataclass(frozen=True)
class Machine:
    """What there is to compute with.

    Attributes:
        devices: Each in words.
        torch: Version.
        triton: Version, or None.
        triton_problem: Why the Triton kernels do not run here and what to type; None if they do.
        flash_attn_problem: Likewise for Dao-AILab's package.
        deepspeed: Version, or None.
        deepspeed_problem: Likewise for DeepSpeed as the engine of a run.
        measured: Where measured times of attention come from.
    """

    devices: tuple[str, ...]
    torch: str
    triton: str | None
    triton_problem: str | None
    flash_attn_problem: str | None
    deepspeed: str | None
    deepspeed_problem: str | None
    measured: tuple[str, ...]


class Attention(TypedDict):
    """What a recipe asks of attention, and who serves it."""

    request: dict[str, str | int | bool | list[str]]
    backend: str
    what: str
    reasons: list[str]
    others: dict[str, str]


def machine() -> Machine:
    """Look at this machine."""
    on_gpu = torch.cuda.is_available()
    problem = why_no_triton()
    version = None
    if problem is None:
        import triton

        version = str(triton.__version__)
        if not on_gpu:
            problem = "there is no GPU that torch can use" + why_no_gpu()
    return Machine(
        devices=tuple(devices()),
        torch=torch.__version__,
        triton=version,
        triton_problem=problem,
        flash_attn_problem=missing() if on_gpu else "there is no GPU that torch can use",
        deepspeed=deepspeed_version(),
        deepspeed_problem=why_no_deepspeed(),
        measured=tuple(tables()),
    )


def devices() -> list[str]:
    """Return every device in words."""
    found = [
        f"cuda:{n}  {torch.cuda.get_device_name(n)} ({architecture(torch.device('cuda', n))})"
        for n in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    return [*found, f"cpu  {len(usable_cores())} cores, {torch.get_num_threads()} threads"]


def why_no_gpu() -> str:
    """Return a hint where this build of torch could not use a GPU if there was one."""
    if torch.version.cuda is None:
        return (
            "; this build of torch has no CUDA: on a machine with a GPU type  "
            "pip install --force-reinstall 'torch>=2.11,<2.14'"
        )
    return ""


def tables() -> list[str]:
    """Return where measured times of attention on this machine come from."""
    name = architecture(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    own, shipped, problem = rows_of(name)
    lines = [f"{len(shipped)} cells of {name} ship with the project"]
    if own:
        lines.insert(0, f"{len(own)} cells of {name} in {user_path(name)}, which win")
    if problem is not None:
        lines.insert(0, f"not counted: {problem}")
    return lines


def attention_of(config: RunConfig) -> Attention | None:
    """Return what a recipe asks of attention on this machine and who serves it; None if it has no
    attention.

    Raises:
        ConfigError: The back end that is named cannot serve the recipe here.
    """
    if "A" not in config.model.pattern:
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks_rows = config.train.tokens_per_step // config.data.sequence_length
    choice = choice_for(config, device, microbatch_rows(config, ranks_rows))
    return Attention(
        request=described(choice.request),
        backend=choice.backend.name,
        what=choice.backend.what,
        reasons=list(choice.reasons()),
        others=choice.others(),
    )


def described(request: Request) -> dict[str, str | int | bool | list[str]]:
    """Return a request as plain values."""
    return {
        "device": request.device,
        "architecture": request.architecture,
        "dtype": str(request.dtype).removeprefix("torch."),
        "batch": request.batch,
        "heads": request.heads,
        "kv_heads": request.groups,
        "length": request.keys,
        "head_width": request.head_width,
        "mask": request.mask,
        "order": request.order,
        "deterministic": request.deterministic,
        "compiled": request.compiling,
    }


def doctor_page(
    found: Machine,
    cores: Cores,
    warnings: Sequence[str],
    recipe: Recipe | None,
    attention: Attention | None,
) -> str:
    """Return the page."""
    lines = ["This machine"]
    for number, device in enumerate(found.devices):
        lines += entry("devices" if number == 0 else "", device)
    lines += entry("torch", found.torch)
    lines += entry("Triton", usable(found.triton_problem, found.triton))
    lines += entry("flash-attn", usable(found.flash_attn_problem))
    lines += entry("DeepSpeed", usable(found.deepspeed_problem, found.deepspeed))
    for number, text in enumerate(found.measured):
        lines += entry("measured attention" if number == 0 else "", text)
    if os.environ.get(FORCED_BY):
        lines += entry(FORCED_BY, os.environ[FORCED_BY])
    for label, text in core_lines(cores):
        lines += entry(label, text)
    for number, text in enumerate(warnings):
        lines += entry("safety" if number == 0 else "", text)
    if recipe is not None:
        lines += ["", f"Attention of {recipe.name}"]
        lines += ["  it has none"] if attention is None else attention_lines(attention)
    return "\n".join(lines)


def usable(problem: str | None, version: str | None = None) -> str:
    """Return in words whether something can be used, and its version if that is known."""
    words = "usable" if problem is None else f"not usable: {problem}"
    return f"{version}, {words}" if version else words


def attention_lines(attention: Attention) -> list[str]:
    """Return what is asked, who serves it, and why nobody else."""
    asked = attention["request"]
    where = {"packed": "causal, inside documents (packed)"}.get(str(asked["mask"]), asked["mask"])
    lines = entry(
        "asked",
        f"{asked['batch']} rows of {asked['length']}, {asked['heads']} heads "
        f"({asked['kv_heads']} of keys) {asked['head_width']} wide, {asked['dtype']} on "
        f"{asked['device']}" + (", compiled" if asked["compiled"] else ""),
    )
    lines += entry("mask", str(where))
    strict = ", deterministic" if asked["deterministic"] else ""
    lines += entry("derivatives", f"order {asked['order']}{strict}")
    lines += entry("choice", f"{attention['backend']}: {attention['what']}")
    for number, reason in enumerate(attention["reasons"]):
        lines += entry("because" if number == 0 else "", reason)
    for number, name in enumerate(name for name in BACKENDS if name in attention["others"]):
        lines += entry("not" if number == 0 else "", f"{name}: {attention['others'][name]}")
    return lines


def entry(label: str, text: str) -> list[str]:
    """Return a label and a text beside it, wrapped."""
    lines = textwrap.wrap(text, WIDTH - 23, break_long_words=False, break_on_hyphens=False) or [""]
    return [
        f"  {label if number == 0 else '':<20} {line}".rstrip() for number, line in enumerate(lines)
    ]
