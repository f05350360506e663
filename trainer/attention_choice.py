"""Which back end a recipe's attention takes: the router's answer for the shapes it will be called
with.

The mixer asks the router anew at every call; here the same question is asked beforehand, for plans,
for `interlace doctor`, and to refuse a recipe that names a back end which cannot serve it.
"""

import torch

from interlace.kernels.attention.request import Request, architecture
from interlace.kernels.attention.router import FORCED_BY, Choice, choose
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.shapes import head_width, kv_heads


def training_request(config: RunConfig, device: torch.device, rows: int) -> Request:
    """Return what attention is asked in a training pass of `rows` rows on a device."""
    # parallel imports distributed torch, which the plan of a recipe does without until here.
    from interlace.trainer.parallel import compiles, compute_dtype_of

    model, length = config.model, config.data.sequence_length
    packed = config.data.respect_documents
    return Request(
        device=device.type,
        architecture=architecture(device),
        dtype=compute_dtype_of(config.train, device.type),
        batch=rows,
        heads=model.heads,
        groups=kv_heads(model),
        queries=length,
        keys=length,
        head_width=head_width(model),
        mask="packed" if packed else "causal",
        causal=True,
        extras=frozenset({"segments"} if packed else ()),
        order=1,
        needs_grad=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        compiling=compiles(config, device.type),
    )


def choice_for(config: RunConfig, device: torch.device, rows: int) -> Choice:
    """Return the back end of a recipe's attention on a device of this machine.

    Raises:
        ConfigError: The back end that the recipe or the environment names is unknown or cannot
            serve the recipe here.
    """
    named = config.model.attention_backend
    try:
        return choose(training_request(config, device, rows), named)
    except ValueError as error:
        # The router's message names the call's argument; here it was typed as a setting.
        said = str(error).removeprefix("attention: ")
        said = said.replace(f"backend={named!r}", f"model.attention_backend={named}", 1)
        said = said.replace(" cannot serve this call: ", ": cannot serve this recipe here: ")
        remedy = "model.attention_backend=auto" if named != "auto" else f"unset {FORCED_BY}"
        raise ConfigError([f"{said}; type {remedy}"]) from error


def check_attention(config: RunConfig, device: torch.device, rows: int) -> None:
    """Raise `ConfigError` if a recipe with attention names a back end that cannot serve it."""
    if "A" in config.model.pattern:
        choice_for(config, device, rows)


def attention_backend(config: RunConfig, device_type: str, rows: int) -> str:
    """Return the name of the back end that a plan counts with, also for a machine that is not this
    one: the recipe's, else the one that would be chosen.

    Of a GPU elsewhere only the kind of back end matters here: whether it is handed the whole mask.
    CUDA builds of torch bring Triton along, so it is not where the heads fit our kernels.
    """
    device = torch.device(device_type)
    if config.model.attention_backend != "auto" or "A" not in config.model.pattern:
        return config.model.attention_backend
    if device.type == "cuda" and not torch.cuda.is_available():
        request = training_request(config, device, rows)
        return "triton" if request.whole_mask and request.head_width <= 256 else "sdpa"
    return choice_for(config, device, rows).backend.name
