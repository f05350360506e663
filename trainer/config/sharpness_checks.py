"""What `directional_sharpness` asks of a recipe: rules that there are, and a second derivative."""

from interlace.trainer.config.schema import RunConfig
from interlace.trainer.errors import ConfigError

DIRECTIONAL = "directional_sharpness"

TWICE_DIFFERENTIABLE = ("auto", "chunked", "reference", "triton")
"""Back ends of attention that have a second derivative."""

REMEDY = "type observe.diagnostics=['critical_sharpness']"


def sharpness_rules_are_known(config: RunConfig) -> str | None:
    """Every rule whose direction is wanted is registered."""
    from interlace.trainer.rules import RULES

    if DIRECTIONAL not in config.observe.diagnostics:
        return None
    unknown = [name for name in config.sharpness.rules if name not in RULES.names()]
    if not unknown:
        return None
    known = ", ".join(RULES.names())
    return f"sharpness.rules={unknown[0]}: there is no such update rule; known: {known}"


def sharpness_has_its_derivative(config: RunConfig) -> str | None:
    """Objective and blocks can be differentiated twice."""
    if DIRECTIONAL not in config.observe.diagnostics:
        return None
    reason = first_order_part(config)
    if reason is None:
        return None
    return f"observe.diagnostics={DIRECTIONAL}: needs a second derivative, and {reason}"


def first_order_part(config: RunConfig) -> str | None:
    """Return what of a recipe has no second derivative and what to type, or None."""
    match config.train.objective:
        case "energy":
            return (
                "the loss of train.objective=energy holds one already, so this would be the third; "
                f"{REMEDY}"
            )
        case "distill":
            return f"the loss of train.objective=distill has only the first; {REMEDY}"
        case _:
            pass
    return first_order_block(config)


def first_order_block(config: RunConfig) -> str | None:
    """Return which block of a stack has no second derivative, or None."""
    from interlace.trainer.models.depth import layer_patterns
    from interlace.trainer.models.registry import mixer_class, registered_letters

    model = config.model
    try:
        letters = "".join(layer_patterns(model))
    except (ConfigError, ValueError):
        # A pattern that is none has a message of its own, and so have letters that there are not.
        return None
    for letter in dict.fromkeys(letters):
        if letter in registered_letters() and mixer_class(letter).traits.order == 1:
            return f"block {letter} of model.pattern={model.pattern} has only the first; {REMEDY}"
    if "A" in letters and model.attention_backend not in TWICE_DIFFERENTIABLE:
        return (
            f"model.attention_backend={model.attention_backend} has only the first; type "
            "model.attention_backend=auto"
        )
    return None
