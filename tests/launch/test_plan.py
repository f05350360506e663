"""`interlace plan`: what it predicts, what it refuses, how it looks."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from interlace.launch.cli import main
from interlace.launch.offload_table import parse_sweep
from interlace.launch.plan_table import make_setting
from interlace.launch.typeset import typeset
from interlace.offload.hardware import load_profile
from interlace.offload.timeline import Timeline
from interlace.trainer.config import list_recipes, load_recipe
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.cost import idle_parameters, parameter_count
from interlace.trainer.observe.units import human_count, human_flops, human_seconds
from interlace.trainer.plan import active_parameters

PlanOf = Callable[..., Any]


@pytest.fixture
def page_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `interlace plan WORDS` and return the page."""

    def page(*words: str) -> str:
        assert main(["plan", *words]) == 0
        return capsys.readouterr().out

    return page


def chosen(plan: Any) -> Any:
    return next(
        f for f in plan["offload"]["forecasts"] if f["strategy"] == plan["offload"]["strategy"]
    )


@pytest.mark.parametrize("ranks", [8, 16])
def test_table_and_sweep_say_the_same(ranks: int, plan_of: PlanOf) -> None:
    words = ("gpt_20b_offload", "--hardware", "h200", "--ranks", str(ranks))
    plan = plan_of(*words, "--sweep", "gpus=8..16")
    row = next(row for row in plan["scaling"] if row["gpus"] == ranks)
    placement = plan["offload"]
    assert placement["communication_seconds"] == row["communication"] > 1
    slowest = max(placement["compute_seconds"], placement["communication_seconds"])
    for forecast in placement["forecasts"]:
        assert forecast["step_seconds"] == slowest + forecast["exposed_seconds"]
    assert row["step"] == chosen(plan)["step_seconds"]
    assert row["device_bytes"] == plan["memory"]["device"]["total"]


def test_communication_that_compute_does_not_hide_is_said(page_of: Callable[..., str]) -> None:
    words = ("gpt_20b_offload", "--hardware", "h200", "--ranks")
    assert "13.5 s, hidden beside compute" in page_of(*words, "8")
    crowd = ("gpt_20b_offload", "--hardware", "4xh100-pcie5", "--ranks", "512")
    assert "1.49 s, which compute does not hide" in page_of(*crowd)
    assert "communication            none, one rank" in page_of(*words, "1")


def test_what_cannot_run_is_said_first_and_the_page_stays_readable(
    page_of: Callable[..., str],
) -> None:
    page = page_of("gpt_20b_offload", "--hardware", "4xa100-pcie4", "train.microbatch_rows=16")
    assert page.splitlines()[2] == (
        "DOES NOT FIT  offload.strategy=optimal: needs 66.3 GiB of device memory (38.2 GiB "
        "weights, 28.2 GiB activations), and there are 37.6 GiB per rank, reserves left out; type "
        "more ranks that share the weights (plan --ranks N)"
    )
    assert "> optimal   forward  needs 66.3 GiB device, has 37.6" in page
    assert "Memory of one rank" in page


def test_activations_that_exceed_the_device_name_the_settings_that_shrink_them(
    plan_of: PlanOf,
) -> None:
    words = ("train.microbatch_rows=64", "train.activation_checkpointing=none")
    plan = plan_of("gpt_1b_offload", "--hardware", "4xa100-pcie4", *words)
    problem = plan["offload"]["problem"]
    assert "train.activation_checkpointing=block" in problem
    assert "train.microbatch_rows=32" in problem
    assert "more ranks" in problem
    assert all(forecast["shortage"] for forecast in plan["offload"]["forecasts"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "offload.device_budget_gib=200",
            "offload.device_budget_gib=200: a rank may fill 75.2 GiB of device memory on this "
            "machine; type offload.device_budget_gib=none for what is left of it, or 75.1 at most",
        ),
        (
            "offload.host_budget_gib=9999",
            "offload.host_budget_gib=9999: a rank may fill 452.7 GiB of host memory on this "
            "machine; type offload.host_budget_gib=none for what is left of it, or 452.6 at most",
        ),
    ],
)
def test_a_budget_beyond_the_machine_is_refused_in_words(
    setting: str, message: str, page_of: Callable[..., str], plan_of: PlanOf
) -> None:
    words = ("gpt_7b_offload", "--hardware", "4xh100-pcie5", setting)
    assert f"DOES NOT FIT  {message}" in page_of(*words).splitlines()
    plan = plan_of(*words, "--sweep", "gpus=1..4")
    assert plan["offload"]["device_budget_bytes"] <= plan["device_memory_bytes"]
    assert plan["offload"]["host_budget_bytes"] <= plan["host_memory_bytes"]
    assert {len(row["problem"]) < 70 for row in plan["scaling"]} == {True}


