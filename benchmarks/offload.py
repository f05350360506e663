"""Where optimizer state lives, measured: resident, host, stride, optimal, and the prediction.

Without a GPU a machine is simulated: lanes are throttled to the rates of a made-up node (slow
enough that this machine's own copies and updates fit underneath), and the model is asked for that
node. Everything else is real: slabs, slots, dependencies, arithmetic. With a GPU the recipes'
Transformer trains on random tokens as well: a 1.3B model, then one that fits only with offloading.
Iterations follow each other without a pause, as in training; what an update costs is what they
take longer than iterations whose gradients are dropped.

    python benchmarks/offload.py [--rounds 5] [--save]
"""

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from results import Row, save, table
from torch import nn

from interlace.kernels.update import AdamW
from interlace.offload.hardware import HardwareProfile, OffloadRates, host_memory_bytes
from interlace.offload.lanes import Throttle
from interlace.offload.measure import known_profile
from interlace.offload.memory import available_device_bytes, available_host_bytes
from interlace.offload.optimizer import OffloadedOptimizer
from interlace.offload.options import OffloadOptions
from interlace.offload.schedule import STRATEGIES, MemoryBudget, MemoryShortage, Strategy
from interlace.trainer.config import load_recipe
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.parallel import recompute_layers

GIGA = 1e9


def simulated_node() -> tuple[HardwareProfile, Throttle]:
    """Return a node on which staging and the CPU are about equally fast, and its lanes."""
    throttle = Throttle(
        h2d_bytes_per_second=3 * GIGA,
        d2h_bytes_per_second=3 * GIGA,
        cpu_bytes_per_second=5 * GIGA,
        device_bytes_per_second=10 * GIGA,
    )
    rates = OffloadRates(
        h2d_bytes_per_second=3 * GIGA,
        d2h_bytes_per_second=3 * GIGA,
        pageable_bytes_per_second=1 * GIGA,
        cpu_update_bytes_per_second=5 * GIGA,
        cpu_cast_elements_per_second=1 * GIGA,
        device_update_bytes_per_second=10 * GIGA,
        host_dram_bytes_per_second=1000 * GIGA,
        collective_bytes_per_second=1 * GIGA,
        network_bytes_per_second=1 * GIGA,
    )
    host = host_memory_bytes()
    profile = HardwareProfile(
        name="simulated node",
        device_name="simulated",
        matmul_flops=1e12,
        device_memory_bytes=host,
        host_memory_bytes=host,
        rates=rates,
    )
    return profile, throttle


def simulated_rows(rounds: int, subgroups: int = 32, elements: int = 3_000_000) -> list[Row]:
    """Update the same parameters under every strategy in turn, on throttled lanes."""
    profile, throttle = simulated_node()
    total = subgroups * elements
    # Room for slots, kept gradients, and a fifth of the state.
    budget = MemoryBudget(2 * 12 * elements + 2 * total + total * 12 // 5, available_host_bytes())
    roomy = MemoryBudget(available_device_bytes(torch.device("cpu")), available_host_bytes())
    ways: dict[str, tuple[Strategy, MemoryBudget]] = {
        name: (name, roomy if name == "none" else budget) for name in STRATEGIES
    }
    running: dict[str, tuple[list[torch.nn.Parameter], OffloadedOptimizer]] = {}
    for name, (strategy, allowed) in ways.items():
        weights = [
            torch.nn.Parameter(torch.zeros(elements, dtype=torch.bfloat16))
            for _ in range(subgroups)
        ]
        running[name] = (
            weights,
            OffloadedOptimizer(
                weights,
                AdamW(),
                strategy=strategy,
                budget=allowed,
                profile=profile,
                options=OffloadOptions(subgroup_elements=elements, throttle=throttle),
            ),
        )
    gradient = torch.full((elements,), 1e-3, dtype=torch.bfloat16)
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds + 1):
        for name, (weights, optimizer) in running.items():
            for weight in weights:
                weight.grad = gradient.clone()
            optimizer.step()
            report = optimizer.finish_report()
            assert report is not None
            times[name].append(report.update_seconds)
    rows: list[Row] = [
        row_of(f"{total / 1e6:.0f}M on a simulated node", name, optimizer, times[name][1:])
        for name, (_, optimizer) in running.items()
    ]
    for _, optimizer in running.values():
        optimizer.close()
    return rows


def row_of(
    model: str, strategy: str, optimizer: OffloadedOptimizer, updates: Sequence[float]
) -> dict[str, object]:
    """Return one line of the table: prediction beside measurement."""
    schedule = optimizer.schedule
    assert schedule is not None
    measured, predicted = statistics.median(updates), schedule.prediction.update_seconds
    homes = [home.value for home in optimizer.homes]
    return {
        "model": model,
        "strategy": strategy,
        "resident": homes.count("resident"),
        "staged": homes.count("staged"),
        "host": homes.count("host"),
        "predicted ms": predicted * 1e3,
        "measured ms": measured * 1e3,
        "measured / predicted": measured / predicted,
        "bound by": schedule.prediction.bound_by,
    }


