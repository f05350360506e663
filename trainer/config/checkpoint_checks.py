"""Checks of the `[checkpoint]` table that need more than the schema; each returns None or one
message with key, value, reason and remedy, as those in `checks`.
"""

from interlace.trainer.config.schema import RunConfig


def kept_steps_are_saved(config: RunConfig) -> str | None:
    """Multiples of a step can stay only where multiples are saved."""
    settings = config.checkpoint
    if settings.every == "steps" or not settings.keep_every_steps:
        return None
    return (
        f"checkpoint.keep_every_steps={settings.keep_every_steps}: checkpoint.every=auto saves "
        "when the time has come, at a multiple of that only by chance, so none would stay for "
        "good; type checkpoint.keep_every_steps=0 or checkpoint.every=steps"
    )