def test_reasons_in_a_table_are_short(plan_of: PlanOf, tmp_path: Path) -> None:
    card = card_of_24_gb(tmp_path)
    plan = plan_of("gpt_20b_offload", "--hardware", card, "--sweep", "gpus=1..4")
    reason = "needs 41.7 GiB device, has 22.6; 305.3 GiB host, has 57.6"
    assert chosen(plan)["shortage"] == plan["scaling"][0]["problem"] == reason
    shortages = [forecast["shortage"] for forecast in plan["offload"]["forecasts"]]
    assert shortages[0] == "needs 308.8 GiB device, has 22.6"
    assert max(map(len, shortages)) <= 70


def test_a_budget_on_a_cpu_is_held_against_the_memory_of_the_host(plan_of: PlanOf) -> None:
    plan = plan_of("quickstart_offload", "offload.device_budget_gib=1000000")
    assert "of host memory on this machine" in plan["offload"]["impossible"][0]
    assert plan["offload"]["device_budget_bytes"] < plan["host_memory_bytes"]


def test_homes_have_counts_and_bytes_and_memory_is_listed_by_kind(plan_of: PlanOf) -> None:
    plan = plan_of("gpt_7b_offload", "--hardware", "4xh100-pcie5")
    homes = chosen(plan)["homes"]
    assert list(homes) == ["resident", "staged", "host"]
    assert all(home["subgroups"] > 0 and home["bytes"] > 2**30 for home in homes.values())
    assert sum(home["parameters"] for home in homes.values()) == plan["parameters"]
    device, host = plan["memory"]["device"], plan["memory"]["host"]
    assert device["master_weights"] + device["moments"] == homes["resident"]["bytes"]
    on_host = homes["staged"]["bytes"] + homes["host"]["bytes"]
    assert host["master_weights"] + host["moments"] == on_host
    assert device["staging_slots"] > 0
    assert host["total"] == chosen(plan)["host_bytes"] < plan["host_memory_bytes"]


def test_every_strategy_is_predicted_under_the_overlap_it_would_get(plan_of: PlanOf) -> None:
    words = ("gpt_1b_offload", "--hardware", "4xh100-pcie5")
    found = {}
    for strategy in ("none", "host", "stride", "optimal"):
        plan = plan_of(*words, f"offload.strategy={strategy}")
        found[strategy] = {f["strategy"]: f for f in plan["offload"]["forecasts"]}
        assert chosen(plan)["overlap"] == plan["offload"]["overlap"]
    # Whichever strategy is asked for, each has the same forecast.
    assert found["none"] == found["host"] == found["stride"] == found["optimal"]
    overlaps = {name: forecast["overlap"] for name, forecast in found["none"].items()}
    assert overlaps == {
        "none": "none",
        "host": "forward",
        "stride": "forward",
        "optimal": "forward",
    }
    assert found["none"]["none"]["exposed_seconds"] == found["none"]["none"]["update_seconds"] > 0


def test_advice_is_something_that_can_be_typed(page_of: Callable[..., str]) -> None:
    words = ("gpt_7b_offload", "--hardware", "gh200", "train.tokens_per_step=8192")
    stride = ("offload.strategy=stride", "offload.stride=2")
    page = page_of(*words, *stride)
    assert "offload.strategy=optimal (and offload.stride=none) would take " in page
    promised = page.split(" would take ")[1].split(" a step")[0]
    page = page_of(*words, *stride, "offload.strategy=optimal", "offload.stride=none")
    row = next(line for line in page.splitlines() if line.startswith("> optimal"))
    assert promised in row


def card_of_24_gb(folder: Path) -> str:
    """A profile of a machine with one such card: an A100's rates and less memory."""
    document = load_profile("4xa100-pcie4").model_dump(mode="json")
    document |= {"name": "card", "device_memory_bytes": 24 * 2**30, "host_memory_bytes": 64 * 2**30}
    document["rates"]["ranks_per_node"] = 1
    (folder / "card.json").write_text(json.dumps(document), encoding="utf-8")
    return str(folder / "card.json")


