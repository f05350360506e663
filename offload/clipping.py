"""Coordinate clipping across tensors and ranks: thresholds that follow the gradient, and how much
was clipped.

Kernels cut at the threshold that they are given (Pan and Li 2023, arXiv 2306.00204). Here is where
it comes from: with `lagged_quantile` each tensor's, from the gradient one step before, so that an
update need not wait for others; with `global_quantile` one for all, from the gradient of the step,
as published. Both are quantiles of histograms, whose counts add up over shards and pieces in any
order to the same numbers: every rank and every home clips at the same threshold.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as distributed

from interlace.kernels.update import CoordinateClip, UpdateRule
from interlace.kernels.update.histogram import BINS, magnitude_histogram, quantile_of
from interlace.offload.executor import Findings, Work
from interlace.offload.gradients import device_of, sharding_groups
from interlace.offload.roster import Roster
from interlace.offload.subgroup import Member

Groups = Sequence[dict[str, Any]]
"""Parameter groups of an optimizer."""

Shards = tuple[distributed.ProcessGroup, ...]
"""The process groups over which tensors are sharded; none where every rank has all of them."""


class Clipping:
    """What one optimizer knows of its thresholds.

    Args:
        rule: The update rule; most of this is idle unless it clips coordinates.
        roster: Whose coordinates.

    Attributes:
        open: Updates whose findings are not read yet.
        due: Whether a step ended since the last exchange; the same on all ranks.
        counts: Coordinates clipped and updated of every parameter, this rank's part, in the newest
            finished update.
    """

    def __init__(self, rule: UpdateRule, roster: Roster) -> None:
        self.clip = rule if isinstance(rule, CoordinateClip) else None
        self.roster = roster
        self.open: list[Work] = []
        self.due = False
        self.counts: dict[torch.Tensor, torch.Tensor] = {}

    def launched(self, work: Work) -> None:
        """Remember an update, to read later what it found."""
        if work.findings is not None:
            self.open.append(work)

    def forget_work(self) -> None:
        """Forget updates that were given up."""
        self.open, self.due = [], False

    def threshold_of(self, groups: Groups, scale: float) -> float | None:
        """Return the threshold of this step where all tensors have the same: the quantile over all
        coordinates of all gradients that came, on all ranks; None with another policy. Every rank
        must call it.

        Args:
            groups: All parameter groups; they decide in which order ranks meet.
            scale: Gradients are multiplied by this first.
        """
        if self.clip is None or self.clip.policy != "global_quantile":
            return None
        gradients = dict(self.roster.gradients())

        def of_shards(members: Sequence[Member]) -> torch.Tensor:
            came = [gradients[m.parameter].view(-1) for m in members if m.parameter in gradients]
            rows = fetched([magnitude_histogram(gradient, scale) for gradient in came])
            total = torch.zeros(BINS + 1, dtype=torch.int64, device="cpu")
            total[:BINS] = sum(rows, total[:BINS])
            total[BINS] = sum(gradient.numel() for gradient in came)
            return total

        tables = [table for _, table in self.summed(groups, of_shards)]
        total = torch.stack([of_shards(()), *tables]).sum(0)
        return quantile_of(total[:BINS], self.clip.share, int(total[BINS]))

    def finish(self, groups: Groups) -> None:
        """Read what the updates of the last step found, once; no work is under way any more. Where
        thresholds are lagged every rank must call it, at the same point of its work.
        """
        if not self.due:
            # Updates during backward belong to a step that goes on: they are read with the rest.
            return
        works, self.open, self.due = self.open, [], False
        if works:
            self.counts = counts_of([w.findings for w in works if w.findings is not None])
        if self.clip is not None and self.clip.policy == "lagged_quantile":
            self.learn(groups, works)

    def learn(self, groups: Groups, works: Sequence[Work]) -> None:
        """Make the quantiles of the last step's gradients the thresholds of the next. A tensor all
        of whose gradient is zero keeps what it has.
        """
        assert self.clip is not None
        found: dict[tuple[Member, int], torch.Tensor] = {}
        for work in works:
            for segment, histogram in work.findings.histograms if work.findings else ():
                key = (segment.member, segment.block)
                found[key] = found[key] + histogram if key in found else histogram
        nothing = torch.zeros(BINS, dtype=torch.int64, device="cpu")

        def of_shards(members: Sequence[Member]) -> torch.Tensor:
            rows = [found.get(key, nothing) for key in blocks_of_all(members)]
            return torch.stack(fetched(rows))

        for members, table in self.summed(groups, of_shards):
            for (member, block), histogram in zip(blocks_of_all(members), table, strict=True):
                if bool(histogram.any()):
                    assert member.threshold is not None
                    member.threshold[block] = quantile_of(histogram, self.clip.share)

    def fractions(self, groups: Groups) -> dict[torch.Tensor, float]:
        """Return the share of clipped coordinates of every parameter that the newest finished
        update changed, over all shards. Every rank must call it.
        """
        nothing = torch.zeros(2, dtype=torch.int64, device="cpu")

        def of_shards(members: Sequence[Member]) -> torch.Tensor:
            return torch.stack([self.counts.get(m.parameter, nothing) for m in members])

        shares: dict[torch.Tensor, float] = {}
        for members, table in self.summed(groups, of_shards):
            for member, (clipped, updated) in zip(members, table.tolist(), strict=True):
                if updated:
                    shares[member.parameter] = clipped / updated
        return shares

    def summed(
        self, groups: Groups, of_shards: Callable[[Sequence[Member]], torch.Tensor]
    ) -> list[tuple[list[Member], torch.Tensor]]:
        """Return members that are sharded alike, and an integer table of theirs, summed over their
        shards, on the CPU.

        The order of the parameter groups decides in which reductions ranks meet, whichever
        gradients came and however subgroups are cut.
        """
        alike: dict[Shards, list[Member]] = {}
        for group in groups:
            for parameter in group["params"]:
                if parameter in self.roster.members:
                    member = self.roster.members[parameter][1]
                    alike.setdefault(sharding_groups(parameter), []).append(member)
        tables: list[tuple[list[Member], torch.Tensor]] = []
        for over, members in alike.items():
            table = of_shards(members)
            for group in over:
                table = table.to(device_of(group))
                distributed.all_reduce(table, group=group)
            tables.append((members, table.cpu()))
        return tables


def blocks_of_all(members: Sequence[Member]) -> list[tuple[Member, int]]:
    """Return every row block of every member that learns its thresholds."""
    return [
        (member, block)
        for member in members
        if member.threshold is not None
        for block in range(len(member.threshold))
    ]


def counts_of(findings: Sequence[Findings]) -> dict[torch.Tensor, torch.Tensor]:
    """Return coordinates clipped and updated of every parameter, int64 (2,) on the CPU."""
    counts: dict[torch.Tensor, torch.Tensor] = {}
    pairs = [pair for found in findings for pair in found.clipped]
    cut = fetched([torch.as_tensor(clipped) for _, clipped in pairs])
    for (segment, _), clipped in zip(pairs, cut, strict=True):
        nothing = torch.zeros(2, dtype=torch.int64, device="cpu")
        counts.setdefault(segment.member.parameter, nothing)[0] += clipped
    # Parts of one segment are listed one by one.
    for segment in dict.fromkeys(segment for segment, _ in pairs):
        counts[segment.member.parameter][1] += segment.stop - segment.start
    return counts


def fetched(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors of one shape and dtype on the CPU, those of a device in one transfer."""
    away = [tensor for tensor in tensors if tensor.is_cuda]
    came = iter(torch.stack(away).cpu() if away else ())
    return [next(came) if tensor.is_cuda else tensor for tensor in tensors]


def mean_fraction(fractions: Mapping[torch.Tensor, float]) -> float:
    """Return the share of clipped coordinates over all parameters together."""
    total = sum(parameter.numel() for parameter in fractions)
    clipped = sum(share * parameter.numel() for parameter, share in fractions.items())
    return clipped / total if total else 0.0
