"""Whether the machine still computes and remembers what it should: the recompute probe and the
check of idle state, agreed on by all ranks in the exchange of a step.

What is found ends the run on all ranks at the same step, before anything more is saved. A report
per rank is left in the run folder's `evidence`, which says what, how much, and on which host.
"""

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from interlace.trainer.batches import Batch
from interlace.trainer.errors import NumericsError
from interlace.trainer.guards.idle_state import IdleState
from interlace.trainer.guards.recompute import Backward, RecomputeProbe
from interlace.trainer.objectives import Loss
from interlace.trainer.parts import Parts
from interlace.trainer.run_folder import write_json

SHOWN = 3
"""Names in a message; the report has all."""


class Integrity:
    """Checks results and memory of chosen steps.

    Args:
        parts: What the run is made of.
        way_back: Says how to go back before a step, from 1.
    """

    def __init__(self, parts: Parts, way_back: Callable[[int], str]) -> None:
        self.parts = parts
        self.way_back = way_back
        self.probe = RecomputeProbe(parts)
        self.idle = IdleState(parts)

    def backward(self, batch: Batch, backward: Backward) -> Loss:
        """Run a micro-batch, twice where it is probed; return its losses."""
        return self.probe.twice(batch, backward) if self.probe.is_due(batch) else backward(batch)

    def flags(self) -> dict[str, float]:
        """Return what this rank tells the others in the exchange of a step."""
        self.idle.before_update()
        return {
            "differed": float(bool(self.probe.differing)),
            "decayed": float(bool(self.idle.changes)),
        }

    def hear(self, step: int, flags: Mapping[str, float], backward: Backward) -> None:
        """Stop, on all ranks, if any of them found something.

        Args:
            step: From 0.
            flags: Sums over ranks of what `flags` returned.
            backward: Computes a micro-batch.

        Raises:
            NumericsError: Results or memory are not what they were; the report is in the run
                folder.
        """
        if flags["differed"]:
            self.stop_for_results(step, backward)
        if flags["decayed"]:
            self.stop_for_memory(step)
        self.probe.forget()

    def stop_for_results(self, step: int, backward: Backward) -> NoReturn:
        """Compute a third time, report, and stop."""
        verdict = self.probe.verdict(backward)
        assert self.probe.batch is not None
        rows = [self.parts.batches.training.place(step, row) for row in self.probe.batch.rows]
        bits = self.probe.differing
        found = {"verdict": verdict, "rows": rows, "differing_bits": bits}
        where, folder = self.report(f"sdc-step-{step + 1:08d}", step, found, list(bits))
        agreed = step + 1 - self.parts.config.guard.recompute_every_steps
        meaning = {
            "transient": "a third computation agrees with one of them",
            "persistent": "a third one agrees with neither, so either a fault persists or kernels "
            "add in no fixed order (then type guard.recompute_every_steps=0)",
            "undecided": "offload.overlap=backward had begun the update, so it was not computed "
            "again",
        }
        verdicts = self.parts.world.gather(verdict)
        worst = next(each for each in ("persistent", "transient", "undecided") if each in verdicts)
        raise NumericsError(
            f"step {step + 1}: computed twice, a micro-batch gave other bits in {where}; "
            f"{worst}: {meaning[worst]}. The report is in {folder}. Nothing was saved after that; "
            "take the host out, and go back to where results last agreed: "
            f"{self.way_back(max(0, agreed) + 1)}"
        )

    def stop_for_memory(self, step: int) -> NoReturn:
        """Report and stop."""
        found = self.idle.described()
        slabs = [f"{each['slab']} of subgroup {each['subgroup']}" for each in found]
        where, folder = self.report(f"state-step-{step + 1:08d}", step, {"chunks": found}, slabs)
        raise NumericsError(
            f"step {step + 1}: optimizer state on the host changed while nobody used it: {where}. "
            f"The report is in {folder}. Nothing was saved after that; test the memory of the "
            f"host, and go back to before: {self.way_back(step)}"
        )

    def report(
        self, name: str, step: int, found: Mapping[str, object], things: list[str]
    ) -> tuple[str, Path]:
        """Write this rank's report; return in words which ranks found something, and the folder."""
        world, host = self.parts.world, socket.gethostname()
        folder = self.parts.folder.path / "evidence" / name
        folder.mkdir(parents=True, exist_ok=True)
        own = {
            "step": step + 1,
            "rank": world.rank,
            "attempt": self.parts.attempt,
            "host": host,
            "device": str(world.device),
        }
        write_json(folder / f"rank-{world.rank:05d}.json", {**own, **found})
        shown = ", ".join(things[:SHOWN]) + (", ..." if len(things) > SHOWN else "")
        told = world.gather(f"{shown} on rank {world.rank} (host {host})" if things else "")
        return "; ".join(text for text in told if text), folder