def test_recipes_offload_on_the_machines_that_they_name(plan_of: PlanOf, tmp_path: Path) -> None:
    card = card_of_24_gb(tmp_path)
    for words, least, most in (
        (("gpt_1b_offload", "--hardware", card), 0.4, 0.7),
        (("gpt_7b_offload", "--hardware", "4xh100-pcie5"), 0.4, 0.6),
        (("gpt_20b_offload", "--hardware", "4xh100-pcie5", "--ranks", "4"), 0.05, 0.2),
    ):
        plan = plan_of(*words)
        found = {f["strategy"]: f for f in plan["offload"]["forecasts"]}
        assert found["none"]["problem"], "it would not need to offload"
        homes = chosen(plan)["homes"]
        total = sum(home["bytes"] for home in homes.values())
        assert least < 1 - homes["resident"]["bytes"] / total < most
        assert chosen(plan)["step_seconds"] == min(
            f["step_seconds"] for f in found.values() if f["problem"] is None
        )
    plain = ("train.microbatch_rows=4", "train.activation_checkpointing=block")
    recomputed = plan_of("gpt_1b_offload", "--hardware", card, "offload.strategy=none", *plain)
    plan = plan_of("gpt_1b_offload", "--hardware", card)
    assert recomputed["offload"]["problem"] is None
    assert chosen(plan)["step_seconds"] < 0.8 * chosen(recomputed)["step_seconds"]


@pytest.mark.parametrize("name", ["gpt_1b_offload", "gpt_7b_offload", "gpt_20b_offload"])
def test_recipes_tell_their_size(name: str, plan_of: PlanOf) -> None:
    told = list_recipes()[name].split(" parameters")[0]
    size = human_count(plan_of(name, "--hardware", "h200", "--ranks", "4")["parameters"])
    assert size.replace(".5", "") == told if name == "gpt_20b_offload" else size == told


def test_a_shorter_quickstart_needs_no_other_span(plan_of: PlanOf) -> None:
    assert plan_of("quickstart_offload", "train.steps=8")["steps"] == 8


def test_a_checkpoint_is_as_large_as_the_rule_makes_it(plan_of: PlanOf) -> None:
    for words, size in (
        ((), 12),
        (("offload.moments=bfloat16",), 8),
        (("optimizer.rule=sgd",), 8),
        (("optimizer.rule=sgd", "offload.moments=bfloat16"), 6),
        (("optimizer.rule=clipped_sgd", "optimizer.beta1=0"), 4),
    ):
        plan = plan_of("gpt_1b_offload", "--hardware", "h200", *words)
        assert plan["checkpoint_bytes"] == size * plan["parameters"]


@pytest.mark.parametrize("machine", ["h200", "4xh100-pcie5"])
def test_clipped_updates_are_shorter_and_hidden_beside_backward(
    machine: str, plan_of: PlanOf
) -> None:
    words = ("gpt_7b_offload", "--hardware", machine)
    adamw = plan_of(*words)
    assert adamw["offload"]["reference"] is None
    for also, moments in (
        ((), 4),
        (("offload.moments=bfloat16",), 2),
        (("optimizer.beta1=0",), 0),
    ):
        plan = plan_of(*words, "optimizer.rule=clipped_sgd", *also)
        placement, reference = plan["offload"], plan["offload"]["reference"]
        assert (placement["overlap"], reference["overlap"]) == ("backward", "forward")
        assert placement["hidden_window"]["backward"] > 0
        assert placement["moment_bytes"] == moments
        if "offload.moments=bfloat16" not in also:
            assert reference["moment_bytes"] == 8
            assert reference["exposed_seconds"] == chosen(adamw)["exposed_seconds"]
        for before, now in zip(adamw["offload"]["forecasts"], placement["forecasts"], strict=True):
            if now["problem"] is None and before["problem"] is None:
                assert 0 < now["exposed_seconds"] < before["exposed_seconds"], now["strategy"]
                assert now["update_seconds"] < before["update_seconds"]


def test_a_rule_is_compared_with_adamw_in_words_and_pictures(
    page_of: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Timeline] = {}
    monkeypatch.setattr(
        "interlace.launch.offload_table.draw_gantt", lambda found, _: drawn.update(found)
    )
    words = ("gpt_7b_offload", "--hardware", "4xh100-pcie5", "--timeline", str(tmp_path / "a.png"))
    page = page_of(*words, "optimizer.rule=clipped_sgd")
    assert "moments                  4 bytes per parameter, AdamW's 8" in page
    assert (
        "update                   101 ms beside backward, 791 us of it exposed; AdamW's 321 ms "
        "beside forward, 65.5 ms of it exposed"
    ) in page
    assert {timeline.backward > 0.5 for timeline in drawn.values()} == {True}
    drawn.clear()
    assert "AdamW's" not in page_of(*words)
    assert {timeline.backward for timeline in drawn.values()} == {0.0}


