"""ZeRO behind the engine: saves beside updates, and a DeepSpeed that is another than expected."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from digests import stored_digest
from engine_runs import CASES, WORDS
from ranks import run_on_ranks

from interlace.trainer.checkpoint import CheckpointStore

SCRIPT = f"""
import sys, threading, time
import torch
sys.path.insert(0, {str(CASES)!r})
from unittest.mock import patch
from engine_runs import *
from interlace.offload.watched import Watched
from interlace.trainer.checkpoint import ledger, live, saves

def zero(stage, home):
    return [ZERO, f"parallel.zero_stage={{stage}}", f"offload.strategy={{home}}"]

def slow(_):
    time.sleep(0.003)

updating = threading.Event()

def held(_):
    # Behind the last save there is no update.
    if not updating.wait(3.0):
        updating.set()
    time.sleep(0.003)

words = json.loads(Path("words.json").read_text())
assembly.leave_pictures = lambda *_: None
shown, linear = {{}}, torch.nn.functional.linear
with process_group() as world:

    # ---- saves beside updates
    live.SMALL_BYTES, ledger.CHUNK_BYTES, ledger.LEAST_POOL_BYTES = 4, 2048, 0
    saving = [*words, "train.steps=5", "checkpoint.every_steps=1"]
    for stage, home in ((1, "host"), (2, "none"), (3, "host")):
        name, these = f"zero{{stage}}-{{home}}", [*saving, *zero(stage, home)]
        run(world, f"{{name}}-waited", [*these, "checkpoint.asynchronous=false"])
        with patch.object(ledger, "failpoint", slow):
            run(world, f"{{name}}-beside", these)
            with patch.object(ledger.Ledger, "claim", lambda *_: None):
                shown[f"{{name}}-spoilt"] = run(world, f"{{name}}-spoilt", these)
        with (
            patch.object(saves, "failpoint", lambda _: updating.clear()),
            patch.object(ledger, "failpoint", held),
            patch.object(Watched, "about_to_change", lambda self: updating.set()),
        ):
            shown[f"{{name}}-unasked"] = run(world, f"{{name}}-unasked", these)

    # ---- another DeepSpeed
    import deepspeed
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Stages1And2
    words = [*words, "train.steps=3"]
    given = []
    initialize = deepspeed.initialize

    def noted(**arguments):
        given.append(arguments["config"])
        return initialize(**arguments)

    with patch.object(deepspeed, "initialize", noted):
        shown["attached"] = run(world, "attached", [*words, *zero(3, "host")])
    shown["given"] = given
    with patch.object(deepspeed, "__version__", "0.20.0"):
        shown["newer"] = run(world, "newer", [*words, *zero(3, "host")])
    for stage, kind, name in (
        (3, Stage3, "_get_norm_groups"),
        (2, Stages1And2, "scaled_global_norm"),
    ):
        own = getattr(kind, name)
        delattr(kind, name)
        shown[f"lacks-{{name}}"] = run(world, f"lacks-{{name}}", [*words, *zero(stage, "none")])
        setattr(kind, name, own)
    shown["own linear"] = torch.nn.functional.linear is linear
    shown["again"] = run(world, "again", [*words, *zero(3, "none")])
    if world.is_main:
        Path("shown.json").write_text(json.dumps(shown))
    world.barrier()
"""

CASES_OF_SAVES = ("zero1-host", "zero2-none", "zero3-host")


@dataclass(frozen=True)
class Shown:
    """What came of all runs."""

    folder: Path
    runs: dict[str, Any]

    def saved(self, name: str) -> dict[int, str]:
        """Return the digests of the checkpoints of a run, by step."""
        steps = CheckpointStore(self.folder / name / "checkpoints").committed_steps()
        return {step: stored_digest(self.folder / name, step) for step in steps}


@pytest.fixture(scope="module")
def shown(corpus: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """Make all runs, on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "words.json").write_text(json.dumps([*WORDS, *corpus]), encoding="utf-8")
    done = run_on_ranks(SCRIPT, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return Shown(folder, json.loads((folder / "shown.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", CASES_OF_SAVES)
def test_what_is_saved_beside_updates_has_the_bytes_of_what_was_waited_for(
    name: str, shown: Shown
) -> None:
    waited = shown.saved(f"{name}-waited")
    assert list(waited) == [1, 2, 3, 4, 5]
    assert len(set(waited.values())) == 5
    assert shown.saved(f"{name}-beside") == waited


@pytest.mark.parametrize("name", ["zero1-host", "zero3-host"])
def test_if_our_updates_announced_nothing_saves_would_hold_parts_of_two_steps(
    name: str, shown: Shown
) -> None:
    waited, unasked = shown.saved(f"{name}-waited"), shown.saved(f"{name}-unasked")
    assert all(unasked.get(step) != waited[step] for step in (1, 2, 3, 4))


@pytest.mark.parametrize(
    "name", [*(f"{name}-spoilt" for name in CASES_OF_SAVES), "zero2-none-unasked"]
)
def test_an_update_that_waits_for_no_save_spoils_it(name: str, shown: Shown) -> None:
    # Torch counts writes of its own optimizer, announced or not.
    waited, spoilt = shown.saved(name.rpartition("-")[0] + "-waited"), shown.saved(name)
    assert set(spoilt.items()) < set(waited.items())
    assert "was changed while it was being saved" in shown.runs[name]["said"]


def test_the_run_folder_has_the_json_that_deepspeed_got(shown: Shown) -> None:
    [given] = shown.runs["given"]
    written = (shown.folder / "attached" / "deepspeed.json").read_text(encoding="utf-8")
    assert json.loads(written) == given
    assert given["zero_optimization"]["stage"] == 3


def test_where_nothing_can_be_attached_a_note_says_why_and_deepspeed_updates(
    shown: Shown,
) -> None:
    attached, newer = shown.runs["attached"], shown.runs["newer"]
    assert "not attached" not in attached["said"]
    assert (
        "not attached, DeepSpeed updates as it does without: this is DeepSpeed 0.20.0, and 0.19 up "
        "to but not 0.20 is known"
    ) in newer["said"]
    assert newer["losses"] == pytest.approx(attached["losses"], rel=0, abs=1e-6)
    assert len(newer["losses"]) == 3


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("_get_norm_groups", "DeepSpeedZeroOptimizer_Stage3"),
        ("scaled_global_norm", "DeepSpeedZeroOptimizer"),
    ],
)
def test_a_name_that_deepspeed_has_no_more_is_told_before_training(
    name: str, kind: str, shown: Shown
) -> None:
    refused = shown.runs[f"lacks-{name}"]
    assert refused["losses"] == []
    assert refused["ended"] == (
        f"parallel.engine=deepspeed: {kind} of this DeepSpeed has no {name}; type "
        "parallel.engine=fsdp2, or  pip install deepspeed==0.19.8"
    )
    # What had been begun is undone: the next run of the process trains.
    assert shown.runs["own linear"]
    assert len(shown.runs["again"]["losses"]) == 3
