"""DeepSpeed's own word on a user's settings: types and limits that no recipe knows of."""

import importlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from interlace.trainer.errors import ConfigError


def require_accepted(settings: Mapping[str, Any], file: str) -> None:
    """Do nothing if DeepSpeed, which is loaded, takes settings.

    Args:
        settings: What `engine_settings` returned.
        file: The user's own, as in `parallel.deepspeed_config`; without one, what DeepSpeed refuses
            is a defect of ours, and tells of itself when it starts.

    Raises:
        ConfigError: DeepSpeed refuses them.
    """
    if not file:
        return
    made = importlib.import_module("deepspeed.runtime.config").DeepSpeedConfig
    try:
        # Without a process group it takes itself to be alone, and multiplies anew.
        made({key: value for key, value in settings.items() if key != "train_batch_size"})
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, each['loc']))}={each['input']!r}: {each['msg']}"
            for each in error.errors()
        ]
        raise refused(file, "; ".join(problems)) from error
    # It checks by whatever comes to hand.
    except (ValueError, AssertionError, KeyError, TypeError, AttributeError) as error:
        raise refused(file, f"{type(error).__name__}: {error}") from error


def refused(file: str, said: str) -> ConfigError:
    """Return the error that tells what DeepSpeed said."""
    return ConfigError([f"parallel.deepspeed_config={file}: DeepSpeed refuses it: {said}; mend it"])
