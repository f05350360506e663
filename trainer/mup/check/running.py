"""Runs a coordinate check: a recipe at several widths, one small model after another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from interlace.trainer.assembly import checked_corpus
from interlace.trainer.config.mup_section import MupSection, Rule
from interlace.trainer.config.schema import RunConfig
from interlace.trainer.mup.check.measuring import Series, Trial, measure
from interlace.trainer.mup.check.verdict import Verdict, judge
from interlace.trainer.mup.manifest import manifest_of
from interlace.trainer.mup.widths import at_width, with_whole_heads

LEAST_HEADS = 4


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to check.

    Attributes:
        widths: At least 4, the widest at least 8 times the narrowest.
        seeds: How many, from 0.
        steps: Of each trial.
        tokens: Of the one micro-batch that is passed in every step.
        lr: Constant learning rate at the base width.
        base_width: Where all factors are 1.
        without: Rules that are left out of what is trained, not of what is expected.
        standard: Train without muP.
    """

    widths: Sequence[int]
    seeds: int = 3
    steps: int = 10
    tokens: int = 512
    lr: float
    base_width: int
    without: Sequence[Rule] = ()
    standard: bool = False


@dataclass(frozen=True)
class Checked:
    """A finished check.

    Attributes:
        verdict: What was found.
        note: What was changed about the recipe so that all widths are possible, or None.
    """

    verdict: Verdict
    note: str | None


def check(config: RunConfig, request: Request, progress: Callable[[int, int], None]) -> Checked:
    """Train a few steps at every width and with every seed, and judge.

    Args:
        config: The recipe, checked.
        request: What to check.
        progress: Told of trials done, and of all.

    Raises:
        ConfigError: The recipe has no equal at some width.
    """
    usual = MupSection(enabled=True, base_width=request.base_width)
    kept = config.mup.model_dump(exclude={"enabled", "base_width", "without"})
    wanted = usual.model_copy(update=kept)
    small, note = with_whole_heads(made_small(config, request, wanted), request.widths, LEAST_HEADS)
    asked = {"without": list(request.without)} if request.without else {}
    trained = MupSection() if request.standard else wanted.model_copy(update=asked)
    corpus = checked_corpus(small)
    vocabulary = corpus.index.vocabulary_size
    series: dict[tuple[int, int], Series] = {}
    total = len(request.widths) * request.seeds
    manifest = manifest_of(at_width(small, max(request.widths)), vocabulary)
    for width in sorted(request.widths):
        recipe = at_width(small, width)
        expected = manifest_of(recipe, vocabulary)
        for seed in range(request.seeds):
            progress(len(series), total)
            run = recipe.run.model_copy(update={"seed": seed})
            changes = {"run": run, "mup": trained}
            trial = Trial(recipe.model_copy(update=changes), expected, corpus, request.steps)
            series[width, seed] = measure(trial)
    progress(total, total)
    return Checked(judge(series, manifest, request.steps), note)


def made_small(config: RunConfig, request: Request, mup: MupSection) -> RunConfig:
    """Return a recipe with a small batch, a constant rate and nothing that hides an update: no
    decay, which is an update without a gradient, and no offloading.
    """
    length = min(config.data.sequence_length, 64, request.tokens)
    changes: dict[str, dict[str, object]] = {
        "data": {"sequence_length": length},
        "train": {
            "tokens_per_step": request.tokens - request.tokens % length,
            "microbatch_rows": None,
            "compute_dtype": "float32",
            "compile": False,
            "activation_checkpointing": "none",
        },
        "optimizer": {"peak_lr": request.lr, "weight_decay": 0.0, "clip": 0.0},
        "offload": {"strategy": "none", "overlap": "auto"},
        "parallel": {"replicas": 1},
    }
    sections: dict[str, object] = {
        name: getattr(config, name).model_copy(update=values) for name, values in changes.items()
    }
    return config.model_copy(update=sections | {"mup": mup})
