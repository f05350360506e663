"""The race: DeepSpeed's ways to offload, torch's, and ours, with one model, one data, one table.

Every contender trains the recipes' Transformer from the same weights on the same tokens, in fresh
processes of its own that are killed when they hang; one that cannot run is listed with its error.
Rounds repeat all of them in turn for as long as there is time. Those who compute the same, in
whatever way, must end in the same loss after fifty steps: if one does not, it is named and the
status is 1. ZenFlow, clipped SGD and SuperOffload without clipping compute something else and are
not compared with AdamW.

Columns: forward, backward and update are waited for one by one. `exposed` is what an iteration with
its update takes longer than one whose gradients are dropped, as they follow each other in training;
`iteration` and tokens/s are of training. Predictions are those of the performance model. Host
memory is the peak of all ranks and their helpers together, device memory that of one device.

On a GPU: 1.3B and 7B parameters, 2k and 16k tokens per step, state under a budget of 40% of itself;
losses are compared on a small model, in float32 and in bfloat16. Without one: a small model on two
gloo ranks, host memory in the place of a device: the same code, and times that say nothing of GPUs.

    python benchmarks/versus_deepspeed.py                       all that fits into the budget
    python benchmarks/versus_deepspeed.py --only optimal zero3-offload --rounds 5
    python benchmarks/versus_deepspeed.py --models 7B --save    writes benchmarks/results/versus_*
"""

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from race_contenders import CONTENDERS, Contender, chosen
from race_processes import Ended, run_ranks
from race_rank import PROFILE
from race_tables import NO_TIME, Outcome, draw, goals, names_apart, rows_of
from race_tracks import TRACKS, Track, track_of
from results import RESULTS, save, table

BUDGET = {"cuda": 500.0, "cpu": 285.0}
"""Seconds of the whole race by default: nine minutes on a GPU, five without, and some to spare."""


@dataclass
class Race:
    """Contenders on tracks, within a number of seconds.

    Attributes:
        folder: For logs and findings of the ranks.
        seconds: Budget; what has begun is ended with it.
        load: Of the machine before anything began: what others had it do.
    """

    contenders: Sequence[Contender]
    tracks: Sequence[Track]
    ranks: int
    rounds: int
    seconds: float
    folder: Path
    began: float = field(default_factory=time.monotonic)
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    outcomes: list[Outcome] = field(default_factory=list[Outcome])
    notes: list[str] = field(default_factory=list[str])

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.began + self.seconds - time.monotonic()

    def round_by_round(self) -> None:
        """Run everyone in turn, as often as there is time."""
        self.outcomes = [Outcome(each, track) for track in self.tracks for each in self.contenders]
        for number, track in enumerate(self.tracks):
            deadline = self.left - self.left / (len(self.tracks) - number)
            self.first_round([o for o in self.outcomes if o.track == track], deadline)
        for number in range(2, self.rounds + 1):
            for place, outcome in enumerate(o for o in self.outcomes if not o.error):
                if self.left < 1.1 * outcome.seconds[-1]:
                    self.notes.append(f"Round {number} ended early: {NO_TIME}.")
                    return
                self.go(outcome, number, place)

    def prepare(self) -> None:
        """Know the machine, and have compiled what DeepSpeed compiles."""
        print("looking at the machine, building DeepSpeed's Adam", flush=True)
        folder = self.folder / PROFILE
        ended = run_ranks([PROFILE, "", str(folder), ""], folder, 1, max(60.0, self.left))
        if ended.error:
            raise SystemExit(f"the machine could not be measured: {ended.error}")
        shutil.copy(folder / "profile.json", self.folder / "profile.json")
        if ended.findings[0]["error"]:
            self.notes.append(ended.findings[0]["error"])

    def first_round(self, outcomes: Sequence[Outcome], reserve: float) -> None:
        """Run every contender of one track once, while more than `reserve` seconds are left."""
        for place, outcome in enumerate(outcomes):
            known = [each.seconds[0] for each in outcomes if each.rounds]
            typical = statistics.median(known) if known else 0.0
            if self.left - reserve < typical:
                outcome.error = NO_TIME
            else:
                self.go(outcome, 1, place)

    def go(self, outcome: Outcome, number: int, place: int) -> None:
        """Run one contender once."""
        contender, track = outcome.contender, outcome.track
        words = f"round {number}, {track.name}, {place + 1} of {len(self.contenders)}"
        print(f"[{self.left:4.0f} s left] {words}: {contender.title}", flush=True)
        folder = self.folder / f"{number}-{track.name}-{contender.name}"
        # Losses are compared once; those of large models are the same small model's.
        compared = any(o.loss() is not None for o in self.outcomes if o.contender == contender)
        how = "full" if number == 1 and not (compared and not track.steps) else "quick"
        command = [contender.name, track.name, str(folder), how]
        ended = run_ranks(command, folder, self.ranks, max(1.0, min(track.limit, self.left)))
        outcome.seconds.append(ended.seconds)
        self.take(outcome, number, ended)

    def take(self, outcome: Outcome, number: int, ended: Ended) -> None:
        """Note what came of it."""
        if ended.error:
            outcome.error = ended.error
            print(f"    cannot run: {ended.error}", flush=True)
            return
        outcome.rounds[number] = ended.findings
        times = [
            f"{(outcome.slowest(number, rows, 'iteration') or 0.0) * 1e3:.1f} ms"
            for rows in outcome.track.rows
        ]
        print(f"    {' and '.join(times)} in {ended.seconds:.1f} s", flush=True)


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; wrong names are refused with those that there are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    names = "\n".join(f"    {each.name:20}{each.title}" for each in CONTENDERS)
    parser.epilog = f"contenders, the most important first:\n{names}"
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="these contenders")
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help="of " + ", ".join(t.name for t in TRACKS)
    )
    parser.add_argument("--ranks", type=int, help="processes; every GPU there is, or 2 without any")
    parser.add_argument("--rounds", type=int, default=3, help="at most; 3 by default")
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET[kind],
        metavar="SECONDS",
        help="rounds are dropped, then contenders, to end in time; %(default)s by default here",
    )
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/versus_*")
    arguments = parser.parse_args(words)
    try:
        arguments.only = chosen(arguments.only)
        usual = ["1.3B", "7B"] if kind == "cuda" else ["small"]
        arguments.models = [track_of(name) for name in arguments.models or usual]
    except ValueError as error:
        parser.error(str(error))
    arguments.ranks = arguments.ranks or (torch.cuda.device_count() if kind == "cuda" else 2)
    return arguments


