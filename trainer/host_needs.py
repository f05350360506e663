"""The host memory that a run is certain to take, held against what is left, before any is taken.

A process that takes more than there is is not told: the kernel kills it, minutes into the run and
with nothing said. So what is known exactly is added up first, of all ranks of this host: weights
and optimizer state, the copies that a checkpoint in the background may need, and the largest tensor
once more, which reading a checkpoint has beside its place. Activations are an estimate and are left
out; the plan warns of them.
"""

import os

import torch

from interlace.offload.memory import available_host_bytes
from interlace.trainer.capacity import GIB
from interlace.trainer.checkpoint.ledger import COPIED_SHARE
from interlace.trainer.config.parallel_checks import uses_zero
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import MemoryShort
from interlace.trainer.observe.units import human_bytes
from interlace.trainer.plan import Plan


def require_host_memory(config: RunConfig, plan: Plan) -> None:
    """Do nothing if the ranks of this host find the memory that they certainly need.

    Raises:
        MemoryShort: They do not; names what needs how much, and what to type.
    """
    needs = host_needs(config, plan)
    needed, ranks = sum(needs.values()), plan.ranks_per_host
    there = available_host_bytes()
    if needed * ranks <= there:
        return
    listed = ", ".join(f"{human_bytes(size)} {kind}" for kind, size in needs.items() if size)
    together = f", and of its {ranks} ranks {human_bytes(needed * ranks)}" if ranks > 1 else ""
    remedies: list[str] = []
    kept = config.offload.moments != "bfloat16" and config.offload.strategy != "none"
    if kept and not uses_zero(config):
        remedies.append("offload.moments=bfloat16")
    if needs["copies for checkpoints"]:
        remedies.append("checkpoint.asynchronous=false")
    raise MemoryShort(
        f"host memory: a rank of this run needs {human_bytes(needed)} ({listed})"
        f"{together}, and {human_bytes(there)} are left on {os.uname().nodename}; "
        f"type {', or '.join([*remedies, 'a smaller model.width'])}, or use more hosts"
    )


def host_needs(config: RunConfig, plan: Plan) -> dict[str, int]:
    """Return bytes of host memory by kind, of one rank."""
    device, host = plan.memory.device, plan.memory.host
    shared = plan.device_type != "cuda"
    state = host.total + (device.state if shared else 0)
    saved = plan.checkpoint_bytes // plan.world_size * plan.replicas
    checkpoint, copies = config.checkpoint, 0
    if checkpoint.asynchronous:
        asked = checkpoint.copy_budget_gib
        copies = int(COPIED_SHARE * saved if asked is None else min(asked * GIB, saved))
    weights = device.weights if shared else 0
    whole = plan.parameters * getattr(torch, plan.compute_dtype).itemsize
    return {
        "weights": weights,
        "the whole model until ZeRO has cut it": max(0, whole - weights)
        if uses_zero(config)
        else 0,
        "optimizer state": state,
        "copies for checkpoints": copies,
        "the largest tensor while a checkpoint is read": 4
        * plan.vocabulary_size
        * config.model.width,
    }
