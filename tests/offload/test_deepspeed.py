"""An engine of DeepSpeed with our update, beside the same engine with its own, on two ranks.

Everything that DeepSpeed takes part in runs in one start of two processes, which takes longer than
any of it; the tests look at what came of it. `test_deepspeed_long.py` has more ways to train.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed_runs import HEAD, Shown, shown_by

from interlace.offload.deepspeed import attach, detach
from interlace.offload.deepspeed.flats import cuts_of
from interlace.offload.deepspeed.names import (
    NAMES,
    SETTINGS,
    STAGE_3,
    Unserved,
    check_names,
    check_settings,
    check_version,
)
from interlace.offload.deepspeed.rules import rule_of

SHOWN = (
    HEAD
    + """
shown = {}
for stage in (1, 2, 3):
    usual, same = Case(stage, **USUAL), Case(stage, **SAME, steps=10)
    shown[f"parity {stage}"] = lambda usual=usual: compare(usual)
    shown[f"order {stage}"] = lambda same=same: compare(replace(same, warmup=True, idle=True))
    shown[f"accessors {stage}"] = lambda same=same: accessors(replace(same, groups=1))
for stage in (2, 3):
    same = Case(stage, **SAME, steps=10)
    half = replace(same, dtype="fp16", **HALF, steps=20, homes=MIXED, idle=True)
    shown[f"overflow {stage}"] = lambda half=half: compare(half)
    saved = replace(same, steps=6)
    for ours in (True, False):
        shown[f"saved {stage} {ours}"] = lambda saved=saved, ours=ours: resume(
            saved, f"saved-{saved.stage}-{ours}", ours_saves=ours
        )
    shown[f"over {stage}"] = lambda same=same: change_over(replace(same, homes=MIXED, steps=9))