@dataclass
class Training:
    """One model and how it is updated.

    Attributes:
        updates: Seconds of every update that was reported.
    """

    model: LanguageModel
    optimizer: OffloadedOptimizer
    tokens: torch.Tensor
    updates: list[float] = field(default_factory=list)

    def iterate(self, times: int, update: bool) -> float:
        """Train on, or only compute, and return the seconds of one iteration."""
        self.finish()
        start = time.perf_counter()
        for _ in range(times):
            loss = self.model(self.tokens[:, :-1], self.tokens[:, 1:])
            loss.objective.backward()
            if update:
                self.optimizer.step()
            else:
                self.optimizer.zero_grad()
        self.finish()
        return (time.perf_counter() - start) / times

    def finish(self) -> None:
        """Wait for everything, the last update included."""
        self.optimizer.synchronize()
        if self.tokens.is_cuda:
            torch.cuda.synchronize()


def training_rows(recipe: str, layers: int, rounds: int, profile: HardwareProfile) -> list[Row]:
    """Train a recipe's model under every strategy in turn: their states do not fit together."""
    section = load_recipe(recipe, [f"model.layers={layers}"]).config.model
    device = torch.device("cuda")
    with torch.device("meta"):
        model = LanguageModel(section, 32768, torch.bfloat16).to(torch.bfloat16)
    recompute_layers(list(model.layers), "block")
    model.to_empty(device=device)
    for parameter in model.parameters():
        # What the weights are does not matter to time; drawing them on the host would take minutes.
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    tokens = torch.randint(0, 32768, (4, 2049), device=device)
    return [row_under(strategy, model, tokens, rounds, profile) for strategy in STRATEGIES]


def row_under(
    strategy: Strategy,
    model: LanguageModel,
    tokens: torch.Tensor,
    rounds: int,
    profile: HardwareProfile,
) -> Row:
    """Train one model under one strategy."""
    # The last strategy's state, which is in cycles with its hooks, must be gone.
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    name = f"{sum(p.numel() for p in model.parameters()) / 1e9:.1f}B"
    room = available_device_bytes(tokens.device) - 12 * 2**30
    try:
        optimizer = OffloadedOptimizer(
            model.parameters(),
            AdamW(),
            strategy=strategy,
            budget=MemoryBudget(room, int(0.8 * available_host_bytes())),
            profile=profile,
            overlap="none" if strategy == "none" else "forward",
            clip_norm=1.0,
            model=model,
        )
    except MemoryShortage as error:
        return {"model": name, "strategy": strategy, "bound by": str(error).splitlines()[0]}
    training = Training(model, optimizer, tokens)
    training.iterate(2, update=True)
    optimizer.monitor.on_report = lambda report: training.updates.append(report.update_seconds)
    pairs = [
        (training.iterate(3, update=True), training.iterate(3, update=False)) for _ in range(rounds)
    ]
    whole, compute = (statistics.median(column) for column in zip(*pairs, strict=True))
    row = row_of(name, strategy, optimizer, training.updates)
    optimizer.close()
    return row | {
        "iteration ms": whole * 1e3,
        "compute ms": compute * 1e3,
        "exposed ms": (whole - compute) * 1e3,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    """Measure and print; fail if the promises of the simulated node are broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/offload-*")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        profile = known_profile(torch.device("cuda"), print)
        found = training_rows("gpt_1b_offload", 24, arguments.rounds, profile)
        found += training_rows("gpt_7b_offload", 24, min(2, arguments.rounds), profile)
        print(table(found))
        if arguments.save:
            save("offload-gpu", "Offloading on a GPU", found)
    rows = simulated_rows(arguments.rounds)
    print(table(rows))
    if arguments.save:
        save("offload-simulated", "Offloading on a simulated node", rows)
    check(rows)


def check(rows: Sequence[Row]) -> None:
    """Raise unless every prediction holds within 15% and none of the mixed ways is slower than all
    on the host.
    """
    measured: dict[str, float] = {}
    for row in rows:
        ratio, time_ = row["measured / predicted"], row["measured ms"]
        assert isinstance(ratio, float) and isinstance(time_, float)
        assert 0.85 <= ratio <= 1.15, f"{row['strategy']}: measured / predicted is {ratio:.2f}"
        measured[str(row["strategy"])] = time_
    assert measured["optimal"] <= measured["host"], "optimal is slower than all on the host"
    assert measured["stride"] <= measured["host"], "stride is slower than all on the host"


if __name__ == "__main__":
    main()
