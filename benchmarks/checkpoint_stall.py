"""How long training stands still for a checkpoint that is written beside it, against one that it
waits for.

State of about a gigabyte is offloaded to the host and updated there by AdamW after every forward
and backward pass. Each round first times some steps without a save, then a blocking save, then a
save of the very same state beside the steps that follow, until it is committed. The stall of that
one is the time until then, less what as many steps take without a save: everything that a save
costs training counts, also that updates wait and that the writer takes time from the processor.
What training itself waits for the save (between steps, and updates for the writer) is shown apart:
on a machine that others use, the stall holds their noise as well. Both files must have the same
digest. Rounds alternate in one process; medians count.

Forward and backward are those of a device: the host waits for them (`device`), or the host computes
itself, on all of its cores (`host`). They last a given share of a blocking save. What training may
hide is the time until the state is read, which is less than that of the save, because pages go to
the disk later.

    python benchmarks/checkpoint_stall.py [--elements 80000000] [--rounds 5] [--save]
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from results import Row, save, table

from interlace.kernels.update import AdamW
from interlace.offload.hardware import load_profile
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.offload.options import OffloadOptions
from interlace.offload.schedule import MemoryBudget
from interlace.trainer.checkpoint import CheckpointStore
from interlace.trainer.checkpoint.ledger import Pool
from interlace.trainer.checkpoint.saves import Save, Target
from interlace.trainer.checkpoint.saves import save as blocking_save
from interlace.trainer.checkpoint.state import Progress, TrainingState
from interlace.trainer.engines.fsdp2 import Fsdp2Engine
from interlace.trainer.world import World

PARTS = 40
SCALARS = {"config": {}, "corpus_digest": "", "vocabulary_size": 1, "manifest": {}}
GOAL = 0.1


class Nothing:
    """An objective that remembers nothing."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return nothing."""
        return {}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore nothing."""
        assert not tensors


class Training:
    """bfloat16 weights whose masters and moments are on the host, and their checkpoints."""

    def __init__(self, elements: int, folder: Path) -> None:
        size = elements // PARTS
        self.model = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(size).bfloat16()) for _ in range(PARTS)
        )
        self.gradient = torch.randn(size).bfloat16()
        self.optimizer = OffloadedOptimizer(
            self.model.parameters(),
            AdamW(lr=1e-4),
            strategy="host",
            budget=MemoryBudget(10**11, 10**11),
            profile=load_profile("4xh100-pcie5"),
            options=OffloadOptions(subgroup_elements=2 * size),
        )
        self.state = TrainingState(self.model, Fsdp2Engine(self.optimizer), Nothing(), World())
        store = CheckpointStore(folder / "checkpoints")
        self.target = Target(store, store.begin_attempt(), SCALARS, Pool(None))
        self.number = 0

    def step(self, forward_backward: Callable[[], None]) -> float:
        """Take a step; return its seconds."""
        began = time.perf_counter()
        forward_backward()
        for weight in self.model:
            weight.grad = self.gradient.clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer.synchronize()
        return time.perf_counter() - began

    def next_progress(self) -> Progress:
        """Return counters that no checkpoint has yet."""
        self.number += 1
        return Progress(step=self.number)

    def save_and_wait(self) -> tuple[float, str]:
        """Save while training waits; return seconds and digest."""
        began = time.perf_counter()
        done = blocking_save(self.target, self.state, self.next_progress())
        return time.perf_counter() - began, digest_of(done)

    def save_beside(self, forward_backward: Callable[[], None]) -> tuple[float, int, Save]:
        """Save beside steps; return the seconds until it was committed, and the steps."""
        began, steps = time.perf_counter(), 0
        begun = Save.begin(self.target, self.state, self.next_progress())
        # The ranks learn in the exchange of a step that all are done, and commit after it.
        over = False
        while not over:
            over = begun.snapshot.over
            self.step(forward_backward)
            steps += 1
        begun.publish()
        return time.perf_counter() - began, steps, begun

    def clean(self) -> None:
        """Let old checkpoints go, and let the disk come to rest."""
        self.target.store.retain(1, 0)
        os.sync()


def digest_of(done: Save) -> str:
    """Return the digest of this rank's file."""
    assert done.snapshot.written is not None
    return done.snapshot.written[0].sha256


