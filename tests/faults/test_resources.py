"""Memory that is not there: refused before the start, told in words while training, kept while
loading. Disks are in `test_saving.py`.
"""

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import config_of, train_here

from interlace.launch.launchers.supervising import Budget
from interlace.offload.control_group import group_memory
from interlace.offload.schedule import MemoryShortage
from interlace.trainer import host_needs as host_needs_module
from interlace.trainer.assembly import open_run
from interlace.trainer.checkpoint import CheckpointStore
from interlace.trainer.errors import ConfigError, MemoryShort
from interlace.trainer.exits import Exit, status_of
from interlace.trainer.host_needs import host_needs, require_host_memory
from interlace.trainer.memory_short import memory_in_words
from interlace.trainer.observe import memory_watch as memory_watch_module
from interlace.trainer.observe.memory_watch import MemoryWatch
from interlace.trainer.world import World

TOO_MUCH = 2**55


def out_of_device_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a ...")


def out_of_workspace() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


SHORTAGES: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.empty(TOO_MUCH),
    "numpy": lambda: np.empty(TOO_MUCH),
    "python": lambda: bytearray(TOO_MUCH),
    "mapping": lambda: mmap.mmap(-1, 2**46, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
    "device": out_of_device_memory,
    "workspace": out_of_workspace,
}
"""What really happens when an allocation fails, by who allocates."""


@pytest.mark.parametrize("kind", SHORTAGES)
def test_c5_every_kind_of_shortage_says_what_to_lower(
    kind: str, tiny: Sequence[str], tmp_path: Path
) -> None:
    config = config_of(tiny, tmp_path / "run")
    with pytest.raises(MemoryShort) as caught, memory_in_words(config, World()):
        SHORTAGES[kind]()
    message = str(caught.value)
    where = "device" if kind in ("device", "workspace") else "host"
    assert message.startswith(f"{where} memory ran out on rank 0: ")
    assert "train.microbatch_rows=4, or train.activation_checkpointing=block" in message
    assert ("offload.strategy=optimal" in message) == (where == "device")
    assert status_of(caught.value) == Exit.MEMORY


def test_c5_other_errors_stay_what_they_are(tiny: Sequence[str], tmp_path: Path) -> None:
    config = config_of(tiny, tmp_path / "run")
    for error in (RuntimeError("size mismatch"), OSError(28, "No space left"), KeyError("x")):
        with pytest.raises(type(error)) as caught, memory_in_words(config, World()):
            raise error
        assert caught.value is error
    with pytest.raises(ConfigError, match="does not fit"), memory_in_words(config, World()):
        raise MemoryShortage("state does not fit: lower it")


@pytest.mark.faults
def test_c5_a_run_that_is_short_of_memory_goes_on_from_its_newest_checkpoint(
    interlace: Callable[..., Any],
    tiny: Sequence[str],
    losses_of: Callable[[Path], list[str]],
    tmp_path: Path,
) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    words = ("train", *tiny, "train.steps=12", f"run.dir={run}")
    done = interlace(*words, environment={"INTERLACE_FAILPOINT": "step.backward@8:nomem"})
    assert done.returncode == Exit.MEMORY, done.stderr
    assert "host memory ran out on rank 0: failpoint step.backward" in done.stderr
    assert "Traceback" not in done.stderr
    assert CheckpointStore(run / "checkpoints").committed_steps() == [5]
    train_here(tiny, run, "train.steps=12")
    train_here(tiny, straight, "train.steps=12")
    assert losses_of(run) == losses_of(straight)


SHORT = """
import resource, sys
from pathlib import Path
from interlace.trainer.assembly import open_run
from interlace.trainer.config import load_recipe
from interlace.trainer.errors import MemoryShort
from interlace.trainer.loop import finished_steps
from interlace.trainer.memory_short import memory_in_words
from interlace.trainer.world import World

config, world = load_recipe(sys.argv[1], sys.argv[2:]).config, World()
try:
    with memory_in_words(config, world), open_run(config, world) as run:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 48 * 2**20
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
        try:
            for _ in finished_steps(run):
                pass
        finally:
            # Pictures are drawn afterwards, by libraries that are not yet loaded.
            resource.setrlimit(resource.RLIMIT_AS, before)
    print("FITS")
except MemoryShort as error:
    print("SHORT", error)
"""


