"""How one model is spread over several ranks, recomputed and compiled: FSDP2, HSDP, checkpointing.

One process trains the plain module, unwrapped. With several ranks every layer and the root become
FSDP2 units (`fully_shard`, Zhao et al. 2023, arXiv 2304.11277): parameters, gradients and optimizer
state are sharded along their first dimension, or, with `parallel.replicas` above 1, sharded inside
groups of ranks and replicated between them (HSDP). Layers keep their names, so checkpoints look
alike in every case.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from interlace.trainer.config.parallel_checks import uses_zero
from interlace.trainer.config.schema import RunConfig, TrainSection
from interlace.trainer.objectives import OBJECTIVES
from interlace.trainer.world import World

LayerForward = Callable[..., torch.Tensor]

EXPENSIVE_OPERATIONS = (
    "mm",
    "addmm",
    "bmm",
    "_grouped_mm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "attention_forward",
)
"""Matrix products and attention, torch's and ours: what selective checkpointing keeps instead of
recomputing.
"""


def recompute_layers(layers: Sequence[nn.Module], mode: str) -> None:
    """Apply activation checkpointing to every layer: `none`, `block` or `selective`."""
    if mode == "none":
        return
    for layer in layers:
        replace_forward(layer, partial(checkpointed, mode == "selective"))


def checkpointed(selective: bool, forward: LayerForward) -> LayerForward:
    """Return `forward` that keeps its inputs (and, if selective, its expensive results) only."""
    if not selective:
        return partial(checkpoint, forward, use_reentrant=False)
    return partial(checkpoint, forward, use_reentrant=False, context_fn=keep_expensive)


def keep_expensive() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Return the contexts under which only cheap operations are recomputed."""
    operations = [
        getattr(namespace, name).default
        for namespace in (torch.ops.aten, torch.ops.interlace)
        for name in EXPENSIVE_OPERATIONS
        if hasattr(namespace, name)
    ]

    def policy(_: object, operation: object, *__: object, **___: object) -> CheckpointPolicy:
        kept = operation in operations
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    # torch insists on as many calls of an operation as in forward, and the hooks of a unit inside a
    # layer (`modules_in_fp32`) label more in backward.
    labels = torch.ops.profiler
    SAC_IGNORED_OPS.add(labels._record_function_enter_new.default)
    SAC_IGNORED_OPS.add(labels._record_function_exit._RecordFunction)
    return create_selective_checkpoint_contexts(policy)


def compile_layers(layers: Sequence[nn.Module]) -> None:
    """Compile every layer on its own: one graph serves all of them, and FSDP2's hooks stay
    outside.
    """
    for layer in layers:
        replace_forward(layer, torch.compile)


def replace_forward(layer: nn.Module, wrap: Callable[[LayerForward], LayerForward]) -> None:
    """Wrap a layer's forward in place, so that parameter names and module hooks stay as they
    are.
    """
    object.__setattr__(layer, "forward", wrap(layer.forward))


def shard(
    model: nn.Module,
    layers: Sequence[nn.Module],
    world: World,
    replicas: int,
    compute_dtype: torch.dtype,
) -> None:
    """Turn the layers and the model into FSDP2 units over all ranks; nothing for one rank."""
    if world.size == 1:
        return
    if replicas == 1:
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(
            world.device.type,
            (replicas, world.size // replicas),
            mesh_dim_names=("replicate", "shard"),
        )
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in layers:
        for kept in modules_in_fp32(layer):
            exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
            fully_shard(kept, mesh=mesh, mp_policy=exact)
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    # The root too is resharded after a forward pass: a validation has no backward to do it.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Give all weights the compute dtype, but for those of modules that say `keeps_fp32`."""
    kept = {id(parameter) for module in modules_in_fp32(model) for parameter in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)


def modules_in_fp32(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose few parameters stay in fp32 whatever the compute dtype."""
    return [module for module in model.modules() if getattr(module, "keeps_fp32", False)]


def compute_dtype_of(settings: TrainSection, device_type: str) -> torch.dtype:
    """Return the precision of activations: as asked, else bfloat16 on a GPU and float32 on a
    CPU.
    """
    if settings.compute_dtype == "auto":
        return torch.bfloat16 if device_type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.compute_dtype]


def compiles(config: RunConfig, device_type: str) -> bool:
    """Return whether layers are compiled: as asked, else on a GPU only, if the objective allows;
    under ZeRO-3 only as asked, since nobody has measured whether it pays there.
    """
    if config.train.compile is not None:
        return config.train.compile
    if uses_zero(config) and config.parallel.zero_stage == 3:
        return False
    return device_type == "cuda" and OBJECTIVES.get(config.train.objective).compiles
