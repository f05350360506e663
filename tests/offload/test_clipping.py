"""Clipped coordinates: thresholds and counts are the same wherever state is and however it is cut.

Twins are the same update in one piece (`offload_cases.in_one_piece`), several plain parameters in
place of row blocks, and torch's own SGD.
"""

import functools
import itertools
from collections.abc import Sequence

import pytest
import torch
from offload_cases import (
    Case,
    assert_same_bits,
    in_one_piece,
    train,
)

from interlace.kernels.update import AdamW, CoordinateClip, Signum, clipped_sgd
from interlace.offload.hardware import HardwareProfile
from interlace.offload.schedule import Home

FIXED = clipped_sgd(lr=0.01, threshold=0.5, momentum=0.9, weight_decay=0.1)
LAGGED = clipped_sgd(lr=0.01, momentum=0.9, weight_decay=0.1, policy="lagged_quantile")
STATELESS = clipped_sgd(lr=0.01, threshold=0.5, momentum=0.0)
GLOBAL = clipped_sgd(lr=0.01, momentum=0.9, policy="global_quantile")
RULES = {
    "fixed": FIXED,
    "lagged": LAGGED,
    "no momentum": STATELESS,
    "global": GLOBAL,
    "nesterov": clipped_sgd(lr=0.01, threshold=0.5, nesterov=True),
    "adam": CoordinateClip(AdamW(lr=0.01), share=0.5, policy="lagged_quantile"),
    "update": CoordinateClip(AdamW(lr=0.01), threshold=0.5, stage="update"),
    "signum": Signum(lr=0.01, weight_decay=0.1),
}
EVERY_HOME = tuple(Home)


@functools.cache
def one_piece(rule: str, **settings: object) -> dict[str, torch.Tensor]:
    return in_one_piece(Case(rule=RULES[rule], **settings))


def overlaps(rule: str) -> Sequence[str]:
    return ("none", "forward") if rule == "global" else ("none", "forward", "backward")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("strategy", ["none", "host", "stride", "optimal"])
def test_a_strategy_changes_no_bit(strategy: str, rule: str, profile: HardwareProfile) -> None:
    for overlap, dtype, accumulation in itertools.product(
        overlaps(rule), (torch.float32, torch.bfloat16), (1, 3)
    ):
        same = {"dtype": dtype, "accumulation": accumulation, "groups": 3}
        for size in (1, 400):
            case = Case(
                strategy=strategy,
                overlap=overlap,
                subgroup_elements=size,
                stride=3,
                rule=RULES[rule],
                **same,
            )
            assert_same_bits(train(case, profile), one_piece(rule, **same), case)
