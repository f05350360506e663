"""Whether DeepSpeed is installed, in a version that is known; it is not loaded for the answer."""

import importlib.util
from importlib import metadata

from interlace.offload.deepspeed.names import Unserved, check_version
from interlace.trainer.errors import ConfigError

INSTALL = "type  pip install 'interlace[deepspeed]'"


def deepspeed_version() -> str | None:
    """Return the version of DeepSpeed that an import would load, or None where there is none."""
    if importlib.util.find_spec("deepspeed") is None:
        return None
    try:
        return metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        # A folder of this name that no installer knows is not DeepSpeed.
        return None


def why_no_deepspeed() -> str | None:
    """Return why DeepSpeed cannot be the engine of a run here, and what to type; None if it can."""
    version = deepspeed_version()
    if version is None:
        return f"deepspeed is not installed; {INSTALL}"
    try:
        check_version(version)
    except Unserved as reason:
        return f"{reason}; {INSTALL}"
    return None


def require_deepspeed() -> None:
    """Do nothing if a version that is known is installed.

    Raises:
        ConfigError: None is, or another.
    """
    if problem := why_no_deepspeed():
        raise ConfigError([f"parallel.engine=deepspeed: {problem}  or parallel.engine=fsdp2"])
