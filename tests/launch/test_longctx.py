"""The benchmark of long contexts weighs what is there, and says who leads only if it is sure."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from interlace.launch.cli import main
from interlace.launch.longctx.command import check_numbers, parse_lengths
from interlace.launch.longctx.comparison import Interval, coverage, interval, lead_of, leads
from interlace.launch.longctx.contenders import Contender, check_vocabulary, contenders, remarks
from interlace.launch.longctx.measuring import Memory, Pass, Sample, Session, filled, measure
from interlace.launch.longctx.operators import KINDS, marked, peak_bytes, profiling, shares
from interlace.trainer.errors import ConfigError
from interlace.trainer.models.registry import mixer_class

CPU = torch.device("cpu")
SMALL = (
    "model.width=32",
    "model.heads=2",
    "model.kv_heads=1",
    "model.ffn_width=64",
    "model.mamba_head_width=16",
    "model.mamba_state_width=8",
)


@pytest.fixture(scope="module")
def pair() -> list[Contender]:
    """A Transformer and a hybrid, tiny."""
    return contenders(["quickstart", "quickstart_hybrid"], SMALL, 4000, CPU)


@pytest.fixture(scope="module")
def samples(pair: list[Contender]) -> Iterator[list[Sample]]:
    session = Session(
        lengths=(16, 64), repeats=5, decode_tokens=3, vocabulary=4000, budget=1e9, device=CPU
    )
    yield measure(pair, session, lambda done, total: None)


def test_every_model_is_timed_at_every_length_in_every_round(samples: list[Sample]) -> None:
    assert [(each.name, each.length) for each in samples] == [
        (name, length) for length in (16, 64) for name in ("quickstart", "quickstart_hybrid")
    ]
    for each in samples:
        for part in (each.prefill, each.decode):
            assert len(part.seconds) == 5 and min(part.seconds) > 0


def test_caches_weigh_what_their_mixers_declare(
    pair: list[Contender], samples: list[Sample]
) -> None:
    for sample in samples:
        model = next(each.model for each in pair if each.name == sample.name)
        room = sample.length + 3
        letters = "AFAFAF" if sample.name == "quickstart" else "MFAFMF"
        declared = {
            letter: mixer_class(letter).cache_bytes(model.config, room, 4) for letter in "AM"
        }
        for part in (sample.prefill, sample.decode):
            assert part.memory.kv_cache == letters.count("A") * declared["A"]
            assert part.memory.state == letters.count("M") * declared["M"]


def test_weights_are_counted_whole_and_kinds_add_up(
    pair: list[Contender], samples: list[Sample]
) -> None:
    for sample in samples:
        model = next(each.model for each in pair if each.name == sample.name)
        weights = sum(value.numel() * 4 for value in model.parameters())
        memory = sample.prefill.memory
        assert memory.weights == weights
        rest = memory.kv_cache + memory.state + memory.logits + memory.other
        assert memory.total == weights + rest
        # A residual stream of this length lives beside everything else.
        assert memory.other >= 4 * 32 * sample.length


def test_all_logits_of_a_large_vocabulary_outweigh_the_prefill(samples: list[Sample]) -> None:
    for sample in samples:
        assert sample.full_logits is not None
        assert sample.prefill.memory.logits == 4 * 4000
        assert sample.full_logits.logits == 4 * 4000 * sample.length
        difference = sample.full_logits.total - sample.prefill.memory.total
        if sample.length == 64:
            assert 0.5 * 4 * 4000 * 63 < difference <= 4 * 4000 * 63


def test_decoding_needs_less_than_the_prefill(samples: list[Sample]) -> None:
    for sample in samples:
        assert sample.decode.memory.total < sample.prefill.memory.total


def test_time_is_shared_out_among_attention_state_and_products(samples: list[Sample]) -> None:
    for sample in samples:
        for part in (sample.prefill, sample.decode):
            assert sum(part.shares.values()) == pytest.approx(1.0)
            assert set(part.shares) == set(KINDS)
            assert part.shares["attention"] > 0 and part.shares["matrix products"] > 0
            hybrid = sample.name == "quickstart_hybrid"
            assert (part.shares["ssd and conv"] > 0) == hybrid


def test_marks_go_away_and_change_nothing(pair: list[Contender]) -> None:
    tokens = torch.arange(12)[None]
    for each in pair:
        before = each.model.logits(tokens)
        with marked(each.model):
            assert torch.equal(each.model.logits(tokens), before)
        assert not any("forward" in vars(module) for module in each.model.modules())


def test_an_operation_counts_for_the_nearest_mark_around_it(pair: list[Contender]) -> None:
    with profiling(CPU) as profiled:
        torch.mm(torch.ones(200, 200), torch.ones(200, 200))
    found = shares(profiled)
    assert found["matrix products"] > 0.2
    assert found["attention"] == found["ssd and conv"] == 0


def test_the_peak_is_the_most_that_was_there_at_once() -> None:
    with profiling(CPU) as profiled:
        kept = torch.empty(1000)
        for _ in range(3):
            torch.empty(5000)
        torch.empty(2000)
        del kept
        torch.empty(3000)
    assert peak_bytes(profiled) == pytest.approx(4 * 6000, abs=256)


def test_logits_count_no_more_than_there_was() -> None:
    bare = Memory(weights=100, kv_cache=10, state=5, logits=0, other=0)
    assert filled(bare, 35, 12) == Memory(weights=100, kv_cache=10, state=5, logits=12, other=8)
    assert filled(bare, 20, 12) == Memory(weights=100, kv_cache=10, state=5, logits=5, other=0)


def test_lengths_beyond_the_budget_are_left_out(pair: list[Contender]) -> None:
    session = Session(
        lengths=(4, 8), repeats=5, decode_tokens=1, vocabulary=4000, budget=1e-9, device=CPU
    )
    told: list[tuple[int, int]] = []
    found = measure(pair[:1], session, lambda done, total: told.append((done, total)))
    assert [each.length for each in found] == [4]
    assert told[:5] == [(n, 10) for n in range(1, 6)] and told[-1] == (10, 10)


@pytest.mark.parametrize("count", [5, 6, 9])
def test_the_confidence_is_that_of_every_order_of_signs(count: int) -> None:
    for cut in range(count // 2):
        held = sum(cut < sum(signs) < count - cut for signs in product((False, True), repeat=count))
        assert coverage(count, cut) == pytest.approx(held / 2**count)


def test_an_interval_is_as_narrow_as_its_confidence_allows() -> None:
    assert interval([3, 1, 2, 5, 4]) == Interval(1, 3, 5, 0.9375)
    ten = interval([float(n) for n in range(10)])
    assert (ten.low, ten.middle, ten.high) == (1, 4.5, 8)
    assert ten.confidence == pytest.approx(0.978515625)


def around(middle: float) -> Interval:
    return Interval(middle - 0.05, middle, middle + 0.05, 0.94)


def test_a_lead_begins_where_the_whole_interval_stays_below_one() -> None:
    ratios = {256: around(0.8), 512: around(1.2), 1024: around(0.9), 2048: around(0.7)}
    lead = lead_of(ratios, "each token", "hybrid", "plain")
    assert lead is not None
    assert (lead.length, lead.always, lead.ratio.middle) == (1024, False, 0.9)
    always = lead_of({256: around(0.8), 512: around(0.7)}, "each token", "hybrid", "plain")
    assert always is not None and always.always and always.length == 256
    assert lead_of({256: around(0.8), 512: around(0.97)}, "each token", "a", "b") is None


def test_leads_compare_the_same_rounds() -> None:
    memory = Memory(weights=1, kv_cache=0, state=0, logits=0, other=0)

    def sample(name: str, seconds: Sequence[float]) -> Sample:
        part = Pass(list(seconds), memory, {})
        return Sample(name, 64, part, part, None)

    # The machine slows down from round to round; in each the second model takes half the time.
    slow = [1.0, 2.0, 4.0, 8.0, 16.0]
    found = leads([sample("one", slow), sample("two", [each / 2 for each in slow])])
    assert [(lead.measure, lead.faster) for lead in found] == [
        ("first token", "two"),
        ("each token", "two"),
    ]
    assert found[0].ratio == Interval(0.5, 0.5, 0.5, 0.9375)


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        action()
    return str(caught.value)


def test_different_vocabularies_are_not_compared() -> None:
    why = "the head's memory and time would be compared instead of the models"
    assert refusal(lambda: contenders(["quickstart", "bpe"], [], None, CPU)) == (
        f"vocabularies differ (quickstart has 257, bpe has 2,048): {why}; type --vocabulary 2048"
    )
    assert refusal(lambda: check_vocabulary({"runs/a": 300, "b": 257}, ["runs/a"], None)) == (
        f"vocabularies differ (runs/a has 300, b has 257): {why}; type --vocabulary 300"
    )
    assert refusal(lambda: check_vocabulary({"r": 300, "s": 257}, ["r", "s"], None)) == (
        f"vocabularies differ (r has 300, s has 257): {why}, and weights of a run keep theirs; "
        "leave r or s out, or train with one tokenizer"
    )
    assert refusal(lambda: check_vocabulary({"r": 300}, ["r"], 400)) == (
        f"vocabularies differ (r has 300): {why}, and weights of a run keep theirs; leave r out, "
        "or train with one tokenizer"
    )
    assert refusal(lambda: check_vocabulary({"a": 1}, [], 1)) == (
        "--vocabulary 1: must be 2 or more; type --vocabulary 257"
    )
    check_vocabulary({"a": 400, "r": 400}, ["r"], 400)


def test_a_model_is_named_once_and_precisions_agree(tmp_path: Path) -> None:
    assert refusal(lambda: contenders(["bpe", "bpe"], [], None, CPU)) == (
        "bpe: is named twice; name it once"
    )
    rough = tmp_path / "rough.toml"
    rough.write_text('extends = "quickstart"\n[train]\ncompute_dtype = "bfloat16"\n')
    assert refusal(lambda: contenders(["quickstart", str(rough)], [], None, CPU)) == (
        f"precisions differ (quickstart in float32, {rough} in bfloat16): times would not compare; "
        "type train.compute_dtype=float32"
    )


def test_overrides_that_nothing_heeds_are_refused(tmp_path: Path) -> None:
    assert refusal(lambda: contenders([str(tmp_path)], ["model.width=32"], None, CPU)) == (
        "model.width=32: wins over recipes, and only runs are named, which keep their own; leave "
        "it out"
    )


def test_numbers_that_measure_nothing_are_refused() -> None:
    assert parse_lengths("64, 16,64") == (16, 64)
    for text in ("64;128", "0,2", "", "1e3"):
        assert refusal(lambda text=text: parse_lengths(text)) == (
            f"--lengths {text}: must be whole numbers of tokens with commas between; type "
            "--lengths 256,512,1024"
        )
    with pytest.raises(ConfigError) as caught:
        check_numbers(0, 4, 0.0)
    assert list(caught.value.problems) == [
        "--decode 0: must be 1 or more; type --decode 16",
        "--repeats 4: fewer than 5 rounds give no interval; type --repeats 5",
        "--budget 0: must be more than 0 seconds; type --budget 60",
    ]


def test_a_reader_is_told_what_does_not_compare(pair: list[Contender]) -> None:
    assert remarks(pair, 4000)[-2:] == [
        "All have 4,000 entries, as --vocabulary asks.",
        "Weights are random: times and memory count, what is written does not.",
    ]
    assert remarks(pair[:1], None) == [
        "Weights are random: times and memory count, what is written does not."
    ]


def test_half_precision_is_that_of_the_weights() -> None:
    words = (*SMALL, "train.compute_dtype=bfloat16")
    half = contenders(["quickstart"], words, None, CPU)[0]
    assert half.weight_bytes == 2 * half.parameters
    assert half.model.compute_dtype == torch.bfloat16


@pytest.mark.long
def test_the_command_shows_a_page_and_a_picture_of_a_run_beside_a_recipe(
    interlace: Callable[..., Any], tiny: Sequence[str], tmp_path: Path
) -> None:
    run, picture = tmp_path / "run", tmp_path / "longctx.png"
    shape = [word for word in tiny if word.startswith("model.")]
    done = interlace("train", *tiny, "train.steps=1", f"run.dir={run}")
    assert done.returncode == 0, done.stdout + done.stderr
    words = ["bench", "longctx", str(run), "quickstart_hybrid", *shape, *SMALL[4:]]
    words += ["--lengths", "8,32", "--decode", "2"]
    shown = interlace(*words, "--picture", str(picture))
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    for text in (
        "Time to the first token",
        "Time per token after it",
        "Who is faster",
        "Memory at 32 tokens",
        "SSM and conv state",
        "prefill, all logits",
        "Where the time goes",
        "trained",
        f"picture  {picture}",
    ):
        assert text in shown.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "longctx", "quickstart", *SMALL, "--lengths", "8,32", "--decode", "2"]
    assert main([*words, "--json", "train.steps=3"]) == 0
    document = cast(dict[str, Any], json.loads(capsys.readouterr().out))
    assert [model["trained"] for model in document["models"]] == [False]
    assert [sample["length"] for sample in document["samples"]] == [8, 32]
    assert document["samples"][0]["prefill"]["memory"]["weights"] > 0
    assert document["leads"] == []


def test_nothing_to_measure_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "longctx", "model.width=32"]) == 2
    assert capsys.readouterr().err.startswith("interlace: bench longctx needs a recipe (")
