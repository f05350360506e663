"""A sweep asks for no more trials than it needs, and never believes an edge."""

import math
import random
from argparse import Namespace
from collections.abc import Callable

import pytest

from interlace.launch.sweep.request import Ladder, Request, read_ladder, read_log2, read_request
from interlace.launch.sweep.search import Family, Line, families, lines, needed
from interlace.launch.sweep.trials import Trial, learning_rate
from interlace.trainer.errors import ConfigError

Loss = Callable[[Trial], float | None]

DEFAULTS = {
    "recipe": "quickstart",
    "overrides": [],
    "widths": "32,64,128",
    "lr": "2**-8:2**-3",
    "seeds": 2,
    "grid": [],
    "parametrisation": "mup",
    "base_width": None,
    "jobs": None,
    "on": "local",
    "store": "store",
    "output": None,
    "transfer_to": None,
    "dry_run": False,
    "json": False,
}


def request(**words: object) -> Request:
    """Return a request of these words and harmless others."""
    return read_request(Namespace(**{**DEFAULTS, **words}))


def bowl(centres: dict[int, float]) -> Loss:
    """Losses whose optimum is known for every width; seeds differ a little."""
    return lambda t: 2 + 0.02 * (t.log2_lr - centres[t.width]) ** 2 + 0.001 * t.seed


def carried_out(asked: Request, loss: Loss, seed: int = 0) -> dict[Trial, float | None]:
    """Answer one trial after another, in random order, until no more are needed."""
    order = random.Random(seed)
    outcomes: dict[Trial, float | None] = {}
    seeds = tuple(range(asked.seeds))
    while wanted := needed(asked, seeds, outcomes):
        trial = order.choice(wanted)
        outcomes[trial] = loss(trial)
    return outcomes


def points(asked: Request, outcomes: dict[Trial, float | None], width: int) -> list[float]:
    """Return the learning rates that were tried at one width."""
    tried = {trial.log2_lr for trial in outcomes if trial.width == width}
    by_seed = {t for t in outcomes if t.width == width}
    assert len(by_seed) == len(tried) * asked.seeds, "every point has all seeds"
    return sorted(tried)


@pytest.mark.parametrize(
    ("text", "log2"),
    [
        ("2**-7", -7.0),
        ("2**-7.5", -7.5),
        ("2**3", 3.0),
        ("0.25", -2.0),
        ("1e-3", math.log2(1e-3)),
        (".5", -1.0),
    ],
)
def test_learning_rates_are_read_as_numbers_or_powers(text: str, log2: float) -> None:
    assert read_log2(text) == log2


@pytest.mark.parametrize(
    "text", ["", "abc", "-1", "0", "3**2", "2**x", "2 ** -7 + 1", "1e999", "2**2000", "2**-65"]
)
def test_nothing_else_is_a_learning_rate(text: str) -> None:
    assert read_log2(text) is None


@pytest.mark.parametrize(
    ("text", "grid", "step"),
    [
        ("2**-12:2**-10", (-12.0, -11.0, -10.0), 1.0),
        ("2**-4:2**-3:0.5", (-4.0, -3.5, -3.0), 0.5),
        ("2**-4:2**-3:0.4", (-4.0, -3.6, -3.2), 0.4),
        ("0.5,0.25", (-2.0, -1.0), 1.0),
        ("0.25", (-2.0,), 1.0),
    ],
)
def test_ranges_have_steps_of_octaves_and_lists_are_as_given(
    text: str, grid: tuple[float, ...], step: float
) -> None:
    assert read_ladder(text, []) == Ladder(grid, step)


def test_a_grid_may_grow_by_six_octaves_at_either_end() -> None:
    assert Ladder((-4.0, -3.0), 1.0).rungs == tuple(float(rung) for rung in range(-10, 4))
    halves = Ladder((-4.0, -3.5), 0.5).rungs
    assert halves[0] == -10.0 and halves[-1] == 2.5 and len(halves) == 26