@pytest.mark.parametrize(
    ("words", "overlap"),
    [
        ((), "backward"),
        (("optimizer.clip=1.0",), "forward"),
        (("coordinate_clip.policy=lagged_quantile",), "backward"),
        (("coordinate_clip.policy=global_quantile",), "forward"),
        (("optimizer.rule=adamw", "coordinate_clip.stage=gradient"), "backward"),
        (("optimizer.rule=adamw",), "forward"),
        (("optimizer.rule=signum", "optimizer.clip=0"), "backward"),
    ],
    ids=lambda value: " ".join(value) or "plain" if isinstance(value, tuple) else value,
)
def test_updates_run_beside_backward_where_none_waits_for_all_gradients(
    words: tuple[str, ...], overlap: str, plan_of: PlanOf
) -> None:
    plan = plan_of("gpt_1b_offload", "--hardware", "h200", "optimizer.rule=clipped_sgd", *words)
    assert plan["offload"]["overlap"] == overlap


def test_ranks_of_a_cpu_share_its_cores(plan_of: PlanOf) -> None:
    one, two = (plan_of("quickstart", "--ranks", ranks) for ranks in ("1", "2"))
    # Half the rows each, on half the cores.
    assert two["offload"]["compute_seconds"] == pytest.approx(one["offload"]["compute_seconds"])


