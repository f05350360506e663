"""Memory that is not there: refused before the start, told in words while training, kept while
loading. Disks are in `test_saving.py`.
"""

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
from interlace.offload.schedule import MemoryShortage
from interlace.trainer.checkpoint import CheckpointStore
from interlace.trainer.errors import ConfigError, MemoryShort
from interlace.trainer.exits import Exit, status_of
from interlace.trainer.memory_short import memory_in_words
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
