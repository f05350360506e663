"""Update rules on one small Transformer: SGD, Signum, coordinate-clipped SGD and AdamW.

A byte-level model of two layers learns the Python standard library, every rule with the peak
learning rate that is best for it on one and the same grid: by factors of 4 from the same point to
where it is worse on both sides, then every power of 2 within a factor of 8, with a seed that is not
shown. Then three other seeds, and along each of those runs the directional sharpness of all rules
(Pan and Li 2023, arXiv 2306.00204): `<v, H v> / <v, v>` along the step v that each of them would
take there. So rules are compared on the same trajectory, and each on its own.

What is compared is the held-out loss after as many steps. There is no weight decay, since it is
multiplied by learning rates that differ a thousandfold here. Signum and AdamW have their gradients
clipped by their norm at 1, as is usual, SGD with and without.

    python benchmarks/optimizers.py [--steps 200] [--seeds 3] [--save]
"""

import argparse
import contextlib
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import RESULTS, Row, save, table

from interlace.launch.sweep.running import QuietWorld, divergence
from interlace.trainer.assembly import open_run
from interlace.trainer.config import load_recipe
from interlace.trainer.errors import NumericsError
from interlace.trainer.loop import finished_steps
from interlace.trainer.observe.metrics import StepRecord

RULES = {
    "SGD": ("optimizer.rule=sgd", "optimizer.clip=0.0"),
    "SGD, norm clipped": ("optimizer.rule=sgd",),
    "Signum": ("optimizer.rule=signum",),
    "clipped SGD": ("optimizer.rule=clipped_sgd",),
    "clipped SGD, lagged quantile": (
        "optimizer.rule=clipped_sgd",
        "coordinate_clip.policy=lagged_quantile",
    ),
    "AdamW": ("optimizer.rule=adamw",),
}
"""What is compared, as words of a command line."""

STATE_BYTES = {"AdamW": 8}
"""Of fp32 state per parameter; 4 where it is not listed, for the momentum."""

COLORS = ("black", "tab:gray", "tab:purple", "tab:blue", "tab:cyan", "tab:orange")

DIRECTIONS = {"sgd": "SGD", "signum": "Signum", "clipped_sgd": "clipped SGD", "adamw": "AdamW"}
"""Rules whose directions are measured, as recipes call them, and whose color they have."""

EARLY = (10, 20)
"""Steps at which sharpness is judged."""

MEASURED = (1, 5, 10, 20, 50, 100, 200)

FIRST = -3
"""log2 of the learning rate that is tried first."""

WINDOW = 3
"""Octaves to both sides of the coarse optimum in which every power of 2 is tried."""

TUNING_SEED = 100


@dataclass(kw_only=True)
class Training:
    """What came of one run.

    Attributes:
        rule: Name in `RULES`.
        log2_lr: log2 of the peak learning rate.
        seed: Of weights and data.
        losses: Training loss of every step.
        held_out: Held-out loss after the last step; infinite where the run diverged.
        sharpness: By step, then by rule, the sharpness of its direction.
        clipped: Share of coordinates that the last steps clipped, where the rule clips.
        seconds: Of the processor.
    """

    rule: str
    log2_lr: int
    seed: int
    losses: list[float] = field(default_factory=list[float])
    held_out: float = math.inf
    sharpness: dict[int, dict[str, float]] = field(default_factory=dict[int, dict[str, float]])
    clipped: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    steps: int
    seeds: int
    work: str
    """Folder of the tokenised text and of finished runs, which are not run again."""

    def words(self, rule: str, log2_lr: int, seed: int, folder: str) -> list[str]:
        """Return the words of one run's command line."""
        return [
            *RULES[rule],
            f"optimizer.peak_lr={2.0**log2_lr!r}",
            "optimizer.weight_decay=0.0",
            f"train.steps={self.steps}",
            "train.tokens_per_step=1024",
            "train.validate_every_steps=0",
            "train.validation_tokens=32768",
            "checkpoint.every_steps=0",
            "observe.sample_tokens=0",
            f"data.prepared_dir={self.work}",
            f"run.seed={seed}",
            f"run.dir={folder}",
        ]

    def train(self, rule: str, log2_lr: int, seed: int, measure: bool = False) -> Training:
        """Train once; measure along all rules' directions if that is wanted."""
        found = Training(rule=rule, log2_lr=log2_lr, seed=seed)
        kept = Path(self.work) / f"{self.steps} {rule} {log2_lr} {seed}.json"
        if kept.is_file():
            return training_from(kept)
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            words = self.words(rule, log2_lr, seed, f"{folder}/run")
            if measure:
                words += [
                    "observe.diagnostics=['directional_sharpness']",
                    f"sharpness.rules={list(DIRECTIONS)}",
                    f"sharpness.steps={[step for step in MEASURED if step <= self.steps]}",
                    "sharpness.every_steps=0",
                    "sharpness.rows=16",
                ]
            records = train(words)
        found.seconds = time.process_time() - start
        take_in(found, records, self.steps)
        kept.write_text(json.dumps(asdict(found)), encoding="utf-8")
        return found

    def compete(self, rule: str) -> tuple[dict[int, Training], list[Training]]:
        """Return the runs of the search for a rule's best learning rate, and those with it."""
        torch.set_num_threads(1)
        best, search = tuned(self, rule)
        runs: list[Training] = []
        for seed in range(self.seeds):
            runs.append(self.train(rule, best, seed, measure=True))
            print(f"{rule}: 2^{best}, seed {seed}: {runs[-1].held_out:.4f}", flush=True)
        return search, runs