def test_rates_that_were_written_as_decimals_are_those_again() -> None:
    assert [learning_rate(math.log2(rate)) for rate in (0.001, 0.003)] == [0.001, 0.003]
    assert learning_rate(-20.0) == 2.0**-20


def test_the_narrowest_width_has_the_whole_grid_and_wider_ones_a_few_points() -> None:
    asked = request()
    outcomes = carried_out(asked, bowl({32: -5.2, 64: -5.1, 128: -5.0}))
    assert points(asked, outcomes, 32) == [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0]
    for width in (64, 128):
        assert points(asked, outcomes, width) == [-7.0, -6.0, -5.0, -4.0, -3.0]


def test_a_wider_model_is_followed_where_its_optimum_goes() -> None:
    asked = request()
    outcomes = carried_out(asked, bowl({32: -5.0, 64: -6.0, 128: -7.0}))
    assert points(asked, outcomes, 64) == [-8.0, -7.0, -6.0, -5.0, -4.0]
    # Two on each side of its own optimum, and what the narrowest model's costs it.
    assert points(asked, outcomes, 128) == [-9.0, -8.0, -7.0, -6.0, -5.0]
    drifted = carried_out(asked, bowl({32: -5.0, 64: -8.0, 128: -11.0}))
    assert points(asked, drifted, 128)[-1] == -5.0
    assert {-13.0, -12.0, -11.0, -10.0, -9.0} <= set(points(asked, drifted, 128))


@pytest.mark.parametrize("centre", [-11.0, -12.4, 0.0, 0.9])
def test_edges_extend_until_the_optimum_is_inside(centre: float) -> None:
    asked = request(widths="32")
    outcomes = carried_out(asked, bowl({32: centre}))
    tried = points(asked, outcomes, 32)
    nearest = round(centre)
    below = [nearest - 2 in tried, nearest - 1 in tried]
    above = [nearest + 1 in tried, nearest + 2 in tried]
    assert all(below + above), tried


def test_edges_do_not_extend_without_end() -> None:
    asked = request(widths="32")
    outcomes = carried_out(asked, lambda t: 10.0 - t.log2_lr / 100)
    assert points(asked, outcomes, 32)[-1] == -3.0 + 6
    falling = carried_out(asked, lambda t: 10.0 + t.log2_lr / 100)
    assert points(asked, falling, 32)[0] == -8.0 - 6


def test_a_slope_that_leaves_the_valley_needs_one_point() -> None:
    def cliff(trial: Trial) -> float:
        return math.inf if trial.log2_lr > -5 else 2 - 0.01 * trial.log2_lr

    asked = request(widths="32,64", lr="2**-8:2**-5")
    outcomes = carried_out(asked, cliff)
    assert points(asked, outcomes, 32) == [-8.0, -7.0, -6.0, -5.0, -4.0]
    steep = carried_out(asked, lambda t: 2 + (t.log2_lr + 5) ** 2)
    assert points(asked, steep, 64) == [-6.0, -5.0, -4.0]


def test_where_everything_diverges_smaller_rates_are_tried() -> None:
    asked = request(widths="32,64")
    outcomes = carried_out(asked, lambda t: math.inf)
    assert points(asked, outcomes, 32)[0] == -14.0
    saved = carried_out(asked, lambda t: math.inf if t.log2_lr > -10 else 3.0 + t.log2_lr**2 / 100)
    assert points(asked, saved, 32)[0] <= -11.0


def test_what_is_asked_for_does_not_depend_on_the_order_of_answers() -> None:
    asked = request(parametrisation="both", grid=["optimizer.beta2=0.9,0.99"])
    loss = bowl({32: -5.3, 64: -6.1, 128: -3.2})
    assert len({frozenset(carried_out(asked, loss, seed)) for seed in range(5)}) == 1


