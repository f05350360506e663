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


def host_state_exists(config: RunConfig) -> str | None:
    """State that is on the device is not checked."""
    every = config.guard.check_state_every_steps
    if not every or config.offload.strategy != "none":
        return None
    return (
        f"guard.check_state_every_steps={every}: offload.strategy=none keeps no state on the host; "
        "type guard.check_state_every_steps=0 or another offload.strategy"
    )
