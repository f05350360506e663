"""Whole runs: offloading changes where state is, never a number, on one rank and on several."""

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from digests import live_digest, stored_digest
from ranks import run_on_ranks

from interlace.offload.hardware import load_profile
from interlace.offload.measure import cache_path, keep
from interlace.trainer.checkpoint.commit import CheckpointStore
from interlace.trainer.checkpoint.state import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("offload.subgroup_elements=3000", "offload.device_budget_gib=0.00012")
"""Many subgroups, and room on the device for some of them."""

WAYS = {
    "host": ("offload.strategy=host",),
    "stride": ("offload.strategy=stride", "offload.stride=3", "offload.device_budget_gib=1"),
    "optimal": ("offload.strategy=optimal", *SMALL),
    "optimal, overlap none": ("offload.strategy=optimal", "offload.overlap=none", *SMALL),
}

CLIPPED = ("optimizer.rule=clipped_sgd", "optimizer.peak_lr=0.3", "coordinate_clip.threshold=0.003")
LAGGED = (*CLIPPED[:2], "coordinate_clip.policy=lagged_quantile")
CLIPS = {
    "clipped": (),
    "unclipped": ("optimizer.clip=0",),
    "coordinates": CLIPPED,
    "quantiles": LAGGED,
}

OFTEN = {("optimal", "clipped")}
"""What `make test` runs; the rest is for `make test-long`."""

Interlace = Callable[..., Any]