def test_every_setting_and_parametrisation_is_a_family_of_its_own() -> None:
    asked = request(parametrisation="both", grid=["optimizer.beta2=0.9,0.99", "model.layers=1,2"])
    assert len(families(asked)) == 8
    assert Family("standard", ("optimizer.beta2=0.99", "model.layers=2")) in families(asked)
    assert asked.grid[0] == ("optimizer.beta2=0.9", "model.layers=1")
    assert len(families(request(grid=["optimizer.beta2=0.9,0.9"]))) == 1


def test_cheap_trials_come_first() -> None:
    asked = request(parametrisation="both")
    wanted = needed(asked, (0, 1), {})
    assert {trial.width for trial in wanted} == {32}
    known = {t: 2.0 + (t.log2_lr + 5) ** 2 for t in wanted if t.parametrisation == "mup"}
    mixed = needed(asked, (0, 1), known)
    assert [trial.width for trial in mixed] == sorted(trial.width for trial in mixed)
    assert {trial.width for trial in mixed} == {32, 64}


def test_a_crash_is_a_wall_and_no_loss() -> None:
    asked = request(widths="32,64", lr="2**-8:2**-5")
    outcomes = carried_out(asked, lambda t: None if t.log2_lr >= -5 else 2 - t.log2_lr / 100)
    tried = points(asked, outcomes, 32)
    assert tried[-1] == -5.0, "nothing is looked for beyond it"
    partly = carried_out(asked, lambda t: None if t.seed == 1 else bowl({32: -6.0, 64: -6.0})(t))
    line = lines(asked, (0, 1), partly)[0]
    assert isinstance(line, Line) and line.settled and line.means[-6.0] == pytest.approx(2.0)
    everywhere = carried_out(asked, lambda t: None)
    assert points(asked, everywhere, 32) == [-8.0, -7.0, -6.0, -5.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"widths": "32,x"}, "--widths 32,x: must be whole numbers with commas between"),
        ({"widths": "0"}, "--widths 0: must be whole numbers"),
        ({"lr": "a:b"}, "--lr a:b: cannot be read as FROM:TO or FROM:TO:STEP"),
        ({"lr": "2**-3:2**-5"}, "--lr 2**-3:2**-5: begins above its end; type --lr 2**-5:2**-3"),
        ({"lr": "2**-5:2**-3:0"}, "--lr 2**-5:2**-3:0: steps of 0 octaves; type a step from"),
        ({"lr": "1,-1"}, "--lr 1,-1: must be positive numbers or powers of 2"),
        ({"seeds": 0}, "--seeds 0: must be 1 or more; type --seeds 3"),
        ({"jobs": 0}, "--jobs 0: must be 1 or more; type --jobs 2"),
        ({"base_width": 0}, "--base-width 0: must be 1 or more; type --base-width 64"),
        ({"grid": ["beta2=1"]}, "--grid beta2=1: must be a setting and its values"),
        ({"grid": ["optimizer.beta2="]}, "--grid optimizer.beta2=: must be a setting"),
        ({"grid": ["run.seed=1,2"]}, "--grid run.seed=1,2: has a word of its own; use --seeds"),
        ({"grid": ["mup.base_width=32,64"]}, "has a word of its own; use --base-width"),
        (
            {"grid": ["optimizer.beta2=0.9", "optimizer.beta2=0.99"]},
            "--grid optimizer.beta2=0.99: is there twice; type all values of optimizer.beta2 in",
        ),
        ({"overrides": ["optimizer.peak_lr=1"]}, "optimizer.peak_lr=1: the sweep sets it itself"),
        (
            {"parametrisation": "standard", "transfer_to": "gpt-124m"},
            "--transfer-to gpt-124m: nothing transfers under the standard parametrisation",
        ),
    ],
)
def test_a_wrong_word_is_named_with_what_to_type(words: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        request(**words)
    assert message in str(refused.value)


def test_all_wrong_words_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        request(widths="x", lr="y", seeds=0, jobs=0)
    assert len(refused.value.problems) == 4
