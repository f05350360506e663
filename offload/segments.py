"""The segment table: which elements of a subgroup are updated with which numbers.

A subgroup is one flat slab of many tensors, and tensors differ: in how often they were updated, in
the hyperparameters of their row blocks, in thresholds of their own (coordinate clipping, arXiv
2306.00204). The table of a step lists runs of elements that are all alike. It is made when the
update is launched, so that schedulers may change groups while it runs.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from interlace.offload.row_blocks import FACTORS, ROW_BLOCKS, blocks_of, local_blocks
from interlace.offload.subgroup import THRESHOLD, Member, SubgroupState

NOT_HYPERPARAMETERS = ("params", "param_names", ROW_BLOCKS)

Hyperparameters = Mapping[str, object]


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A run of elements that are updated alike.

    Attributes:
        member: The parameter they belong to; of a run over several, the first.
        block: Their row block in it.
        start: Where they begin in the slabs of the subgroup.
        stop: Where they end, after `start`.
        number: Which update of these elements this is, from 1.
        hyper: Their hyperparameters, as they were when the update was launched.
    """

    member: Member
    block: int
    start: int
    stop: int
    number: int
    hyper: Hyperparameters


def segments_of(subgroup: SubgroupState, threshold: float | None = None) -> Iterator[Segment]:
    """Yield the segments of the parameters whose gradient came, in the order of the slabs, each
    within one parameter; others are left alone, as torch's optimizers do.

    Args:
        subgroup: Whose.
        threshold: That of all tensors in this step, where the whole model has one; None takes that
            of the member, where it has its own, else the group's.
    """
    of_blocks = hyperparameters_of(subgroup)
    for member in subgroup.members:
        if not member.arrivals:
            continue
        number = int(member.step) + 1
        for block, start, stop in local_blocks(subgroup.group, member.parameter):
            if start == stop:
                continue
            own = threshold
            if own is None and member.threshold is not None:
                own = float(member.threshold[block])
            hyper = of_blocks[block]
            if own is not None:
                hyper = {**hyper, THRESHOLD: own}
            first, last = member.start + start, member.start + stop
            yield Segment(member, block, first, last, number, hyper)


def hyperparameters_of(subgroup: SubgroupState) -> list[Hyperparameters]:
    """Return the present hyperparameters of every row block of a subgroup's group."""
    # Schedulers write new rates into the same tensor, and the update reads them later.
    shared = {
        key: value.item() if isinstance(value, torch.Tensor) else value
        for key, value in subgroup.group.items()
        if key not in NOT_HYPERPARAMETERS
    }
    blocks = blocks_of(subgroup.group)
    return [scaled(shared, block) for block in blocks] if blocks else [shared]


def scaled(shared: dict[str, object], block: Mapping[str, float]) -> Hyperparameters:
    """Return a group's hyperparameters times the factors of a block."""
    own = dict(shared)
    for key in FACTORS:
        value = shared.get(key)
        if key in block and isinstance(value, (int, float)):
            own[key] = value * block[key]
    return own


def merged(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Yield the same elements in fewer runs: neighbours that are updated alike together."""
    run: Segment | None = None
    for segment in segments:
        if run is None:
            run = segment
        elif (
            run.stop == segment.start
            and run.number == segment.number
            and (run.hyper is segment.hyper or run.hyper == segment.hyper)
        ):
            run = replace(run, stop=segment.stop)
        else:
            yield run
            run = segment
    if run is not None:
        yield run
