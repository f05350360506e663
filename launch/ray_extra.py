"""Whether the extra that brings Ray is installed."""

import importlib.util

from interlace.trainer.errors import ConfigError


def require_ray(asked: str, instead: str) -> None:
    """Do nothing if Ray's libraries for training and tuning are installed.

    Args:
        asked: The words that ask for Ray.
        instead: What to type where there is none.

    Raises:
        ConfigError: They are not.
    """
    missing = [name for name in ("ray", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            [
                f"{asked}: {' and '.join(missing)} cannot be imported; type  "
                f"pip install 'interlace[ray]'  or {instead}"
            ]
        )
