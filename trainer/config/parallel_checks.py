"""What DeepSpeed's ZeRO does not do as the engine of a run; each check returns None or one message
with key, value, reason and remedy, as those in `checks`.

Its settings mean nothing to another engine, and it steps an optimizer of torch over flat partitions
of its own: what our optimizer offers beyond that is refused here, before anything is loaded.
"""

from interlace.trainer.config.clip_checks import clip_stage, clips_coordinates
from interlace.trainer.config.schema import RunConfig

ZERO_RULES = ("adamw", "sgd")
"""Rules that torch.optim has too, with the same arithmetic."""

DIAGNOSTICS_OF_OUR_OPTIMIZER = ("clip_fraction", "directional_sharpness", "critical_sharpness")
"""Built-in diagnostics that read or try updates of ours."""

OTHERWISE = "or parallel.engine=fsdp2"


def uses_zero(config: RunConfig) -> bool:
    """Whether DeepSpeed's ZeRO spreads the model."""
    return config.parallel.engine == "deepspeed"


def zero_stage_has_its_engine(config: RunConfig) -> str | None:
    """A stage means something to ZeRO."""
    stage = config.parallel.zero_stage
    if uses_zero(config) or stage == 3:
        return None
    return (
        f"parallel.zero_stage={stage}: parallel.engine={config.parallel.engine} does not use it; "
        "type parallel.engine=deepspeed or parallel.zero_stage=3"
    )


def deepspeed_config_has_its_engine(config: RunConfig) -> str | None:
    """Settings of DeepSpeed mean something to DeepSpeed."""
    file = config.parallel.deepspeed_config
    if uses_zero(config) or not file:
        return None
    return (
        f"parallel.deepspeed_config={file}: parallel.engine={config.parallel.engine} does not "
        "read it; type parallel.engine=deepspeed, or parallel.deepspeed_config= for none"
    )


def zero_has_no_replicas(config: RunConfig) -> str | None:
    """ZeRO divides among all ranks."""
    replicas = config.parallel.replicas
    if not uses_zero(config) or replicas == 1:
        return None
    return (
        f"parallel.replicas={replicas}: parallel.engine=deepspeed divides among all ranks; type "
        f"parallel.replicas=1 {OTHERWISE}"
    )


def zero_has_the_rule(config: RunConfig) -> str | None:
    """The rule is one of torch's optimizers."""
    rule = config.optimizer.rule
    if not uses_zero(config) or rule in ZERO_RULES:
        return None
    choices = " or ".join(f"optimizer.rule={name}" for name in ZERO_RULES)
    return (
        f"optimizer.rule={rule}: parallel.engine=deepspeed steps an optimizer of torch, which has "
        f"no such rule; type {choices}, {OTHERWISE}"
    )


def zero_clips_by_the_norm(config: RunConfig) -> str | None:
    """No optimizer of torch clips coordinates."""
    rule = config.optimizer.rule
    if not uses_zero(config) or rule not in ZERO_RULES or not clips_coordinates(config):
        return None
    return (
        f"coordinate_clip.stage={clip_stage(config)}: parallel.engine=deepspeed steps an optimizer "
        f"of torch, which clips no coordinates; type coordinate_clip.stage=none {OTHERWISE}"
    )


def zero_keeps_state_in_float32(config: RunConfig) -> str | None:
    """ZeRO's masters and moments are plain float32."""
    offload = config.offload
    if not uses_zero(config):
        return None
    words = "parallel.engine=deepspeed keeps masters and moments in float32"
    if offload.moments != "float32":
        return (
            f"offload.moments={offload.moments}: {words}; type offload.moments=float32 {OTHERWISE}"
        )
    if offload.split_master:
        return f"offload.split_master=true: {words}; type offload.split_master=false {OTHERWISE}"
    return None


def zero_overlaps_no_update(config: RunConfig) -> str | None:
    """ZeRO decides in its step whether there is an update at all."""
    overlap = config.offload.overlap
    if not uses_zero(config) or overlap in {"auto", "none"}:
        return None
    return (
        f"offload.overlap={overlap}: parallel.engine=deepspeed begins and ends an update within "
        f"its own step; type offload.overlap=none {OTHERWISE}"
    )


def zero_recomputes_no_gradients(config: RunConfig) -> str | None:
    """Gradients that ZeRO has reduced are not there to be compared."""
    every = config.guard.recompute_every_steps
    if not uses_zero(config) or not every:
        return None
    return (
        f"guard.recompute_every_steps={every}: parallel.engine=deepspeed reduces gradients during "
        "backward, and a pass that is computed twice would count twice; type "
        f"guard.recompute_every_steps=0 {OTHERWISE}"
    )


def zero_checks_no_idle_state(config: RunConfig) -> str | None:
    """Only slabs of our optimizer are checksummed."""
    every = config.guard.check_state_every_steps
    if not uses_zero(config) or not every:
        return None
    return (
        f"guard.check_state_every_steps={every}: state of parallel.engine=deepspeed is not "
        f"checksummed; type guard.check_state_every_steps=0 {OTHERWISE}"
    )


def zero_has_the_diagnostics(config: RunConfig) -> str | None:
    """Some diagnostics read or try updates of our optimizer."""
    found = [n for n in config.observe.diagnostics if n in DIAGNOSTICS_OF_OUR_OPTIMIZER]
    if not uses_zero(config) or not found:
        return None
    kept = [name for name in config.observe.diagnostics if name not in found]
    return (
        f"observe.diagnostics={', '.join(found)}: needs the optimizer of this project, and "
        f"parallel.engine=deepspeed has its own; type observe.diagnostics={kept} {OTHERWISE}"
    )


def zero_3_differentiates_once(config: RunConfig) -> str | None:
    """The energy objective differentiates what it has differentiated, forwards too, and the hooks
    in which ZeRO-3 gathers weights are part of what is differentiated.
    """
    in_hooks = uses_zero(config) and config.parallel.zero_stage == 3
    if not in_hooks or config.train.objective != "energy":
        return None
    return (
        "train.objective=energy: has a gradient in its loss, and parallel.zero_stage=3 gathers "
        "weights in hooks that can be differentiated only once; type parallel.zero_stage=2 "
        f"{OTHERWISE}"
    )


def zero_reaches_all_it_trains(config: RunConfig) -> str | None:
    """Our optimizer leaves weights alone to which no gradient comes, and ZeRO updates whole
    partitions.
    """
    distill = config.distill
    if not uses_zero(config) or config.train.objective != "distill":
        return None
    reaches_all = distill.logit_weight or distill.likelihood_weight
    if distill.train_only != "all" or reaches_all:
        return None
    return (
        "distill.train_only=all: with distill.logit_weight=0 no gradient comes to layers that the "
        "teacher has too, and parallel.engine=deepspeed would let them decay; type "
        f"distill.train_only=new, distill.logit_weight=1 {OTHERWISE}"
    )
