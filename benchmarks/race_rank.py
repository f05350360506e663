"""One rank of one contender of `benchmarks/versus_deepspeed.py`, in a process of its own.

Started by `race_processes` with the torchrun variables set; writes `rank-N.json` into the folder it
is given: what was measured, or the last line of what went wrong.

What is measured of each micro-batch: a block of iterations with updates and one of iterations whose
gradients are dropped, each from the end of one backward pass to the end of a later one, so that
exactly as many updates lie between as iterations, wherever they run; and single iterations in which
forward, backward and update are waited for one by one.
"""

import importlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import count, islice
from pathlib import Path

import psutil
import torch
import torch.distributed as distributed
from race_contenders import Contender, chosen
from race_engines import Place, Racer, compile_adam, open_ranks, racer_of
from race_tracks import SMALL, Track, track_of

from interlace.launch.launchers.parents import end_with_parent
from interlace.offload.cores import bind_rank
from interlace.offload.hardware import HardwareProfile, with_active_ranks
from interlace.offload.measure import known_profile

PROFILE = "profile"
"""In the place of a contender's name: look at the machine, and build what DeepSpeed compiles."""

PHASES = 2
"""Iterations in which everything is waited for."""


@dataclass
class Timing:
    """Seconds of one micro-batch, on one rank.

    Attributes:
        forward: Of a pass that is waited for.
        backward: Likewise.
        update: From the end of backward until the new weights and all state are in place.
        iteration: With an update that may run beside other work.
        compute: Without update; None where an iteration cannot end without one.
        device_bytes: Most that was allocated on the device.
        predicted_update: What the performance model says of the update, where it is ours.
        predicted_exposed: What it says is not hidden.
        bound: Below which no homes can bring the update.
    """

    forward: float = 0.0
    backward: float = 0.0
    update: float = 0.0
    iteration: float = 0.0
    compute: float | None = None
    device_bytes: int = 0
    predicted_update: float | None = None
    predicted_exposed: float | None = None
    bound: float | None = None


@dataclass
class Finding:
    """What one rank found of one contender.

    Attributes:
        parameters: Of the whole model.
        final_loss: Of the small model after the steps of its track, in float32, on tokens that
            nobody trains on; mean of all ranks. None where only time was measured.
        rough_loss: The same in bfloat16, where that is what time is measured in.
        timings: By rows of a micro-batch, as text.
        host_bytes: Most that this process and those it started had in memory.
        error: The last line of what went wrong; empty where nothing did.
    """

    parameters: int = 0
    final_loss: float | None = None
    rough_loss: float | None = None
    timings: dict[str, Timing] = field(default_factory=dict[str, Timing])
    host_bytes: int = 0
    error: str = ""