def test_a_sweep_needs_no_ranks_where_replicas_want_several(plan_of: PlanOf) -> None:
    words = ("gpt_7b_offload", "--hardware", "h200", "parallel.replicas=2")
    plan = plan_of(*words, "--sweep", "gpus=1..12")
    assert plan["world_size"] == 2
    assert [row["gpus"] for row in plan["scaling"]] == [1, 2, 4, 8, 12]
    assert plan["scaling"][0]["problem"] == "parallel.replicas=2 does not divide it"
    assert plan["scaling"][-1]["problem"] == "the 256 rows of a step do not split evenly"
    assert plan["scaling"][1]["problem"] is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("8", "what is swept is the number of GPUs; write such as --sweep gpus=1..1024"),
        ("nodes=1..8", "what is swept is the number of GPUs; write such as --sweep gpus=1..1024"),
        ("gpus=1.5..8", "both ends must be whole numbers, such as --sweep gpus=1..1024"),
        ("gpus=0..8", "must start at 1 or more, such as --sweep gpus=1..1024"),
        ("gpus=8..1", "ends before it begins; write --sweep gpus=1..8"),
        ("gpus=1..100000", "may end at 65536 at most; write --sweep gpus=1..65536"),
    ],
)
def test_a_sweep_that_is_none_is_told_why(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sweep(text)
    assert str(caught.value) == f"--sweep {text}: {reason}"


@pytest.mark.parametrize("ranks", ["0", "-3"])
def test_no_ranks_are_refused(ranks: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart", "--ranks", ranks]) == 2
    assert capsys.readouterr().err == (
        f"interlace: --ranks {ranks}: a run has at least one rank; type --ranks 1\n"
    )


def test_subgroups_that_would_be_too_many_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart_offload", "offload.subgroup_elements=1"]) == 2
    assert capsys.readouterr().err == (
        "interlace: offload.subgroup_elements=1: would cut the 1,902,848 parameters of a rank into "
        "1,902,848 subgroups, and handing over more than 100,000 takes longer than updating them; "
        "type offload.subgroup_elements=1903 or more\n"
    )


def unusable(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "file").write_text("", encoding="utf-8")
    return {"is a folder": tmp_path, "cannot be written": tmp_path / "file" / "lanes.png"}


@pytest.mark.parametrize("reason", ["is a folder", "cannot be written"])
@pytest.mark.parametrize(
    "words",
    [["plan", "quickstart", "--timeline"], ["profile", "--output"]],
    ids=["plan", "profile"],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    words: list[str],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("interlace.offload.measure.measure", never)
    path = unusable(tmp_path)[reason]
    assert main([*words, str(path)]) == 2
    assert f"interlace: {words[-1]} {path}: {reason}" in capsys.readouterr().err


def test_a_shown_profile_can_be_written_and_planned_with(
    tmp_path: Path, plan_of: PlanOf, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.json"
    assert main(["profile", "--show", "gh200", "--output", str(mine)]) == 0
    assert f"wrote {mine}" in capsys.readouterr().err
    words = ("gpt_7b_offload", "--hardware")
    assert plan_of(*words, str(mine)) == plan_of(*words, "gh200")


@pytest.mark.parametrize("option", [["--sweep", "gpus=1..2"], ["--timeline", "lanes.png"]])
def test_a_profile_without_rates_predicts_nothing(
    option: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "--show", "gh200", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    Path("bare.json").write_text(json.dumps({**document, "rates": None}), encoding="utf-8")
    assert main(["plan", "quickstart", "--hardware", "bare.json"]) == 0
    assert "copy and update rates of this machine are not measured" in capsys.readouterr().out
    assert main(["plan", "quickstart", "--hardware", "bare.json", *option]) == 2
    assert capsys.readouterr().err == (
        f"interlace: {' '.join(option)}: the profile of gh200 has no copy and update rates "
        "(`rates` is null) to predict times with; measure them with `interlace profile`\n"
    )


def test_a_picture_may_be_named_in_capitals(plan_of: PlanOf, tmp_path: Path) -> None:
    picture = tmp_path / "LANES.PNG"
    plan_of("gpt_1b_offload", "--hardware", "h200", "--timeline", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("elements", [100_000_000, 10_000_000])
def test_pictures_say_what_the_table_says(
    elements: int, plan_of: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Timeline] = {}
    monkeypatch.setattr(
        "interlace.launch.offload_table.draw_gantt", lambda found, _: drawn.update(found)
    )
    words = ("gpt_7b_offload", "--hardware", "4xh100-pcie5", "train.tokens_per_step=8192")
    picture = ("--timeline", str(tmp_path / "lanes.png"))
    plan = plan_of(*words, f"offload.subgroup_elements={elements}", *picture)
    fitting = [f for f in plan["offload"]["forecasts"] if f["problem"] is None]
    assert len(fitting) == 3
    for forecast in fitting:
        timeline = drawn[f"{forecast['strategy']} (predicted)"]
        assert timeline.makespan == pytest.approx(forecast["update_seconds"], rel=1e-3)


def test_help_shows_machines_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in (
        ("plan", (".png, .svg or .pdf", "doubling", "interlace plan gpt_7b_offload --hardware")),
        ("profile", ("interlace profile --show gh200",)),
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        page = " ".join(capsys.readouterr().out.split())
        assert "known machines: 4xa100-pcie4, 4xh100-pcie5, gh200, h200" in page
        assert all(word in page for word in words)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 s"),
        (2.5e-7, "0.25 us"),
        (1e-3, "1.00 ms"),
        (0.062, "62.0 ms"),
        (0.9999, "1.00 s"),
        (11.91, "11.9 s"),
        (119.4, "119 s"),
        (192.0, "3.2 min"),
        (5760.0, "96.0 min"),
        (7200.0, "2.0 h"),
        (4.8 * 86_400, "4.8 d"),
    ],
)
def test_times_have_three_digits_and_the_unit_that_fits(value: float, text: str) -> None:
    assert human_seconds(value) == text


def test_work_has_a_unit() -> None:
    shown = [human_flops(value) for value in (12.0, 2.7e9, 4.4e15, 1.46e21)]
    assert shown == ["12 FLOP", "2.7 GFLOP", "4.4 PFLOP", "1.5 ZFLOP"]


def test_columns_never_collide() -> None:
    lines = typeset(
        ["a", "b", "c"], [["x", "1", "123456789"], ["yy", "a text that spans the rest"]]
    )
    assert lines == ["a   b          c", "x   1  123456789", "yy  a text that spans the rest"]


def test_parameters_that_a_token_meets_are_told_where_they_are_fewer(
    interlace: Callable[..., Any], plan_of: PlanOf
) -> None:
    plan = plan_of("quickstart_moe", "--hardware", "h200")
    assert (plan["parameters"], plan["active_parameters"]) == (4_378_880, 1_945_856)
    shown = interlace("plan", "quickstart_moe", "--hardware", "h200").stdout
    assert "4,378,880, 1.9M active for each token" in shown
    dense = interlace("plan", "quickstart", "--hardware", "h200").stdout
    assert "active" not in dense


def test_where_a_part_is_trained_all_of_it_counts_as_active() -> None:
    config = load_recipe("quickstart_moe").config
    setting = make_setting(config, 1, load_profile("h200"))
    whole = parameter_count(config.model, setting.vocabulary_size)
    assert active_parameters(config, setting, whole) == whole - idle_parameters(config.model)
    assert active_parameters(config, setting, 1000) == 1000
