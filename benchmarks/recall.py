"""Recall by a state of fixed size: Mamba-2 alone, and with one layer of attention.

Multi-query associative recall (Arora et al. 2023, Zoology, arXiv 2312.04927): a row shows pairs of
a key and its value, then every key again in another order, and at each the model must name the
value. Rows are drawn afresh for every step, so nothing can be learnt by heart. Keys lie side by
side in the second part, without the filler of the paper, so that rows are short. Both models
have two blocks and no feed-forward blocks, the same widths and the same state, and each is shown at
two learning rates; the picture has the better one, as judged on the held-out rows themselves.

What is compared is accuracy after as many steps: sizes and rates were found with the hybrid in
mind, and Mamba-2 alone may not have learnt all that its state can hold by then.

    python benchmarks/recall.py [--steps 500] [--seeds 2] [--save]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from results import RESULTS, Row, save, table
from torch.nn import functional

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.language_model import LanguageModel

MODELS = {"hybrid": "M A", "Mamba-2 alone": "M M"}
RATES = (4e-3, 1e-2)
WARMUP_STEPS = 30
HELD_OUT_SEED = 1_000_000
HELD_OUT_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sizes of the task; keys are the first words of the vocabulary, values the others."""

    keys: int = 64
    values: int = 64
    pairs: int = 16
    rows: int = 32

    def batches(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Draw rows for ever: tokens (rows, 3 * pairs) and the values asked for (rows, pairs)."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.batch(self.rows, generator)

    def batch(self, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw `rows` rows: tokens, and the values of the keys in their last third."""
        keys = torch.rand(rows, self.keys, generator=generator).argsort(1)[:, : self.pairs]
        values = self.keys + torch.randint(self.values, (rows, self.pairs), generator=generator)
        order = torch.rand(rows, self.pairs, generator=generator).argsort(1)
        shown = torch.stack([keys, values], dim=2).flatten(1)
        return torch.cat([shown, keys.gather(1, order)], dim=1), values.gather(1, order)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one model is trained."""

    pattern: str
    peak_lr: float
    steps: int = 500
    seed: int = 0
    state_width: int = 4


@dataclass(kw_only=True)
class Curve:
    """Share of held-out questions answered rightly, after each of `steps`."""

    training: Training
    steps: list[int] = field(default_factory=list[int])
    accuracy: list[float] = field(default_factory=list[float])
    seconds: float = 0.0
    parameters: int = 0


def answers(model: LanguageModel, tokens: torch.Tensor, asked: int) -> torch.Tensor:
    """Return the logits (rows, asked, V) at the last `asked` positions: the questions."""
    hidden = model.hidden(tokens, None, None)[0][:, -asked:]
    return functional.linear(hidden, model.head_weight())


def accuracy(model: LanguageModel, task: Task) -> float:
    """Return the share of questions of rows that no training sees, answered rightly."""
    tokens, wanted = task.batch(HELD_OUT_ROWS, torch.Generator().manual_seed(HELD_OUT_SEED))
    with torch.no_grad():
        found = answers(model, tokens, task.pairs).argmax(-1)
    return float((found == wanted).double().mean())


def learn(
    task: Task, training: Training, tell: Callable[[int, float], None], every: int = 50
) -> Curve:
    """Train one model with AdamW; call `tell(step, accuracy)` every so many steps."""
    section = ModelSection(
        pattern=training.pattern,
        layers=1,
        width=64,
        heads=2,
        tie_embeddings=True,
        positions="none",
        mamba_expand=1.0,
        mamba_head_width=32,
        mamba_state_width=training.state_width,
    )
    model = LanguageModel(section, task.keys + task.values)
    model.initialise(training.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    curve = Curve(training=training)
    curve.parameters = sum(parameter.numel() for parameter in model.parameters())
    start = time.process_time()
    for step, (tokens, wanted) in zip(
        range(1, training.steps + 1), task.batches(training.seed), strict=False
    ):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        logits = answers(model, tokens, task.pairs)
        loss = functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % every == 0 or step == training.steps:
            curve.steps.append(step)
            curve.accuracy.append(accuracy(model, task))
            tell(step, curve.accuracy[-1])
    curve.seconds = time.process_time() - start
    return curve


def learning_rate(training: Training, step: int) -> float:
    """Return the rate of a step: warm-up, constant for half the run, then down to nothing."""
    warm = min(1.0, step / WARMUP_STEPS)
    left = (training.steps - step + 1) / (training.steps / 2)
    return training.peak_lr * min(warm, left)


def row_of(name: str, curves: Sequence[Curve], task: Task) -> Row:
    """Return the figures of one model at one learning rate, over its seeds."""
    last = [curve.accuracy[-1] for curve in curves]
    training = curves[0].training
    return {
        "model": name,
        "blocks": training.pattern,
        "parameters": curves[0].parameters,
        "state per channel": training.state_width,
        "pairs": task.pairs,
        "learning rate": training.peak_lr,
        "accuracy, mean": statistics.mean(last),
        "accuracy, lowest": min(last),
        "accuracy, highest": max(last),
        "CPU s per run": statistics.mean(curve.seconds for curve in curves),
    }


def best(curves: Sequence[Sequence[Curve]]) -> Sequence[Curve]:
    """Return the curves of the learning rate with the highest mean accuracy at the end."""
    return max(curves, key=lambda found: statistics.mean(curve.accuracy[-1] for curve in found))


def draw(path: Path, shown: dict[str, Sequence[Curve]], task: Task) -> None:
    """Write a picture of accuracy over steps, each model at its better learning rate."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for color, (name, curves) in zip(("tab:blue", "tab:orange"), shown.items(), strict=True):
        for number, curve in enumerate(curves):
            label = f"{name}, lr {curve.training.peak_lr:g}" if number == 0 else None
            axes.plot(curve.steps, curve.accuracy, color=color, label=label)
    axes.axhline(1 / task.pairs, color="grey", linestyle=":", label="any value of the row")
    axes.set(xlabel="step", ylabel="accuracy on held-out rows", ylim=(0, 1.02))
    axes.set_title(f"Recall of {task.pairs} pairs; a line per seed")
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train every model at every learning rate, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/recall*")
    arguments = parser.parse_args()
    task = Task()
    rows: list[Row] = []
    shown: dict[str, Sequence[Curve]] = {}
    for name, pattern in MODELS.items():
        found: list[list[Curve]] = []
        for rate in RATES:
            found.append([])
            for seed in range(arguments.seeds):
                training = Training(pattern=pattern, peak_lr=rate, steps=arguments.steps, seed=seed)
                start = f"{name}, lr {rate:g}, seed {seed}"

                def tell(step: int, right: float, start: str = start) -> None:
                    print(f"\r{start}: step {step}, accuracy {right:.3f} ", end="", flush=True)

                found[-1].append(learn(task, training, tell))
                print(flush=True)
            rows.append(row_of(name, found[-1], task))
        shown[name] = best(found)
    print(table(rows))
    total = sum(float(str(row["CPU s per run"])) for row in rows) * arguments.seeds
    notes = [
        f"{arguments.steps} steps of {task.rows} rows of {3 * task.pairs} tokens, "
        f"{task.keys} keys, {task.values} values; {arguments.seeds} seeds; accuracy on "
        f"{HELD_OUT_ROWS} held-out rows",
        f"CPU seconds in all: {total:.0f}",
    ]
    print("\n".join(notes))
    if arguments.save:
        save("recall", "Recall: Mamba-2 alone and with attention", rows, notes)
        draw(RESULTS / "recall.png", shown, task)


if __name__ == "__main__":
    main()
