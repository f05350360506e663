"""Checks of the `[guard]` table together with the rest of a recipe; each returns None or one
message with key, value, reason and remedy, as those in `checks`.
"""

from interlace.trainer.config.schema import RunConfig


def spikes_are_known_in_time(config: RunConfig) -> str | None:
    """Whether a step is a spike depends on the norm of all gradients."""
    sigmas = config.guard.spike_sigmas
    if not sigmas or config.offload.overlap != "backward":
        return None
    return (
        f"guard.spike_sigmas={sigmas}: whether a step is a spike is known after backward only, and "
        "offload.overlap=backward starts updates before; type offload.overlap=forward or "
        "guard.spike_sigmas=0"
    )