class Trial:
    """One contender on one track.

    Args:
        contender: Who.
        track: Over what.
        place: Where.
        quick: Whether losses have been compared before: then only time is measured.
    """

    def __init__(self, contender: Contender, track: Track, place: Place, quick: bool) -> None:
        self.contender, self.track, self.place, self.quick = contender, track, place, quick
        self.steps = count()
        self.found = Finding()

    def run(self) -> Finding:
        """Measure everything."""
        track, learns = self.track, not self.quick
        if learns and not track.steps:
            self.found.final_loss = self.small_loss(SMALL)
            self.found.rough_loss = self.small_loss(replace(SMALL, bf16=True))
        racer = racer_of(self.contender, track, self.place)
        self.found.parameters = sum(
            getattr(p, "ds_numel", p.numel()) for p in racer.model.parameters()
        )
        if learns and track.steps:
            self.found.final_loss = self.learn(racer)
        for rows in track.rows:
            self.found.timings[str(rows)] = self.timed(racer, rows)
        racer.close()
        self.found.host_bytes = host_bytes()
        return self.found

    def small_loss(self, track: Track) -> float:
        """Return the loss in which the training of a small model ends."""
        trial = Trial(self.contender, track, self.place, quick=True)
        racer = racer_of(self.contender, track, self.place)
        try:
            return trial.learn(racer)
        finally:
            racer.close()

    def learn(self, racer: Racer) -> float:
        """Train for the steps of the track; return the loss of tokens that nobody trains on."""
        for tokens in islice(self.batches(self.track.rows[0]), self.track.steps):
            racer.backward(racer.loss(tokens))
            racer.update()
        racer.finish()
        world, track = self.place.world, self.track
        losses: list[torch.Tensor] = []
        with torch.no_grad():
            for number in range(4):
                tokens = track.tokens(-2 - number, world.rank, track.rows[-1])
                losses.append(racer.loss(tokens.to(self.place.device)).float())
        mean = torch.stack(losses).mean().cpu()
        distributed.all_reduce(mean)
        return float(mean) / world.size

    def batches(self, rows: int) -> Iterator[torch.Tensor]:
        """Yield the tokens of one step after the other."""
        while True:
            tokens = self.track.tokens(next(self.steps), self.place.world.rank, rows)
            yield tokens.to(self.place.device)

    def timed(self, racer: Racer, rows: int) -> Timing:
        """Measure one micro-batch."""
        track, found = self.track, Timing()
        if self.place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.place.device)
        # Tokens are made beforehand: what they take is no part of training.
        batches = list(islice(self.batches(rows), 4))
        self.block(racer, batches, 1, updates=True)
        found.iteration = self.block(racer, batches, track.block, updates=True)
        if self.contender.drops:
            found.compute = self.block(racer, batches, max(2, track.block // 2), updates=False)
        phases = [self.phases(racer, batches[0]) for _ in range(PHASES)]
        found.forward, found.backward, found.update = (
            statistics.median(column) for column in zip(*phases, strict=True)
        )
        expected = racer.forecast(found.forward, found.backward)
        if expected is not None:
            found.predicted_update = expected.update
            found.predicted_exposed = expected.exposed
            found.bound = expected.bound
        if self.place.device.type == "cuda":
            found.device_bytes = torch.cuda.max_memory_allocated(self.place.device)
        return found

    def block(
        self, racer: Racer, batches: list[torch.Tensor], length: int, *, updates: bool
    ) -> float:
        """Return the seconds of one of so many iterations."""
        start = 0.0
        for number in range(length + 1):
            loss = racer.loss(batches[number % len(batches)])
            if updates:
                racer.backward(loss)
            else:
                racer.backward_only(loss)
            if number in (0, length):
                self.place.synchronize_compute()
                start = time.perf_counter() - start
            if updates:
                racer.update()
        return start / length

    def phases(self, racer: Racer, tokens: torch.Tensor) -> tuple[float, float, float]:
        """Return the seconds of forward, backward and update, each waited for."""
        racer.finish()
        marks = [time.perf_counter()]
        loss = racer.loss(tokens)
        self.place.synchronize()
        marks.append(time.perf_counter())
        racer.backward(loss)
        self.place.synchronize()
        marks.append(time.perf_counter())
        racer.update()
        racer.finish()
        marks.append(time.perf_counter())
        return marks[1] - marks[0], marks[2] - marks[1], marks[3] - marks[2]


def host_bytes() -> int:
    """Return the most that this process and its children have had in memory, each at its own
    time.
    """
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        status = Path(f"/proc/{process.pid}/status")
        try:
            lines = status.read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return total


def look_at_the_machine(folder: Path, device: torch.device) -> Finding:
    """Leave the machine's profile in the folder; let DeepSpeed compile what it needs while nobody's
    time is taken.
    """
    profile = known_profile(device, lambda text: print(text, flush=True))
    (folder / "profile.json").write_text(profile.model_dump_json(), encoding="utf-8")
    try:
        compile_adam()
        # On a CPU it compiles collectives of its own, when ranks meet.
        open_ranks(device, 0, 1, f"{folder}/rendezvous")
        importlib.import_module("deepspeed").init_distributed("gloo", verbose=False)
    except Exception as error:
        return Finding(error=f"DeepSpeed cannot compile what it needs: {last_line(error)}")
    return Finding()


def last_line(error: BaseException) -> str:
    """Return kind and last line of what an exception says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def found_by(words: list[str]) -> Finding:
    """Do what the command line says: `NAME TRACK FOLDER QUICK`."""
    name, track, folder, quick = words
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if name == PROFILE:
        return look_at_the_machine(Path(folder), device)
    bind_rank(device)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    world = open_ranks(device, rank, size, f"{folder}/rendezvous")
    kept = (Path(folder).parent / "profile.json").read_text(encoding="utf-8")
    profile = with_active_ranks(HardwareProfile.model_validate_json(kept), size)
    (contender,) = chosen([name])
    return Trial(contender, track_of(track), Place(world, profile), quick == "quick").run()


def main() -> None:
    """Run, write what was found, and leave without waiting for anybody's threads."""
    end_with_parent()
    # Where memory runs out, this process is to be the one that goes, not the race.
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    folder = Path(sys.argv[3])
    failed = False
    try:
        found = found_by(sys.argv[1:])
    except BaseException as error:
        traceback.print_exc()
        found, failed = Finding(error=last_line(error)), True
    path = folder / f"rank-{os.environ['RANK']}.json"
    path.write_text(json.dumps(asdict(found)), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads and DeepSpeed's processes may keep an interpreter that shuts down orderly.
    os._exit(1 if failed else 0)


if __name__ == "__main__":
    main()