@pytest.mark.faults
def test_c5_activations_that_do_not_fit_are_told_and_what_is_typed_helps(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SHORT, encoding="utf-8")
    words = [
        *tiny,
        f"run.dir={tmp_path / 'run'}",
        "data.sequence_length=64",
        "train.tokens_per_step=16384",
        "train.steps=2",
        "train.validate_every_steps=0",
        "checkpoint.asynchronous=false",
    ]

    def last_line(*more: str) -> str:
        done = subprocess.run(
            [sys.executable, str(script), *words, *more],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [line for line in done.stdout.splitlines() if line][-1]

    short = last_line()
    assert short.startswith("SHORT host memory ran out on rank 0: ")
    assert "train.microbatch_rows=128" in short
    assert last_line("train.microbatch_rows=4", "train.activation_checkpointing=block") == "FITS"


def test_c5_the_same_shortage_twice_is_not_tried_again() -> None:
    budget = Budget(limit=5, step=10)
    assert budget.pause(10, Exit.MEMORY) is not None
    assert budget.pause(10, Exit.MEMORY) is None
    # Another failure between them, or a new checkpoint, makes it another shortage.
    budget = Budget(limit=5, step=10)
    assert budget.pause(10, Exit.MEMORY) is not None
    assert budget.pause(10, Exit.DEFECT) is not None
    assert budget.pause(10, Exit.MEMORY) is not None
    assert budget.pause(15, Exit.MEMORY) is not None
    assert budget.pause(15, Exit.MEMORY) is None


BIG = ("model.width=2048", "model.layers=24", "model.heads=16", "model.kv_heads=16")


def limited_to(gib: float, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `interlace WORDS...` with so many GiB of addresses."""
    command = [sys.executable, "-m", "interlace.launch.cli", *words]
    limit = f'ulimit -v {int(gib * 2**20)}; exec "$@"'
    return subprocess.run(
        ["bash", "-c", limit, "bash", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("strategy", ["none", "host"])
def test_c4_a_run_that_cannot_fit_is_refused_with_its_bytes_and_takes_none(
    strategy: str, tiny: Sequence[str], tmp_path: Path
) -> None:
    done = limited_to(
        6, "train", *tiny, *BIG, f"run.dir={tmp_path / 'run'}", f"offload.strategy={strategy}"
    )
    assert done.returncode == Exit.MEMORY, done.stderr[-2000:]
    assert "interlace: host memory: a rank of this run needs " in done.stderr
    for kind in ("weights", "optimizer state", "copies for checkpoints", "the largest tensor"):
        assert kind in done.stderr
    assert "checkpoint.asynchronous=false" in done.stderr
    assert "Traceback" not in done.stderr


def test_c4_the_copies_of_a_checkpoint_and_reading_one_count(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny, tmp_path / "run", "checkpoint.copy_budget_gib=0.0001")
    with open_run(config, World()) as run:
        plan = run.plan
        needs = host_needs(config, plan)
        state = sum(tensor.nbytes for tensor in run.parts.state.tensors().values())
    # fp32 on a CPU: what a checkpoint holds, less the counters of steps, and the gradients.
    held = needs["weights"] + needs["optimizer state"]
    gradients = 4 * plan.parameters
    assert held - gradients == pytest.approx(state, rel=0.01)
    assert needs["copies for checkpoints"] == int(0.0001 * 2**30)
    assert needs["the largest tensor while a checkpoint is read"] == 4 * 257 * 32
    for spare, fits in ((-1, False), (0, True)):
        there = sum(needs.values()) + spare
        monkeypatch.setattr(host_needs_module, "available_host_bytes", lambda there=there: there)
        if fits:
            require_host_memory(config, plan)
        else:
            with pytest.raises(MemoryShort, match="are left on"):
                require_host_memory(config, plan)


def test_c4_ranks_of_one_host_share_its_memory(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny, tmp_path / "run")
    with open_run(config, World()) as run:
        plan = run.plan.model_copy(update={"ranks_per_host": 4})
    there = 3 * sum(host_needs(config, plan).values())
    monkeypatch.setattr(host_needs_module, "available_host_bytes", lambda: there)
    with pytest.raises(MemoryShort, match="and of its 4 ranks"):
        require_host_memory(config, plan)


def test_c4_until_zero_has_cut_a_model_every_rank_holds_all_of_it(
    tiny: Sequence[str], tmp_path: Path
) -> None:
    config = config_of(tiny, tmp_path / "run")
    with open_run(config, World()) as run:
        memory = run.plan.memory
    # Of four ranks, on devices of their own.
    device = memory.device.model_copy(update={"weights": memory.device.weights // 4})
    plan = run.plan.model_copy(
        update={"device_type": "cuda", "memory": memory.model_copy(update={"device": device})}
    )
    whole = "the whole model until ZeRO has cut it"
    assert host_needs(config, plan)[whole] == 0
    parallel = config.parallel.model_copy(update={"engine": "deepspeed"})
    config = config.model_copy(update={"parallel": parallel})
    assert host_needs(config, plan)[whole] == 4 * plan.parameters
    on_cpu = plan.model_copy(update={"device_type": "cpu"})
    assert host_needs(config, on_cpu)[whole] == 4 * plan.parameters - device.weights


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text, encoding="ascii")


def test_c4_limits_of_every_group_above_the_own_one_count(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    own = root / "slurm" / "job" / "step"
    group(own, memory_max="max\n", memory_current="10\n")
    group(own.parent, memory_max="1000\n", memory_current="600\n")
    group(own.parent, memory_stat="anon 100\ninactive_file 250\nactive_file 50\n")
    group(root / "slurm", memory_max="5000\n", memory_current="4900\n")
    membership.write_text("1:name=systemd:/x\n0::/slurm/job/step\n", encoding="ascii")
    assert group_memory(root, membership) == [(1000, 350), (5000, 4900)]


def test_c4_groups_of_the_older_kind_count_and_a_mount_inside_a_container_too(
    tmp_path: Path,
) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    folder = root / "memory"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("3000\n", encoding="ascii")
    (folder / "memory.usage_in_bytes").write_text("2000\n", encoding="ascii")
    (folder / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 500\n")
    # The path is that of the host, which is not to be seen from inside.
    membership.write_text("4:cpu,memory:/docker/0a1b\n", encoding="ascii")
    assert group_memory(root, membership) == [(3000, 1500)]
    assert group_memory(root, tmp_path / "none") == []


def test_c4_memory_that_gets_short_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    watch = MemoryWatch(said.append)
    for left in (10 * 2**30, 6 * 2**30, 4 * 2**30, 2**30):
        monkeypatch.setattr(memory_watch_module, "available_host_bytes", lambda left=left: left)
        monkeypatch.setattr(memory_watch_module, "host_memory_bytes", lambda: 100 * 2**30)
        watch.look()
    assert len(said) == 1
    assert said[0].startswith("host memory gets short: 4.0 GiB of 100.0 GiB are left.")


def test_c4_a_run_looks_at_the_memory_of_its_host(
    tiny: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_watch_module, "SHORT_SHARE", 1.0)
    said = train_here(tiny, tmp_path / "run", "train.steps=3", "observe.log_every_steps=1")
    assert said.count("host memory gets short") == 1


LOAD = """
import json, sys
from pathlib import Path
from interlace.trainer.assembly import assemble
from interlace.trainer.checkpoint import CheckpointStore
from interlace.trainer.checkpoint.state import load_newest
from interlace.trainer.config import load_recipe
from interlace.trainer.world import World

def memory(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])

saved, *words = sys.argv[1:]
parts, _, _ = assemble(load_recipe(words[0], words[1:]).config, World())
tensors = parts.state.tensors()
# Memory that is handed out before it is used is not there yet.
for tensor in tensors.values():
    tensor.detach().add_(0)
sizes = [tensor.nbytes for tensor in tensors.values()]
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
load_newest(CheckpointStore(Path(saved) / "checkpoints"), parts.state)
print(json.dumps({"grew": memory("VmHWM") - before, "state": sum(sizes), "largest": max(sizes)}))
"""


@pytest.mark.faults
@pytest.mark.parametrize("strategy", ["none", "host"])
def test_c6_reading_a_checkpoint_takes_one_tensor_more_than_the_state(
    strategy: str, tiny: Sequence[str], tmp_path: Path
) -> None:
    words = (
        *tiny,
        "model.width=512",
        "model.heads=8",
        "model.kv_heads=8",
        "model.ffn_width=1536",
        "model.layers=4",
        "train.validate_every_steps=0",
        f"offload.strategy={strategy}",
    )
    saved = tmp_path / "saved"
    train_here(words, saved, "train.steps=1")
    script = tmp_path / "script.py"
    script.write_text(LOAD, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(saved), *words, f"run.dir={tmp_path / 'fresh'}"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["state"] > 120 * 2**20
    assert found["grew"] < found["largest"] + 0.2 * found["state"], found
