"""`deepspeed.initialize` for a run: accelerator, process group, optimizer, JSON, attachment."""

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
from torch import nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage] - documented
from torch.nn import functional

from interlace.offload.deepspeed import Attachment, attach
from interlace.offload.hardware import HardwareProfile
from interlace.offload.options import OffloadOptions
from interlace.offload.schedule import MemoryBudget
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.engines.zero.accepted import require_accepted
from interlace.trainer.engines.zero.settings import engine_settings
from interlace.trainer.engines.zero.stages import require
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.model import Model
from interlace.trainer.mup.manifest import Manifest
from interlace.trainer.optimizer import parameter_groups
from interlace.trainer.plan import Plan
from interlace.trainer.rules import rule_of
from interlace.trainer.world import World

SETTINGS_NAME = "deepspeed.json"
"""In the run folder: what DeepSpeed was given."""


@dataclass(frozen=True)
class Opened:
    """DeepSpeed's engine for a run.

    Attributes:
        engine: What `deepspeed.initialize` returned.
        attachment: Our update in it; None where nothing is offloaded or it could not be.
        settings: What DeepSpeed was given.
        notes: What a person should know.
        end: Undoes what was begun; may be called again.
    """

    engine: Any
    attachment: Attachment | None
    settings: dict[str, Any]
    notes: Sequence[str]
    end: Callable[[], None]


def open_zero(
    model: Model,
    config: RunConfig,
    plan: Plan,
    hardware: HardwareProfile,
    manifest: Manifest,
    world: World,
) -> tuple[Opened, Sequence[str]]:
    """Return DeepSpeed's engine over a model, and the names of what its rule remembers.

    Raises:
        ConfigError: Settings conflict, DeepSpeed refuses them, or a tensor has blocks of rows with
            rates of their own.
    """
    settings = engine_settings(config, plan)
    require_whole_tensors(manifest)
    rule = rule_of(config)
    client = client_of(config, parameter_groups(model, rule.hyperparameters(), manifest))
    deepspeed = loaded(world)
    require_accepted(settings, config.parallel.deepspeed_config)
    require(deepspeed.utils.groups, ["_WORLD_GROUP"])
    with ExitStack() as undo:
        if join_alone(world):
            undo.callback(distributed.destroy_process_group)
        # Another run of this process has other groups, and DeepSpeed remembers its own.
        undo.callback(setattr, deepspeed.utils.groups, "_WORLD_GROUP", None)
        # ZeRO-3 puts a function of its own in its place, for the whole process.
        undo.callback(setattr, functional, "linear", functional.linear)
        deepspeed.init_distributed(verbose=False)
        if config.parallel.zero_stage == 3:
            under_way = modules_under_way()
            undo.callback(under_way.__delitem__, slice(len(under_way), None))
            undo.callback(forget_releases)
            gather_by_layers(deepspeed, model)
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=client, config=settings, dist_init_required=False
        )
        undo.callback(engine.destroy)
        attachment, notes = attached(engine, config, plan, hardware)
        # Until here whatever fails undoes what came before it.
        end = undo.pop_all().close
    return Opened(engine, attachment, settings, notes, end), rule.moments


def loaded(world: World) -> Any:
    """Return the package deepspeed, told which device it computes on, and quiet.

    Raises:
        ConfigError: It computes on another kind of device, as the environment or whoever loaded it
            first has it.
    """
    asked = os.environ.get("DS_ACCELERATOR")
    if asked:
        # A kind that is not there, or that it does not know, would keep it from being imported.
        require_device(asked, asked, world)
    elif world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", str(world.device.index or 0))
    deepspeed = importlib.import_module("deepspeed")
    require_device(deepspeed.accelerator.get_accelerator().device_name(), asked, world)
    # It sets the level of its own logger when it is loaded.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if world.device.type == "cpu":
        # Collectives for inference: it would compile them for minutes before it trains, with a
        # compiler that there may not be, or wait for the lock of a start that was killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Torch renames collectives that DeepSpeed calls in every step.
    renamed = r"`torch\.distributed\.\w+` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    return deepspeed