shown["missing 3"] = lambda: refused(Case(3, steps=2), "_optimizer_step")
shown["missing 2"] = lambda: refused(Case(2, steps=2), "reset_cpu_buffers")
shown["missing 1"] = lambda: refused(Case(1, steps=2), "0.20.1")
report(shown)
"""
)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    return shown_by(SHOWN, tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_thirty_steps_are_those_of_deepspeed(shown: Shown, stage: int) -> None:
    result = shown[f"parity {stage}"]
    assert result["numbers"] < 1e-6
    assert result["tensors"] < 1e-6
    # Our kernels round in another order than torch: this was not DeepSpeed's own update.
    assert not result["same bits"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_torchs_operations_they_are_the_same_to_the_last_bit(shown: Shown, stage: int) -> None:
    assert shown[f"order {stage}"]["same bits"]


@pytest.mark.parametrize("stage", [2, 3])
def test_overflows_are_skipped_and_the_loss_scale_moves(shown: Shown, stage: int) -> None:
    result = shown[f"overflow {stage}"]
    assert result["same bits"]
    assert result["scales"] > 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_functions_read_and_write_live_state(shown: Shown, stage: int) -> None:
    assert shown[f"accessors {stage}"]["same bits"]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("ours", [True, False])
def test_a_checkpoint_of_one_goes_on_under_the_other(shown: Shown, stage: int, ours: bool) -> None:
    result = shown[f"saved {stage} {ours}"]
    assert result["numbers"] == 0.0
    assert result["tensors"] == 0.0


@pytest.mark.parametrize("stage", [2, 3])
def test_a_detached_engine_is_deepspeeds_own(shown: Shown, stage: int) -> None:
    assert shown[f"over {stage}"] == {"same bits": True, "left": []}


@pytest.mark.parametrize(
    ("stage", "name"), [(1, "0.20.1"), (2, "reset_cpu_buffers"), (3, "_optimizer_step")]
)
def test_without_a_name_or_in_another_version_deepspeed_stays_and_a_warning_says_why(
    shown: Shown, stage: int, name: str
) -> None:
    result = shown[f"missing {stage}"]
    assert not result["attached"]
    assert result["same bits"]
    [said] = result["said"]
    assert "not attached" in said
    assert name in said


# ---- looked at before anything changes ------------------------------------------------------


def optimizer_of(kind: str, missing: str = "") -> Any:
    names = dict.fromkeys(NAMES[kind], True)
    names.pop(missing, None)
    return type(kind, (), names)()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in NAMES for name in NAMES[kind]])
def test_every_name_that_is_needed_is_missed(kind: str, name: str) -> None:
    check_names(optimizer_of(kind))
    with pytest.raises(Unserved, match=rf"{kind} of this DeepSpeed has no {name}$"):
        check_names(optimizer_of(kind, missing=name))


def test_another_class_of_optimizer_is_named() -> None:
    with pytest.raises(Unserved, match=r"engine\.optimizer is of class BF16_Optimizer"):
        check_names(type("BF16_Optimizer", (), {})())


@pytest.mark.parametrize("kind", NAMES)
def test_an_engine_that_does_not_offload_is_told_so_and_not_of_names_that_it_lacks(
    kind: str,
) -> None:
    attribute = "offload_optimizer" if kind == STAGE_3 else "cpu_offload"
    zero = type(kind, (), {attribute: False})()
    words = "not attached.*state is not offloaded: set offload_optimizer.device to cpu"
    with pytest.warns(UserWarning, match=words):
        assert attach(SimpleNamespace(optimizer=zero)) is None


@pytest.mark.parametrize("action", [attach, detach])
def test_a_model_that_deepspeed_has_not_had_yet_is_refused(
    action: Callable[[torch.nn.Module], object],
) -> None:
    words = r"a Linear is no engine of DeepSpeed; give what deepspeed\.initialize returned"
    with pytest.raises(TypeError, match=words):
        action(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "1.0", "0.9.5"])
def test_a_version_that_nobody_has_tried_is_named(version: str) -> None:
    check_version("0.19.8+unknown")
    with pytest.raises(Unserved, match=rf"this is DeepSpeed {version}, and 0\.19 up to but not"):
        check_version(version)


REFUSED = {
    "offload_optimizer": False,
    "cpu_offload": False,
    "swap_optimizer": True,
    "params_in_nvme_and_cpu": True,
    "partial_offload": 0.5,
    "zenflow": True,
    "use_muon": True,
    "torch_autocast_gradscaler": object(),
}


@pytest.mark.parametrize("name", [name for name, _, _ in SETTINGS])
def test_a_setting_that_means_another_update_is_named(name: str) -> None:
    usual = dict.fromkeys(REFUSED, None) | {
        "offload_optimizer": True,
        "cpu_offload": True,
        "partial_offload": 1.0,
    }
    check_settings(SimpleNamespace(**usual))
    with pytest.raises(Unserved, match=name):
        check_settings(SimpleNamespace(**usual | {name: REFUSED[name]}))


WEIGHTS = [torch.nn.Parameter(torch.zeros(3))]


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (torch.optim.RMSprop(WEIGHTS), "the optimizer is torch.optim.rmsprop.RMSprop; known are"),
        (torch.optim.AdamW(WEIGHTS, amsgrad=True), "a parameter group has amsgrad=True"),
        (torch.optim.AdamW(WEIGHTS, maximize=True), "a parameter group has maximize=True"),
        (torch.optim.Adam(WEIGHTS, weight_decay=0.1), "Adam adds weight_decay=0.1 to the gradient"),
        (torch.optim.SGD(WEIGHTS, momentum=0.9, dampening=0.1), "a parameter group has dampening"),
    ],
)
def test_an_optimizer_that_no_rule_means_is_named(
    optimizer: torch.optim.Optimizer, words: str
) -> None:
    with pytest.raises(Unserved, match=words):
        rule_of(optimizer)


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        (torch.optim.AdamW(WEIGHTS), ("exp_avg", "exp_avg_sq")),
        (torch.optim.Adam(WEIGHTS), ("exp_avg", "exp_avg_sq")),
        (torch.optim.SGD(WEIGHTS, momentum=0.9), ("momentum_buffer",)),
        (torch.optim.SGD(WEIGHTS), ()),
    ],
)
def test_an_optimizer_means_a_rule(
    optimizer: torch.optim.Optimizer, moments: tuple[str, ...]
) -> None:
    assert rule_of(optimizer).moments == moments


@pytest.mark.parametrize("whole", [1, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize("elements", [1, 64, 100, 999, 5000])
def test_pieces_are_even_cover_everything_and_begin_on_cache_lines(
    whole: int, elements: int
) -> None:
    cuts = cuts_of(whole, elements)
    assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])]
    assert cuts[-1][1] == whole
    assert all(start % 64 == 0 for start, _ in cuts)
    assert max(stop - start for start, stop in cuts) <= max(elements, 64) + 64