@pytest.fixture(scope="module")
def resident(
    interlace: Interlace, tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Train with all state on the device, once per number of ranks and settings."""
    folder, runs = tmp_path_factory.mktemp("resident"), {}

    def train(ranks: int, *settings: str) -> Path:
        key = (ranks, *settings)
        if key not in runs:
            runs[key] = folder / str(len(runs))
            done = interlace("train", *tiny, *settings, f"run.dir={runs[key]}", ranks=ranks)
            assert done.returncode == 0, done.stdout + done.stderr
        return runs[key]

    return train


@pytest.mark.parametrize(
    ("way", "settings"),
    [
        pytest.param(
            way, clip, id=f"{way}, {name}", marks=() if (way, name) in OFTEN else pytest.mark.long
        )
        for way in WAYS
        for name, clip in CLIPS.items()
    ],
)
def test_on_two_ranks_every_strategy_has_the_losses_of_the_resident_run(
    way: str,
    settings: tuple[str, ...],
    resident: Callable[..., Path],
    interlace: Interlace,
    tiny: Sequence[str],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    words = ("offload.subgroup_elements=3000", *WAYS[way], *settings)
    done = interlace("train", *tiny, *words, f"run.dir={run}", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses_of(run) == losses_of(resident(2, *settings))
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))["offload"]
    chosen = "backward" if settings else "forward"
    expected = "none" if way.endswith("overlap none") else chosen
    assert plan["overlap"] == expected


@pytest.mark.parametrize(
    "form",
    [
        pytest.param((), marks=pytest.mark.long),
        pytest.param(("offload.split_master=true",), marks=pytest.mark.long),
        pytest.param(("offload.moments=bfloat16",), marks=pytest.mark.long),
        pytest.param(("train.microbatch_rows=1",), marks=pytest.mark.long),
        pytest.param(("optimizer.rule=sgd", "optimizer.peak_lr=0.01"), marks=pytest.mark.long),
        pytest.param((*LAGGED, "offload.moments=bfloat16"), marks=pytest.mark.long),
        pytest.param((*CLIPPED, "optimizer.beta1=0"), marks=pytest.mark.long),
    ],
    ids=["plain", "split", "bf16 moments", "accumulated", "sgd", "quantiles", "no state"],
)
def test_bf16_weights_with_every_form_of_state(
    form: tuple[str, ...],
    resident: Callable[..., Path],
    interlace: Interlace,
    tiny: Sequence[str],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    settings = ("train.compute_dtype=bfloat16", "train.steps=15", *form)
    run = tmp_path / "run"
    words = (*WAYS["optimal"], *settings)
    done = interlace("train", *tiny, *words, f"run.dir={run}", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses_of(run) == losses_of(resident(2, *settings))


@pytest.mark.long
def test_a_checkpoint_goes_on_under_another_strategy_and_another_number_of_ranks(
    interlace: Interlace,
    tiny: Sequence[str],
    resident: Callable[..., Path],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    stop = {"INTERLACE_FAILPOINT": "step.update@15:sigterm"}
    words = (*tiny, f"run.dir={run}", "train.compute_dtype=bfloat16")
    done = interlace("train", *words, *WAYS["optimal"], ranks=2, environment=stop)
    assert done.returncode == 0, done.stdout + done.stderr
    stopped = CheckpointStore(run / "checkpoints").committed_steps()[-1]
    assert 15 <= stopped < 40
    for ranks, way in ((1, "host"), (2, "stride"), (1, "optimal")):
        step, digest = live_digest(run, ranks, tmp_path, "offload.stride=none", *WAYS[way])
        assert step == stopped
        assert digest == stored_digest(run, stopped), (ranks, way)
    done = interlace("train", *words, "offload.strategy=host", ranks=1)
    assert done.returncode == 0, done.stdout + done.stderr
    straight = resident(1, "train.compute_dtype=bfloat16")
    last, expected = (
        json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        for folder in (run, straight)
    )
    # Two ranks sum gradients in another order than one.
    assert last["val_loss"] == pytest.approx(expected["val_loss"], abs=2e-2)


@pytest.mark.parametrize(
    ("settings", "points"),
    [
        pytest.param((), ("step.backward@9",), id="adamw"),
        pytest.param(
            (), ("step.forward@7", "step.update@8"), id="adamw, elsewhere", marks=pytest.mark.long
        ),
        pytest.param(LAGGED, ("step.backward@9",), id="quantiles", marks=pytest.mark.long),
    ],
)
def test_a_kill_during_an_overlapped_update_loses_nothing(
    settings: tuple[str, ...],
    points: Sequence[str],
    interlace: Interlace,
    tiny: Sequence[str],
    resident: Callable[..., Path],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    words = (*tiny, *WAYS["optimal"], *settings, f"run.dir={run}")
    for point in points:
        done = interlace("train", *words, environment={"INTERLACE_FAILPOINT": point})
        assert done.returncode == -9
    assert interlace("train", *words).returncode == 0
    assert losses_of(run) == losses_of(resident(1, *settings))


@pytest.mark.long
def test_thresholds_are_part_of_a_checkpoint_on_any_number_of_ranks_and_clipping_is_told(
    interlace: Interlace, tiny: Sequence[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (*tiny, *LAGGED, f"run.dir={run}", "train.steps=10", "checkpoint.every_steps=5")
    done = interlace("train", *words, *WAYS["optimal"], ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    reader = open_checkpoint(CheckpointStore(run / "checkpoints"), 10).reader
    thresholds = [name for name in reader.index if name.endswith(".threshold")]
    assert len(thresholds) == sum(name.endswith(".step") for name in reader.index)
    assert all(float(reader.read_whole(name)) > 0 for name in thresholds)
    for ranks, way in ((1, "host"), (4, "optimal")):
        step, digest = live_digest(run, ranks, tmp_path, *WAYS[way])
        assert (step, digest) == (10, stored_digest(run, 10)), (ranks, way)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Logged are the first step, before which nothing was updated, and the tenth.
    assert [record["step"] for record in records if "clip_fraction" in record] == [10]
    assert 0.02 < records[-1]["clip_fraction"] < 0.5
    assert tags_of(run) >= {"model/clip_fraction", "model/clip_fraction.embedding.weight"}


def tags_of(run: Path) -> set[str]:
    """Return the names of all numbers in a run's TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    return set(board.Tags()["scalars"])


@pytest.mark.long
def test_a_policy_may_change_when_a_run_goes_on(
    interlace: Interlace, tiny: Sequence[str], tmp_path: Path
) -> None:
    words = (*tiny, f"run.dir={tmp_path / 'run'}", *CLIPPED)
    for steps, policy in ((5, "fixed"), (10, "lagged_quantile"), (15, "fixed")):
        change = (f"train.steps={steps}", f"coordinate_clip.policy={policy}")
        done = interlace("train", *words, *change)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_guarded_update_that_is_not_finite_is_told_and_counted_but_not_skipped(
    interlace: Interlace, tiny: Sequence[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (*tiny, *CLIPPED, *WAYS["host"], f"run.dir={run}", "train.max_bad_steps=3")
    done = interlace("train", *words, "optimizer.peak_lr=1e36")
    assert done.returncode == 65
    assert "is not finite; coordinates that are not count as 0 (1 in a row" in done.stdout
    assert "3 steps in a row had a loss or gradient that is not finite" in done.stderr
    assert "=1e+36, and resume." in done.stderr
    assert "Traceback" not in done.stderr
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bad = [record for record in records if record["loss"] == "nan" or record["grad_norm"] == "nan"]
    assert bad
    assert not any("skipped" in record for record in records)
    assert len(list((run / "evidence").iterdir())) == 1


def test_a_traced_run_leaves_a_trace_a_picture_and_words(
    interlace: Interlace, tiny: Sequence[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # The last update of a run is of the span: nothing but the end of the run asks for its report.
    words = (*WAYS["optimal"], "observe.trace_steps=6:14", "train.steps=8", f"run.dir={run}")
    done = interlace("train", *tiny, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("update ")]
    assert [line.split(":")[0] for line in said] == ["update 6", "update 7", "update 8"]
    assert all("predicted" in line and "measured" in line and "bound by" in line for line in said)
    assert (
        "observe.trace_steps=6:14: 5 of its updates were not traced, since this start made updates "
        "1 to 8"
    ) in done.stdout.splitlines()
    assert f"  updates     {run}/timeline.png, and timeline.json for ui.perfetto.dev" in done.stdout
    trace = json.loads((run / "timeline.json").read_text(encoding="utf-8"))["traceEvents"]
    names = [record["args"]["name"] for record in trace if record["name"] == "process_name"]
    assert names[0] == "predicted"
    measured = [name for name in names if not name.startswith("predicted")]
    assert measured == [f"update {n}, measured" for n in (6, 7, 8)]
    assert (run / "timeline.png").stat().st_size > 10_000
    picture = base64.b64encode((run / "timeline.png").read_bytes()).decode("ascii")
    assert picture in (run / "report.html").read_text(encoding="utf-8")
    record = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert record["exposed_update_seconds"] > 0
    assert record["update_seconds"] > 0


def test_a_corrected_prediction_is_told_between_the_lines_and_in_the_run_folder(
    interlace: Interlace,
    tiny: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Nothing of this machine is as fast as what its record says.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keep(load_profile("gh200"), cache_path(torch.device("cpu")))
    run = tmp_path / "run"
    words = (*WAYS["optimal"], "train.steps=10", f"run.dir={run}")
    done = interlace("train", *tiny, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("offload: updates take ")]
    assert said
    kept = (run / "offload.log").read_text(encoding="utf-8")
    assert said[0].removeprefix("offload: ") in kept


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("offload.strategy=optimal", "offload.host_budget_gib=1000000"),
            "offload.host_budget_gib=1000000: a rank may fill ",
        ),
        (
            ("offload.strategy=host", "offload.host_budget_gib=0.00001"),
            "offload.strategy=host: optimizer state needs ",
        ),
    ],
    ids=["beyond the machine", "too small"],
)
def test_memory_that_is_not_there_is_refused_before_training(
    words: Sequence[str], message: str, interlace: Interlace, tiny: Sequence[str], tmp_path: Path
) -> None:
    done = interlace("train", *tiny, *words, f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"interlace: {message}")


DDP = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from interlace.kernels.update import AdamW
from interlace.offload import OffloadedOptimizer, OffloadOptions
dist.init_process_group("gloo")
rank = dist.get_rank()
results = []
for kind in ("torch", "host", "stride"):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    wrapped = DistributedDataParallel(model)
    if kind == "torch":
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01, weight_decay=0.1)
    else:
        options = OffloadOptions(subgroup_elements=20, stride=2)
        rule = AdamW(lr=0.01, weight_decay=0.1)
        optimizer = OffloadedOptimizer(
            wrapped.parameters(), rule, strategy=kind, clip_norm=None, options=options
        )
    for step in range(6):
        generator = torch.Generator().manual_seed(10 * step + rank)
        optimizer.zero_grad()
        wrapped(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()
    results.append(torch.cat([p.detach().view(-1) for p in model.parameters()]))
for other in results[1:]:
    torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-7)
both = [torch.zeros_like(results[1]) for _ in range(2)]
dist.all_gather(both, results[1])
assert torch.equal(*both)
assert torch.equal(results[1], results[2])
print("RANK", rank, "AGREES")
"""


def test_ddp_averages_its_gradients_before_they_are_used(tmp_path: Path) -> None:
    done = run_on_ranks(DDP, tmp_path)
    assert done.stdout.count("AGREES") == 2, done.stdout + done.stderr