def conditions(race: Race) -> list[str]:
    """Return what the figures were taken under."""
    try:
        deepspeed = version("deepspeed")
    except PackageNotFoundError:
        deepspeed = "not installed"
    cores = len(os.sched_getaffinity(0))
    where = (
        "NCCL, one GPU each"
        if torch.cuda.is_available()
        else "gloo on the CPU, which stands for the device: times say nothing of GPUs"
    )
    return [
        f"DeepSpeed {deepspeed}; {race.ranks} ranks, {where}; cores and threads of each rank's "
        f"own: {max(1, cores // race.ranks)}. Load average when it began: {race.load:.1f}.",
        *race.notes,
    ]


def main() -> None:
    """Race, print, save; status 1 if losses do not agree."""
    arguments = parsed()
    # Ranks are ended in `finally`, which a signal alone would skip.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory(prefix="race-") as folder:
        race = Race(
            arguments.only,
            arguments.models,
            arguments.ranks,
            arguments.rounds,
            arguments.budget,
            Path(folder),
        )
        race.prepare()
        race.round_by_round()
    report(race, keep=arguments.save)
    apart = names_apart(race.outcomes)
    if apart:
        raise SystemExit(f"other losses than the rest: {', '.join(apart)}")


def report(race: Race, *, keep: bool) -> None:
    """Print the table and what it means; write it and the picture."""
    rows, notes = rows_of(race.outcomes), conditions(race)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        notes += goals(race.outcomes)
    print(table(rows), *notes, sep="\n")
    if keep:
        kind = "gpu" if on_gpu else "cpu"
        title = "The race against DeepSpeed" + ("" if on_gpu else ", on a CPU in a GPU's place")
        save(f"versus_deepspeed-{kind}", title, rows, notes)
        draw(race.outcomes, title).savefig(RESULTS / f"versus_deepspeed-{kind}.png", dpi=130)


if __name__ == "__main__":
    main()