@dataclass
class Times:
    """Seconds of one round."""

    step: float
    blocking: float
    stall: float
    between_steps: float
    updates_waited: float
    steps: int


def round_of(training: Training, forward_backward: Callable[[], None]) -> Times:
    """Time steps, a blocking save and one beside steps."""
    steps = [training.step(forward_backward) for _ in range(3)]
    training.clean()
    blocking, expected = training.save_and_wait()
    training.clean()
    seconds, count, done = training.save_beside(forward_backward)
    assert digest_of(done) == expected, "the two ways to save wrote different bytes"
    training.clean()
    steps += [training.step(forward_backward) for _ in range(3)]
    step = statistics.median(steps)
    waited = done.snapshot.ledger.claiming_seconds
    stall = max(0.0, seconds - count * step)
    return Times(step, blocking, stall, done.stood_still, waited, count)


def on_device(seconds: float) -> Callable[[], None]:
    """Return a pass during which the host waits."""
    return lambda: time.sleep(seconds)


def on_host(seconds: float) -> Callable[[], None]:
    """Return a pass that keeps the cores busy for about so long when nothing else runs."""
    matrix = torch.randn(1024, 1024)

    def compute(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(matrix, matrix)
        return time.perf_counter() - began

    compute(2)
    count = max(1, round(seconds / min(compute(10) / 10 for _ in range(3))))
    return lambda: void(compute(count))


def void(_: object) -> None:
    """Return nothing."""


def measure(elements: int, rounds: int, folder: Path) -> tuple[list[Row], list[str]]:
    """Time all cases in turn; return rows and notes."""
    training = Training(elements, folder)
    training.step(on_device(0.0))
    training.save_and_wait()
    training.clean()
    blocking = min(training.save_and_wait()[0] for _ in range(2))
    training.clean()
    cases = {
        (kind, share): make(share * blocking)
        for kind, share, make in (
            ("device", 0.5, on_device),
            ("device", 1.0, on_device),
            ("host", 1.0, on_host),
        )
    }
    times: dict[tuple[str, float], list[Times]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, forward_backward in cases.items():
            times[case].append(round_of(training, forward_backward))
            print(*case, times[case][-1], flush=True)
    training.optimizer.close()
    load = os.getloadavg()[0]
    size = 12 * elements / 1e9
    notes = [
        f"{size:.2f} GB of state, medians, all files of both ways equal to the last bit",
        f"room for copies: {training.target.pool.budget_bytes / 1e6:.0f} MB, a tenth of the state",
        f"the machine had {load:.1f} processes ready to run on {len(os.sched_getaffinity(0))} "
        "cores on average",
        f"goal: at most {GOAL:.0%} of a blocking save",
    ]
    return rows_of(times), notes


def rows_of(times: Mapping[tuple[str, float], list[Times]]) -> list[Row]:
    """Return a row for each case: medians over its rounds."""
    rows: list[Row] = []
    for (kind, share), found in times.items():
        middle = {
            name: statistics.median(getattr(each, name) for each in found)
            for name in ("step", "blocking", "stall", "between_steps", "updates_waited", "steps")
        }
        # Both saves of a round met the same disk and the same neighbours.
        ratio = statistics.median(each.stall / each.blocking for each in found)
        waited = statistics.median(
            (each.between_steps + each.updates_waited) / each.blocking for each in found
        )
        rows.append(
            {
                "pass on": kind,
                "pass / blocking save": share,
                "step s": middle["step"],
                "blocking save s": middle["blocking"],
                "stall s": middle["stall"],
                "between steps s": middle["between_steps"],
                "updates waited s": middle["updates_waited"],
                "steps beside": int(middle["steps"]),
                "rounds": len(found),
                "waited / blocking save": waited,
                "stall / blocking save": ratio,
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--elements", type=int, default=80_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where to save; unset: a temporary folder")
    parser.add_argument("--save", action="store_true", help="write results/checkpoint_stall.*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows, notes = measure(arguments.elements, arguments.rounds, Path(folder))
    print(table(rows))
    print("\n".join(notes))
    if arguments.save:
        save("checkpoint_stall", "Time that a checkpoint takes from training", rows, notes)


if __name__ == "__main__":
    main()
