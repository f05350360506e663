"""`interlace plan` of a run whose engine is DeepSpeed's ZeRO."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from interlace.launch.cli import main

SEVEN_BILLION = ("gpt_7b_offload", "--hardware", "h200", "--ranks", "4")
ZERO = (*SEVEN_BILLION, "parallel.engine=deepspeed", "offload.split_master=false")

PlanOf = Callable[..., Any]


def test_the_page_says_engine_and_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *ZERO, "parallel.zero_stage=2"]) == 0
    page = capsys.readouterr().out
    assert "  engine                   DeepSpeed, ZeRO stage 2\n" in page
    assert "  engine buffers" in page
    assert main(["plan", *SEVEN_BILLION]) == 0
    assert "  engine                   FSDP2\n" in capsys.readouterr().out


def test_every_stage_takes_less_of_the_device_than_the_one_before(plan_of: PlanOf) -> None:
    plans = [plan_of(*ZERO, f"parallel.zero_stage={stage}") for stage in (1, 2, 3)]
    parameters = plans[0]["parameters"]
    weights = [plan["memory"]["device"]["weights"] for plan in plans]
    assert weights == [2 * parameters, 2 * parameters, 2 * parameters // 4]
    totals = [plan["memory"]["device"]["total"] for plan in plans]
    assert totals[0] - totals[1] > 3 * parameters
    assert totals[1] - totals[2] > parameters
    assert [(plan["engine"], plan["zero_stage"]) for plan in plans] == [
        ("deepspeed", stage) for stage in (1, 2, 3)
    ]


def test_no_update_runs_beside_anything(plan_of: PlanOf) -> None:
    plan = plan_of(*ZERO)["offload"]
    assert plan["overlap"] == "none"
    assert {forecast["overlap"] for forecast in plan["forecasts"]} == {"none"}
    for forecast in plan["forecasts"]:
        assert forecast["exposed_seconds"] == forecast["update_seconds"] > 0


def test_gradients_of_staged_state_wait_on_the_host_in_float32(plan_of: PlanOf) -> None:
    words = ("offload.strategy=stride", "offload.stride=2")
    zero, fsdp2 = plan_of(*ZERO, *words), plan_of(*SEVEN_BILLION, *words)
    part = zero["parameters"] // 4
    assert zero["memory"]["device"]["gradients"] == 0
    assert zero["memory"]["host"]["gradients"] == 4 * part
    assert fsdp2["memory"]["device"]["gradients"] > 0
    # Master, two moments and the gradient of a subgroup of 100 million, at most, in each slot.
    biggest = -(-part // -(-part // 100_000_000))
    assert zero["memory"]["device"]["staging_slots"] == 2 * 16 * biggest


def test_state_on_the_device_has_masters_of_its_own(plan_of: PlanOf) -> None:
    plan = plan_of(*ZERO, "offload.strategy=none")
    part = plan["parameters"] // 4
    device, host = plan["memory"]["device"], plan["memory"]["host"]
    assert (device["master_weights"], device["moments"]) == (4 * part, 8 * part)
    assert device["gradients"] == 4 * part
    assert host["total"] == 0


def test_what_does_not_fit_is_not_told_to_do_what_zero_cannot(plan_of: PlanOf) -> None:
    words = ("gpt_20b_offload", "--hardware", "4xa100-pcie4", "--ranks", "4")
    more = ("parallel.engine=deepspeed", "offload.split_master=false", "parallel.zero_stage=2")
    plan = plan_of(*words, *more, "offload.strategy=host", "offload.overlap=none")
    problem = plan["offload"]["problem"]
    assert "engine buffers" in problem
    assert "parallel.zero_stage=3, which divides weights too" in problem
    assert "offload.moments=bfloat16" not in problem


def test_conflicts_with_a_users_own_settings_are_told_before_a_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    assert main(["plan", *ZERO, f"parallel.deepspeed_config={file}"]) == 2
    said = capsys.readouterr().err
    assert f"parallel.deepspeed_config={file}: zero_optimization.stage is 1, and the recipe" in said


def test_rows_with_rates_of_their_own_are_refused_before_a_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("quickstart_hybrid", "mup.enabled=true", "mup.base_width=64")
    assert main(["plan", *words]) == 0
    assert main(["plan", *words, "parallel.engine=deepspeed"]) == 2
    assert "parallel.engine=deepspeed has one rate per tensor" in capsys.readouterr().err
