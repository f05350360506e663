"""What a run under ZeRO leaves of itself in its process: nothing, however it ends."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import CASES, WORDS, ZERO
from ranks import run_on_ranks
from torch.distributed import is_initialized
from torch.nn import functional

from interlace.trainer.world import World

SCRIPT = f"""
import sys
sys.path[:0] = [{str(CASES)!r}, {str(Path(__file__).parent)!r}]
from test_closing import start_and_end
start_and_end()
"""

Shown = dict[str, Any]


def start_and_end() -> None:
    """Begin a run that fails once its engine is open; make one, with a look at its evidence."""
    import contextlib
    import gc
    import threading
    import weakref

    from tiny_run import config_of

    from interlace.trainer import assembly, evidence

    shown: Shown = {}
    assembly.leave_pictures = lambda *_: None
    linear, diagnostics_of = functional.linear, assembly.diagnostics_of

    def fails(*_: object) -> Any:
        raise RuntimeError("out of order")

    def opened(name: str) -> Any:
        config = config_of(json.loads(Path("words.json").read_text()), Path(name))
        return assembly.open_run(config, World(device=torch.device("cpu")))

    assembly.diagnostics_of = fails
    with contextlib.suppress(RuntimeError), opened("broken"):
        pass
    assembly.diagnostics_of = diagnostics_of
    shown["after failure"] = [functional.linear is linear, is_initialized()]
    with opened("run") as run:
        # From the second step on DeepSpeed knows what follows what, and remembers modules.
        for step in range(3):
            run.update_or_skip(step, run.forward_backward(step), run.gradient_norm())
        model = weakref.ref(run.parts.model)
        next(iter(run.parts.model.parameters())).ds_tensor.fill_(torch.nan)
        batches, state = run.parts.batches, run.parts.state
        folder = evidence.save_evidence(run.folder.path, 0, batches, state)
        shown["evidence"] = json.loads(next(folder.glob("*.json")).read_text())
    del run, batches, state
    gc.collect()
    shown["alive"] = model() is not None
    shown["after success"] = [functional.linear is linear, is_initialized()]
    shown["threads"] = [each.name for each in threading.enumerate() if "lane" in each.name]
    Path("shown.json").write_text(json.dumps(shown))


@pytest.fixture(scope="module")
def shown(corpus: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """What was seen in one process."""
    folder = tmp_path_factory.mktemp("runs")
    # No weight is kept whole between its uses, as none of any size would be.
    own = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    (folder / "own.json").write_text(json.dumps(own), encoding="utf-8")
    cut = f"parallel.deepspeed_config={folder / 'own.json'}"
    words = [*WORDS, *corpus, ZERO, cut, "offload.strategy=host", "train.microbatch_rows=12"]
    (folder / "words.json").write_text(json.dumps(words), encoding="utf-8")
    done = run_on_ranks(SCRIPT, folder, 1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / "shown.json").read_text(encoding="utf-8"))


def test_a_start_that_fails_puts_back_what_deepspeed_has_replaced(shown: Shown) -> None:
    assert shown["after failure"] == [True, False]


def test_nothing_of_a_run_outlives_it(shown: Shown) -> None:
    assert shown["after success"] == [True, False]
    assert not shown["alive"], "DeepSpeed keeps the model, and with it all state"
    assert shown["threads"] == []


def test_evidence_names_weights_of_which_a_rank_has_a_share(shown: Shown) -> None:
    assert shown["evidence"]["weights_not_finite"] == ["embedding.weight"]