def train(words: Sequence[str]) -> list[StepRecord]:
    """Return the records of a run, up to where it diverged if it did."""
    config = load_recipe("fault-drill", list(words)).config
    records: list[StepRecord] = []
    quiet = contextlib.redirect_stdout(io.StringIO())
    with contextlib.suppress(NumericsError), quiet, open_run(config, QuietWorld()) as run:
        for _ in finished_steps(run):
            records.append(run.record())
            if divergence(records, config.optimizer.warmup_steps):
                break
    return records


def training_from(path: Path) -> Training:
    """Read a run that was kept."""
    found = Training(**json.loads(path.read_text(encoding="utf-8")))
    # JSON has no numbers as keys.
    found.sharpness = {int(step): values for step, values in found.sharpness.items()}
    return found


def take_in(found: Training, records: Sequence[StepRecord], steps: int) -> None:
    """Note what the records of a run say."""
    found.losses = [math.nan if record.loss is None else record.loss for record in records]
    complete = len(records) == steps and math.isfinite(found.losses[-1])
    if complete and records[-1].val_loss is not None:
        found.held_out = records[-1].val_loss
    prefix = "directional_sharpness."
    for record in records:
        own = {
            key.removeprefix(prefix): value
            for key, value in record.details.items()
            if key.startswith(prefix)
        }
        if own:
            found.sharpness[record.step] = own
    clipped = [r.details["clip_fraction"] for r in records if "clip_fraction" in r.details]
    found.clipped = statistics.mean(clipped[-5:]) if clipped else None


def tuned(setting: Setting, rule: str) -> tuple[int, dict[int, Training]]:
    """Return the best log2 learning rate of a rule, inside its grid, and all runs of the search."""
    runs: dict[int, Training] = {}

    def loss_at(log2_lr: int) -> float:
        if log2_lr not in runs:
            runs[log2_lr] = setting.train(rule, log2_lr, TUNING_SEED)
            print(f"  {rule}: 2^{log2_lr} {runs[log2_lr].held_out:.4f}", flush=True)
        return runs[log2_lr].held_out

    best = FIRST
    while (near := min((best - 2, best, best + 2), key=loss_at)) != best:
        best = near
    best = min(range(best - WINDOW, best + WINDOW + 1), key=loss_at)
    while (near := min((best - 1, best, best + 1), key=loss_at)) != best:
        best = near
    return best, runs


