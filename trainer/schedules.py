"""Learning rate schedules: pure functions of the step, so that a resumed run has nothing to
restore.

Step `s` counts from 0; warm-up reaches the peak at step `warmup_steps`. Sources: cosine (Loshchilov
and Hutter 2017), warm-up-stable-decay (Hu et al. 2024, MiniCPM, section 4).
"""

import math

from interlace.trainer.config.schema import OptimizerSection


def learning_rate(step: int, steps: int, optimizer: OptimizerSection) -> float:
    """Return the learning rate of update `step` (from 0) in a run of `steps`."""
    return optimizer.peak_lr * factor(step, steps, optimizer)


def factor(step: int, steps: int, optimizer: OptimizerSection) -> float:
    """Return the share of the peak learning rate at `step`.

    In a run too short for its warm-up the lower of warm-up and schedule counts.
    """
    warmup = min(1.0, (step + 1) / (optimizer.warmup_steps + 1))
    match optimizer.schedule:
        case "constant":
            return warmup
        case "cosine":
            return min(warmup, cosine(step, steps, optimizer))
        case "wsd":
            return min(warmup, stable_then_decay(step, steps, optimizer))


def cosine(step: int, steps: int, optimizer: OptimizerSection) -> float:
    """Half a cosine from 1 down to `final_lr_fraction`, reached with the last step's end."""
    span = max(1, steps - optimizer.warmup_steps)
    progress = min(1.0, max(0, step - optimizer.warmup_steps) / span)
    floor = optimizer.final_lr_fraction
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def stable_then_decay(step: int, steps: int, optimizer: OptimizerSection) -> float:
    """1, then a line down to `final_lr_fraction` over the last `decay_fraction` of the steps."""
    span = round(optimizer.decay_fraction * steps)
    remaining = steps - step
    if span == 0 or remaining >= span:
        return 1.0
    floor = optimizer.final_lr_fraction
    return floor + (1.0 - floor) * max(0, remaining) / span
