"""What `interlace plan` says of offloading: homes, memory, every strategy side by side, scaling."""

from collections.abc import Sequence
from pathlib import Path

from interlace.offload.hardware import with_active_ranks
from interlace.offload.simulator import simulate
from interlace.offload.timeline import Timeline, draw_gantt
from interlace.trainer.config import RunConfig
from interlace.trainer.errors import ConfigError
from interlace.trainer.observe.units import human_bytes, human_count
from interlace.trainer.placement import OffloadPlan
from interlace.trainer.plan import Plan, Setting, update_schedules
from interlace.trainer.scaling import ScalingRow

LANE_NAMES = {
    "h2d": "copies to the device",
    "d2h": "copies to the host",
    "cpu": "CPU updates",
    "device": "device updates",
    "dram": "host memory",
    "flush": "gradients to the host",
}


def offload_lines(plan: Plan) -> list[str]:
    """Return the offload section of a plan."""
    placement = plan.offload
    lines = [
        "",
        "Optimizer state",
        f"  strategy                 {placement.strategy}, overlap {placement.overlap}",
        f"  may occupy               {human_bytes(placement.device_budget_bytes)} on the device, "
        f"{human_bytes(placement.host_budget_bytes)} on the host, per rank",
        f"  compute of a step        {seconds(placement.compute_seconds)}",
    ]
    if not placement.forecasts:
        return [*lines, "  copy and update rates of this machine are not measured"]
    return [*lines, "", *strategy_table(placement), *advice(placement)]


def strategy_table(placement: OffloadPlan) -> list[str]:
    """Return one line per strategy."""
    head = (
        f"  {'strategy':<10}{'resident':>9}{'staged':>8}{'host':>6}{'device':>11}{'host':>11}"
        f"{'update':>10}{'exposed':>10}{'step':>10}  bound by"
    )
    lines = [head]
    for forecast in placement.forecasts:
        mark = "> " if forecast.strategy == placement.strategy else "  "
        if forecast.problem is not None:
            lines.append(f"{mark}{forecast.strategy:<10}  does not fit")
            continue
        lines.append(
            f"{mark}{forecast.strategy:<10}{forecast.resident:>9}{forecast.staged:>8}"
            f"{forecast.host:>6}{human_bytes(forecast.device_bytes):>11}"
            f"{human_bytes(forecast.host_bytes):>11}{seconds(forecast.update_seconds):>10}"
            f"{seconds(forecast.exposed_seconds):>10}{seconds(forecast.step_seconds):>10}  "
            f"{LANE_NAMES[forecast.bound_by]}"
        )
    return lines


def advice(placement: OffloadPlan) -> list[str]:
    """Return what to change where the chosen strategy does not fit, or is not the fastest."""
    chosen = placement.chosen
    if chosen is not None and chosen.problem is not None:
        return ["", *(f"  {line}" for line in chosen.problem.splitlines())]
    fitting = [f for f in placement.forecasts if f.problem is None]
    best = min(fitting, key=lambda f: f.step_seconds, default=None)
    if chosen is None or best is None or best.step_seconds >= 0.98 * chosen.step_seconds:
        return []
    return [
        "",
        f"  offload.strategy={best.strategy} would take {seconds(best.step_seconds)} a step "
        f"instead of {seconds(chosen.step_seconds)}",
    ]


def seconds(value: float) -> str:
    """Return a time with three digits."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 or value == 0 else f"{value * 1e6:.3g} us"


def draw_plan(config: RunConfig, setting: Setting, path: Path) -> None:
    """Draw the predicted update of every strategy that fits.

    Raises:
        ConfigError: None fits, or the picture's format is unknown.
    """
    if path.suffix not in {".png", ".svg", ".pdf"}:
        raise ConfigError([f"--timeline {path}: give a file that ends in .png, .svg or .pdf"])
    machine = with_active_ranks(setting.hardware, setting.ranks_per_host)
    timelines: dict[str, Timeline] = {}
    for strategy, schedule in update_schedules(config, setting).items():
        timelines[f"{strategy} (predicted)"] = simulate(schedule, machine)
    if not timelines:
        raise ConfigError([f"--timeline {path}: no strategy fits the memory"])
    draw_gantt(timelines, path)


def scaling_lines(rows: Sequence[ScalingRow]) -> list[str]:
    """Return the table of a sweep."""
    lines = [
        "",
        "Scaling, on paper",
        f"  {'gpus':>6}{'compute':>11}{'network':>11}{'exposed':>11}{'step':>11}{'tok/s':>9}"
        f"{'efficiency':>12}{'device':>11}{'host':>11}",
    ]
    for row in rows:
        if row.problem is not None:
            lines.append(f"  {row.gpus:>6}  {row.problem}")
            continue
        lines.append(
            f"  {row.gpus:>6}{seconds(row.compute):>11}{seconds(row.communication):>11}"
            f"{seconds(row.exposed_update):>11}{seconds(row.step):>11}"
            f"{human_count(row.tokens_per_second):>9}{row.efficiency:>11.0%} "
            f"{human_bytes(row.device_bytes):>11}{human_bytes(row.host_bytes):>11}"
        )
    return lines


def parse_sweep(text: str) -> tuple[int, int]:
    """Read `gpus=1..1024`; `ConfigError` if it is something else."""
    name, _, span = text.partition("=")
    first, dots, last = span.partition("..")
    if name == "gpus" and dots and first.isdigit() and last.isdigit():
        low, high = int(first), int(last)
        if 1 <= low <= high <= 65536:
            return low, high
    raise ConfigError([f"--sweep {text}: give a range of GPUs, such as --sweep gpus=1..1024"])