def row_of(rule: str, runs: Sequence[Training], adamw: Sequence[Training]) -> Row:
    """Return the figures of one rule over its seeds."""
    losses = [run.held_out for run in runs]
    direction = next(name for name in DIRECTIONS if f"optimizer.rule={name}" in RULES[rule])
    row: dict[str, object] = {
        "rule": rule,
        "state, bytes per parameter": STATE_BYTES.get(rule, 4),
        "best learning rate": f"2^{runs[0].log2_lr}",
        "held-out loss, mean": f"{statistics.mean(losses):.4f}",
        "± over seeds": f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "",
        "above AdamW": f"{statistics.mean(losses) - mean_loss(adamw):+.4f}",
        "AdamW is there after": steps_of(adamw, smoothed(runs)[-1]),
    }
    for step in EARLY:
        own = [run.sharpness[step][direction] for run in runs if step in run.sharpness]
        row[f"sharpness, step {step}"] = statistics.mean(own) if own else ""
    clipped = [run.clipped for run in runs if run.clipped is not None]
    row["clipped, last steps"] = f"{statistics.mean(clipped):.2f}" if clipped else ""
    return row


def mean_loss(runs: Sequence[Training]) -> float:
    """Return the mean held-out loss over seeds."""
    return statistics.mean(run.held_out for run in runs)


def smoothed(runs: Sequence[Training], window: int = 10) -> list[float]:
    """Return the training loss of every step, the mean over seeds and the last few steps."""
    means = [statistics.mean(losses) for losses in zip(*(run.losses for run in runs), strict=True)]
    return [
        statistics.mean(means[max(0, step - window) : step]) for step in range(1, len(means) + 1)
    ]


def steps_of(runs: Sequence[Training], loss: float) -> str:
    """Return after how many steps the training loss of some runs is at most this."""
    curve = smoothed(runs)
    reached = next((step for step, value in enumerate(curve, start=1) if value <= loss), None)
    return f"{reached} of {len(curve)}" if reached else "never"


def verdicts(found: Mapping[str, Sequence[Training]]) -> list[str]:
    """Return what the runs say, a sentence each."""
    clipped, adamw = found["clipped SGD"], found["AdamW"]
    same = [
        (run.sharpness[step]["sgd"], run.sharpness[step]["clipped_sgd"])
        for run in (run for runs in found.values() for run in runs)
        for step in EARLY
        if step in run.sharpness
    ]
    own = [
        (plain.sharpness[step]["sgd"], ours.sharpness[step]["clipped_sgd"])
        for plain, ours in zip(found["SGD"], clipped, strict=True)
        for step in EARLY
        if step in plain.sharpness and step in ours.sharpness
    ]
    lead = mean_loss(clipped) - mean_loss(adamw)
    named = "AdamW leads" if lead > 0 else "clipped SGD leads"
    return [
        *(compared(rule, found[rule], clipped) for rule in ("SGD", "SGD, norm clipped")),
        f"Sharpness at steps {' and '.join(map(str, EARLY))}, clipped SGD's against SGD's, on the "
        f"same trajectory, whoever's it is: {counted(same)}",
        f"The same with each on its own trajectory: {counted(own)}",
        f"{named}: {abs(lead):.3f} nats per token between the two.",
    ]


def counted(pairs: Sequence[tuple[float, float]]) -> str:
    """Say how often the sharpness of SGD's step is larger than that of clipped SGD's."""
    convex = [ours < sgd for sgd, ours in pairs if sgd > 0.0]
    concave = [abs(ours) < abs(sgd) for sgd, ours in pairs if sgd <= 0.0]
    said = f"lower in {sum(convex)} of {len(convex)}."
    if concave:
        said += (
            f" In {len(concave)} more the loss is concave along SGD's step, and less so along "
            f"clipped SGD's in {sum(concave)}."
        )
    return said


def compared(rule: str, others: Sequence[Training], clipped: Sequence[Training]) -> str:
    """Say how clipped SGD ends beside another rule, seed by seed."""
    wins = sum(ours.held_out < its.held_out for its, ours in zip(others, clipped, strict=True))
    difference = mean_loss(others) - mean_loss(clipped)
    return (
        f"clipped SGD ends below {rule} in {wins} of {len(clipped)} seeds; the mean is "
        f"{abs(difference):.3f} nats per token {'lower' if difference > 0 else 'higher'}."
    )


