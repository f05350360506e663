"""What `interlace plan` says of offloading: homes, memory, every strategy side by side, scaling."""

from collections.abc import Sequence
from pathlib import Path

from interlace.launch.typeset import typeset
from interlace.offload.hardware import with_active_ranks
from interlace.offload.timeline import Timeline, draw_gantt
from interlace.trainer.config import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.observe.predicted import predicted_timeline
from interlace.trainer.observe.units import human_bytes, human_count, human_seconds
from interlace.trainer.placement import Forecast, OffloadPlan
from interlace.trainer.plan import Plan, Setting, update_schedules
from interlace.trainer.scaling import ScalingRow, sizes

LANE_NAMES = {
    "h2d": "copies to the device",
    "d2h": "copies to the host",
    "cpu": "CPU updates",
    "device": "device updates",
    "dram": "host memory",
    "flush": "gradients to the host",
}

MOST_GPUS = 65_536


def offload_lines(plan: Plan) -> list[str]:
    """Return the offload section of a plan."""
    placement = plan.offload
    lines = [
        "",
        "Optimizer state",
        f"  strategy                 {placement.strategy}, overlap {placement.overlap}",
        f"  may occupy               {human_bytes(placement.device_budget_bytes)} on the device, "
        f"{human_bytes(placement.host_budget_bytes)} on the host, per rank",
        f"  compute of a step        {human_seconds(placement.compute_seconds)}",
        f"  communication            {communication_words(plan)}",
        *reference_lines(placement),
    ]
    if not placement.forecasts:
        return [*lines, "  copy and update rates of this machine are not measured"]
    return [
        *lines,
        "",
        *strategy_table(placement),
        *home_table(placement),
        *advice(plan),
    ]


def reference_lines(placement: OffloadPlan) -> list[str]:
    """Return what the update rule saves against AdamW, where it is another."""
    reference, chosen = placement.reference, placement.chosen
    if reference is None:
        return []
    lines = [
        f"  moments                  {placement.moment_bytes} bytes per parameter, AdamW's "
        f"{reference.moment_bytes}"
    ]
    if not placement.forecasts:
        return lines
    ours = "does not fit"
    if chosen is not None and chosen.problem is None:
        ours = update_words(chosen.update_seconds, chosen.exposed_seconds, chosen.overlap)
    theirs = "does not fit"
    if reference.update_seconds is not None and reference.exposed_seconds is not None:
        theirs = update_words(
            reference.update_seconds, reference.exposed_seconds, reference.overlap
        )
    return [*lines, f"  update                   {ours}; AdamW's {theirs}"]


def update_words(update: float, exposed: float, overlap: str) -> str:
    """Say how long an update takes and how much of it compute waits for."""
    beside = "" if overlap == "none" else f" beside {overlap}"
    return f"{human_seconds(update)}{beside}, {human_seconds(exposed)} of it exposed"


def communication_words(plan: Plan) -> str:
    """Say how long the collectives of a step take, and whether compute hides them."""
    placement = plan.offload
    if plan.world_size == 1:
        return "none, one rank"
    if not placement.forecasts:
        return "not known without rates"
    time = human_seconds(placement.communication_seconds)
    if placement.communication_seconds <= placement.compute_seconds:
        return f"{time}, hidden beside compute"
    return f"{time}, which compute does not hide"


def strategy_table(placement: OffloadPlan) -> list[str]:
    """Return one line per strategy."""
    head = ["  strategy", "overlap", "resident", "staged", "host", "device", "host"]
    head += ["update", "exposed", "step", "bound by"]
    rows = [strategy_row(f, f.strategy == placement.strategy) for f in placement.forecasts]
    return typeset(head, rows, left=(0, 1, len(head) - 1))


def strategy_row(forecast: Forecast, chosen: bool) -> list[str]:
    """Return the cells of one strategy."""
    name = f"{'>' if chosen else ' '} {forecast.strategy}"
    if forecast.problem is not None:
        return [name, forecast.overlap, forecast.shortage or ""]
    return [
        name,
        forecast.overlap,
        *(str(share.subgroups) for share in forecast.homes.values()),
        human_bytes(forecast.device_bytes),
        human_bytes(forecast.host_bytes),
        human_seconds(forecast.update_seconds),
        human_seconds(forecast.exposed_seconds),
        human_seconds(forecast.step_seconds),
        LANE_NAMES[forecast.bound_by],
    ]


