"""Where a run happened: versions, processor, memory, source revision. No environment variables."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import interlace
from interlace.offload.hardware import host_memory_bytes
from interlace.trainer.plan import Plan
from interlace.trainer.source_digest import source_digest

LIBRARIES = ("torch", "triton", "numba", "numpy", "safetensors", "datasets", "tokenizers")


def describe_environment(plan: Plan, own_settings: str = "") -> dict[str, object]:
    """Return what `environment.json` holds of a run with this plan.

    Args:
        plan: The plan.
        own_settings: A digest of the user's own settings of DeepSpeed; empty without any.
    """
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "interlace": interlace.__version__,
        "revision": source_revision(),
        "sources": source_digest()[:12],
        "python": platform.python_version(),
        "libraries": {name: version_of(name) for name in LIBRARIES},
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "host_memory_bytes": host_memory_bytes(),
        "gpus": gpus,
        "world_size": plan.world_size,
        "engine": engine_in_full(plan, own_settings),
    }


def engine_in_full(plan: Plan, own_settings: str) -> str:
    """Return the name of a run's engine, with all that changes how it rounds."""
    if plan.zero_stage is None:
        return plan.engine
    updates = "torch's update" if plan.offload.strategy == "none" else "our update"
    whole = f"DeepSpeed {version_of('deepspeed')}, ZeRO stage {plan.zero_stage}, {updates}"
    return f"{whole}, own settings {own_settings}" if own_settings else whole


def version_of(name: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """Return the model name of the CPU."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def source_revision() -> str | None:
    """Return the git revision of the source tree, `-dirty` if it has changes; None outside a
    checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