def draw(
    path: Path, found: Mapping[str, Sequence[Training]], tuning: Mapping[str, dict[int, Training]]
) -> None:
    """Write a picture: tuning, training, and sharpness along all steps of one trajectory."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for color, (rule, runs) in zip(COLORS, found.items(), strict=True):
        finite = sorted((n, run.held_out) for n, run in tuning[rule].items() if run.held_out < 6)
        left.plot(*zip(*finite, strict=True), ".-", color=color, label=rule)
        best = tuning[rule][runs[0].log2_lr]
        left.plot(best.log2_lr, best.held_out, "o", color=color, ms=9, fillstyle="none")
        curve = smoothed(runs)
        middle.plot(range(1, len(curve) + 1), curve, color=color, label=rule)
    left.set(xlabel="log2 of the peak learning rate", ylabel="held-out loss, nats per token")
    lowest = min(run.held_out for runs in tuning.values() for run in runs.values())
    left.set_ylim(lowest - 0.1, lowest + 1.0)
    left.set_title("Tuning: one grid for all")
    middle.set(xlabel="step", ylabel="training loss, nats per token", ylim=(None, 4))
    middle.set_title(f"Training at the best rate, mean of {len(found['AdamW'])} seeds")
    middle.legend(frameon=False)
    draw_sharpness(right, found["AdamW"])
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def draw_sharpness(axes: Axes, runs: Sequence[Training]) -> None:
    """Draw the sharpness along the steps that every rule would take on the runs' trajectories."""
    colors = dict(zip(RULES, COLORS, strict=True))
    for direction, rule in DIRECTIONS.items():
        steps = [step for step in runs[0].sharpness if step >= min(EARLY)]
        means = [statistics.mean(run.sharpness[step][direction] for run in runs) for step in steps]
        axes.plot(steps, means, ".-", color=colors[rule], label=rule)
    axes.set(xlabel="step", ylabel="directional sharpness")
    axes.set_yscale("symlog", linthresh=0.05)
    axes.set_title("Sharpness of their steps, AdamW's runs")


def main() -> None:
    """Tune every rule, train it with every seed, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--work", default="", help="folder in which finished runs are kept")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/optimizers*")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as empty,
        ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool,
    ):
        work = arguments.work or empty
        setting = Setting(arguments.steps, arguments.seeds, work)
        # The corpus is tokenised once, before processes want it.
        Setting(1, 1, work).train("SGD", FIRST, TUNING_SEED)
        outcomes = dict(zip(RULES, pool.map(setting.compete, RULES), strict=True))
    tuning = {rule: runs for rule, (runs, _) in outcomes.items()}
    found = {rule: runs for rule, (_, runs) in outcomes.items()}
    rows = [row_of(rule, runs, found["AdamW"]) for rule, runs in found.items()]
    said = verdicts(found)
    seconds = sum(
        run.seconds
        for runs in (*found.values(), *(each.values() for each in tuning.values()))
        for run in runs
    )
    notes = [
        *said,
        f"{arguments.steps} steps of 1024 tokens, two layers of width 64, {arguments.seeds} seeds "
        f"beside the one that was tuned with; {seconds:.0f} CPU seconds in all.",
    ]
    print(table(rows), *notes, sep="\n")
    if arguments.save:
        save("optimizers", "Update rules on a small Transformer", rows, notes)
        keep_runs(found, tuning)
        draw(RESULTS / "optimizers.png", found, tuning)


def keep_runs(
    found: Mapping[str, Sequence[Training]], tuning: Mapping[str, dict[int, Training]]
) -> None:
    """Add curves, sharpness and tuning to the file of results."""
    path = RESULTS / "optimizers.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["runs"] = [
        {
            "rule": run.rule,
            "seed": run.seed,
            "log2_lr": run.log2_lr,
            "held_out": run.held_out,
            "losses": [round(loss, 4) for loss in run.losses],
            "sharpness": run.sharpness,
        }
        for runs in found.values()
        for run in runs
    ]
    document["tuning"] = {
        rule: {str(n): round(runs[n].held_out, 4) for n in sorted(runs) if runs[n].held_out < 100}
        for rule, runs in tuning.items()
    }
    path.write_text(json.dumps(document) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