def home_table(placement: OffloadPlan) -> list[str]:
    """Return what has which home under the recipe's own strategy."""
    chosen = placement.chosen
    if chosen is None or chosen.problem is not None:
        return []
    rows = [
        [f"  {home}", str(share.subgroups), human_count(share.parameters), human_bytes(share.bytes)]
        for home, share in chosen.homes.items()
    ]
    return ["", *typeset(["  home", "subgroups", "parameters", "state"], rows)]


def advice(plan: Plan) -> list[str]:
    """Return what to change where the chosen strategy does not fit, or is not the fastest."""
    placement = plan.offload
    chosen = placement.chosen
    fitting = [f for f in placement.forecasts if f.problem is None]
    best = min(fitting, key=lambda f: f.step_seconds, default=None)
    if chosen is None or best is None or placement.impossible:
        return []
    what = f"offload.strategy={best.strategy}"
    if placement.strategy == "stride":
        what += " (and offload.stride=none)"
    if chosen.problem is not None:
        return ["", f"  {what} fits and would take {human_seconds(best.step_seconds)} a step"]
    if best.step_seconds >= 0.98 * chosen.step_seconds:
        return []
    return [
        "",
        f"  {what} would take {human_seconds(best.step_seconds)} a step instead of "
        f"{human_seconds(chosen.step_seconds)}",
    ]


def draw_plan(config: RunConfig, setting: Setting, path: Path) -> None:
    """Draw the predicted update of every strategy that fits.

    Raises:
        ConfigError: None fits.
    """
    machine = with_active_ranks(setting.hardware, setting.ranks_per_host)
    timelines: dict[str, Timeline] = {
        f"{strategy} (predicted)": predicted_timeline(schedule, machine, window.backward)
        for strategy, (schedule, window) in update_schedules(config, setting).items()
    }
    if not timelines:
        raise ConfigError(
            [f"--timeline {path}: no strategy fits the memory; see the plan without --timeline"]
        )
    draw_gantt(timelines, path)


def scaling_lines(rows: Sequence[ScalingRow]) -> list[str]:
    """Return the table of a sweep."""
    head = ["  gpus", "compute", "network", "exposed", "step", "tok/s", "efficiency"]
    head += ["device", "host"]
    cells = [
        [f"  {row.gpus}", row.problem]
        if row.problem is not None
        else [
            f"  {row.gpus}",
            human_seconds(row.compute),
            human_seconds(row.communication),
            human_seconds(row.exposed_update),
            human_seconds(row.step),
            human_count(row.tokens_per_second),
            f"{row.efficiency:.0%}",
            human_bytes(row.device_bytes),
            human_bytes(row.host_bytes),
        ]
        for row in rows
    ]
    return ["", "Scaling, on paper", *typeset(head, cells, left=())]


def parse_sweep(text: str) -> list[int]:
    """Read `gpus=1..1024` as numbers of GPUs, each twice the one before, and the last.

    Raises:
        ConfigError: It is something else.
    """
    name, equals, span = text.partition("=")
    first, dots, last = span.partition("..")
    example = "such as --sweep gpus=1..1024"
    if not equals or name != "gpus":
        raise wrong_sweep(text, f"what is swept is the number of GPUs; write {example}")
    if not dots:
        raise wrong_sweep(text, f"a sweep goes from one number of GPUs to another, {example}")
    if not (first.isdecimal() and last.isdecimal()):
        raise wrong_sweep(text, f"both ends must be whole numbers, {example}")
    low, high = int(first), int(last)
    if low < 1:
        raise wrong_sweep(text, f"must start at 1 or more, {example}")
    if low > high:
        raise wrong_sweep(text, f"ends before it begins; write --sweep gpus={high}..{low}")
    if high > MOST_GPUS:
        limit = f"write --sweep gpus={low}..{MOST_GPUS}"
        raise wrong_sweep(text, f"may end at {MOST_GPUS} at most; {limit}")
    return sizes(low, high)


def wrong_sweep(text: str, reason: str) -> ConfigError:
    """Return the error of a sweep that cannot be read."""
    return ConfigError([f"--sweep {text}: {reason}"])