def require_device(device: str, asked: str | None, world: World) -> None:
    """Do nothing if DeepSpeed computes on the kind of device that the run has.

    Args:
        device: What it computes on.
        asked: What the environment says, if anything.
        world: This rank.

    Raises:
        ConfigError: It is another kind.
    """
    if device != world.device.type:
        remedy = "unset DS_ACCELERATOR" if asked else f"export DS_ACCELERATOR={world.device.type}"
        raise ConfigError(
            [
                f"parallel.engine=deepspeed: DeepSpeed computes on {device} in this process "
                f"(DS_ACCELERATOR={asked or 'not set'}), and the run on {world.device.type}; start "
                f"again after  {remedy}"
            ]
        )


def join_alone(world: World) -> bool:
    """Make a process group of one rank where there is none, which DeepSpeed wants; return whether
    it was made.
    """
    if distributed.is_initialized():
        return False
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return True


def modules_under_way() -> list[nn.Module]:
    """Return ZeRO-3's list of the modules whose forward is under way, one for the whole process.
    Below them it keeps every model for ever, and with it engine, state and threads.
    """
    owner = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
    require(owner, ["FWD_MODULE_STACK"])
    return owner.FWD_MODULE_STACK


def forget_releases() -> None:
    """Empty the cache, one for the whole process, of what ZeRO-3 releases after each module: its
    keys are the modules of all models that there were.
    """
    name = "deepspeed.runtime.zero.partitioned_param_coordinator"
    owner = importlib.import_module(name).PartitionedParameterCoordinator
    for function in vars(owner).values():
        # What caches is inside the functions that DeepSpeed puts around it.
        for cell in getattr(function, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def gather_by_layers(deepspeed: Any, model: Model) -> None:
    """Let ZeRO-3 gather a whole layer at a time, as FSDP2 does: modules inside a layer use each
    other's weights, and what is recomputed runs inside its forward.
    """
    for unit in model.units:
        deepspeed.utils.set_z3_leaf_module(unit, True)
        unit.register_forward_pre_hook(with_gradient)


def with_gradient(unit: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Have the input of a layer differentiated: ZeRO-3 learns from its gradient, when it comes,
    that those of the layer's weights are complete. Before frozen weights there would be none.
    """
    x, *others = given
    if torch.is_grad_enabled() and not x.requires_grad:
        x = x.detach().requires_grad_()
    return (x, *others)


def require_whole_tensors(manifest: Manifest) -> None:
    """Do nothing if muP gives every tensor one rate.

    Raises:
        ConfigError: Rows of a tensor have rates of their own.
    """
    if any(len(entries) > 1 for entries in manifest.by_name.values()):
        raise ConfigError(
            [
                "mup.enabled=true: some tensors of this model have blocks of rows that scale in "
                "different ways, and parallel.engine=deepspeed has one rate per tensor; type "
                "parallel.engine=fsdp2"
            ]
        )


def client_of(config: RunConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimizer of torch that a recipe's rule is."""
    hyper = dict(rule_of(config).hyperparameters())
    make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.optimizer.rule]
    return make(groups, **hyper)


def attached(
    engine: Any, config: RunConfig, plan: Plan, hardware: HardwareProfile
) -> tuple[Attachment | None, list[str]]:
    """Attach our update where the recipe offloads; return what speaks against it as notes."""
    offload, placement = config.offload, plan.offload
    if offload.strategy == "none":
        return None, []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        attachment = attach(
            engine,
            strategy=offload.strategy,
            budget=MemoryBudget(placement.device_budget_bytes, placement.host_budget_bytes),
            profile=hardware,
            options=OffloadOptions(
                stride=offload.stride,
                subgroup_elements=offload.subgroup_elements,
                staging_slots=offload.staging_slots,
                cpu_threads=offload.cpu_threads,
                recalibrate=offload.recalibrate and offload.strategy == "optimal",
            ),
        )
    return attachment, [str(each.message) for each in said if each.category is UserWarning]
