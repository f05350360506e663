"""The JSON of DeepSpeed that a recipe means, alone and with a user's own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from ranks import run_on_ranks

from interlace.launch.plan_table import make_setting
from interlace.offload.hardware import HardwareProfile, load_profile
from interlace.trainer.config import load_recipe
from interlace.trainer.engines.zero.known_keys import KNOWN
from interlace.trainer.engines.zero.settings import engine_settings
from interlace.trainer.errors import ConfigError
from interlace.trainer.plan import resolve

CPU = HardwareProfile(
    name="test",
    device_name="CPU",
    matmul_flops=1e11,
    device_memory_bytes=2**40,
    host_memory_bytes=2**40,
)

ZERO = "parallel.engine=deepspeed"


def settings_of(words: str = "", hardware: HardwareProfile = CPU, ranks: int = 2) -> dict[str, Any]:
    """Return the JSON of the quickstart with other settings."""
    config = load_recipe("quickstart", [ZERO, *words.split()]).config
    return engine_settings(config, resolve(config, make_setting(config, ranks, hardware)))


@pytest.fixture
def merged(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Returns the JSON of the quickstart with a user's own merged in."""

    def with_own(own: object, words: str = "offload.strategy=host", **more: Any) -> dict[str, Any]:
        file = tmp_path / "own.json"
        file.write_text(own if isinstance(own, str) else json.dumps(own), encoding="utf-8")
        return settings_of(f"parallel.deepspeed_config={file} {words}", **more)

    return with_own


@pytest.fixture
def refused(merged: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., list[str]]:
    """Returns what speaks against a user's own JSON, without the name of the file."""

    def why_not(own: object, *words: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            merged(own, *words)
        start = f"parallel.deepspeed_config={tmp_path}/own.json: "
        assert all(problem.startswith(start) for problem in caught.value.problems)
        return [problem.removeprefix(start) for problem in caught.value.problems]

    return why_not


# ---- what follows from a recipe ------------------------------------------------------------------


def test_batch_accumulation_and_clipping_follow_from_the_recipe() -> None:
    words = "train.tokens_per_step=8192 train.microbatch_rows=4 optimizer.clip=0.5"
    made = settings_of(words)
    assert made["train_batch_size"] == 32
    assert made["train_micro_batch_size_per_gpu"] == 4
    assert made["gradient_accumulation_steps"] == 4
    assert made["gradient_clipping"] == 0.5


def test_no_clipping_is_said_since_deepspeed_clips_by_itself() -> None:
    assert settings_of("optimizer.clip=0")["gradient_clipping"] == 0.0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_is_offloaded_as_the_recipe_has_it(stage: int) -> None:
    own = settings_of(f"parallel.zero_stage={stage}")["zero_optimization"]
    assert own["stage"] == stage
    assert "offload_optimizer" not in own
    words = f"parallel.zero_stage={stage} offload.strategy=host offload.subgroup_elements=1000"
    offloaded = settings_of(words)["zero_optimization"]
    assert offloaded["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert offloaded["sub_group_size"] == 1000


def test_a_gpu_computes_in_bfloat16_and_sums_in_float32() -> None:
    made = settings_of("offload.strategy=optimal", load_profile("h200"))
    assert made["bf16"] == {"enabled": True}
    assert made["communication_data_type"] == "fp32"
    assert made["data_types"]["grad_accum_dtype"] == "fp32"
    assert made["zero_optimization"]["offload_optimizer"]["pin_memory"] is True
    assert settings_of("offload.strategy=optimal")["bf16"] == {"enabled": False}


def test_buckets_are_no_longer_than_the_model() -> None:
    assert settings_of()["zero_optimization"]["reduce_bucket_size"] < 10_000_000


def test_bfloat16_that_zero_1_would_sum_elsewhere_is_refused() -> None:
    words = "parallel.zero_stage=1 train.compute_dtype=bfloat16 train.microbatch_rows=2"
    with pytest.raises(ConfigError) as caught:
        settings_of(words)
    assert str(caught.value) == (
        "parallel.zero_stage=1: the 2 passes of a step are summed in float32, which DeepSpeed does "
        "in another optimizer than that of ZeRO where weights are in bfloat16 and no state is "
        "offloaded, and whose state is not known here; type parallel.zero_stage=2, "
        "offload.strategy=host or train.compute_dtype=float32"
    )
    offloaded = settings_of(f"{words} offload.strategy=host")
    assert offloaded["data_types"]["grad_accum_dtype"] == "fp32"
    one_pass = settings_of(words.replace("rows=2", "rows=4"))
    assert one_pass["data_types"]["grad_accum_dtype"] == "bf16"


# ---- a user's own --------------------------------------------------------------------------------


def test_other_settings_pass_through(merged: Callable[..., dict[str, Any]]) -> None:
    own = {
        "zero_optimization": {
            "reduce_bucket_size": 5e6,
            "overlap_comm": False,
            "offload_optimizer": {"pin_memory": True},
        },
        "steps_per_print": 10,
        "flops_profiler": {"enabled": True, "profile_step": 2},
    }
    made = merged(own)
    assert made["zero_optimization"]["reduce_bucket_size"] == 5e6
    assert made["zero_optimization"]["overlap_comm"] is False
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert made["zero_optimization"]["stage"] == 3
    assert made["steps_per_print"] == 10
    assert made["flops_profiler"] == {"enabled": True, "profile_step": 2}


def test_auto_and_what_says_the_same_are_no_conflict(
    merged: Callable[..., dict[str, Any]],
) -> None:
    own = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1,
        "bfloat16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 1e8,
            "stage3_prefetch_bucket_size": "auto",
            "reduce_bucket_size": "auto",
            "offload_optimizer": {"device": "cpu", "ratio": 1.0},
            "offload_param": {"device": "none"},
        },
    }
    made, plain = merged(own), settings_of("offload.strategy=host")
    assert made["fp16"].pop("loss_scale") == 0
    assert made["zero_optimization"]["offload_optimizer"].pop("ratio") == 1.0
    assert made["zero_optimization"].pop("offload_param") == {"device": "none"}
    assert made == plain


def test_every_conflict_is_named_at_once_with_what_to_type(
    refused: Callable[..., list[str]],
) -> None:
    own = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 2,
            "sub_group_size": 1e9,
            "offload_optimizer": {"device": "none"},
        },
    }
    assert refused(own) == [
        "train_batch_size is 64, and the recipe makes it 8 (train.tokens_per_step=2048 in rows of "
        "256); leave it out, or type train.tokens_per_step=16384",
        "train_micro_batch_size_per_gpu is 2, and the recipe makes it 4 (4 rows of each rank in "
        "passes of 4); leave it out, or type train.microbatch_rows=2",
        "gradient_accumulation_steps is 2, and the recipe makes it 1 (4 rows of each rank in "
        "passes of 4); leave it out, or type train.microbatch_rows=2",
        "gradient_clipping is 0.5, and the recipe makes it 1.0 (optimizer.clip); leave it out, or "
        "type optimizer.clip=0.5",
        "bf16.enabled is true, and the recipe makes it false (train.compute_dtype=auto on this "
        "device); leave it out, or type train.compute_dtype=bfloat16",
        "zero_optimization.stage is 2, and the recipe makes it 3 (parallel.zero_stage=3); leave it "
        "out, or type parallel.zero_stage=2",
        "zero_optimization.sub_group_size is 1000000000.0, and the recipe makes it 100000000 "
        "(offload.subgroup_elements=100000000); leave it out, or type "
        "offload.subgroup_elements=1000000000",
        'zero_optimization.offload_optimizer.device is "none", and the recipe makes it "cpu" '
        "(offload.strategy=host); leave it out, or type offload.strategy=none",
    ]


def test_the_remedies_of_conflicts_mend_them(
    merged: Callable[..., dict[str, Any]], refused: Callable[..., list[str]]
) -> None:
    own = {
        "train_batch_size": 64,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": None},
    }
    typed = " ".join(each.split("or type ")[1] for each in refused(own) if "or type" in each)
    words = f"offload.strategy=host {typed} train.microbatch_rows=4"
    assert merged(own, words)["gradient_accumulation_steps"] == 8


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"optimizer": {"type": "AdamW"}}, 'optimizer is {"type": "AdamW"}: [optimizer] of the'),
        ({"scheduler": {"type": "WarmupLR"}}, 'scheduler is {"type": "WarmupLR"}: optimizer.sch'),
        ({"fp16": {"enabled": True}}, "fp16.enabled is true: the trainer scales no losses"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow is"),
        (
            {"zero_optimization": {"offload_optimizer": {"super_offload": True}}},
            "zero_optimization.offload_optimizer.super_offload is true: SuperOffload updates",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}},
            "zero_optimization.offload_optimizer.ratio is 0.5: which state stays on the device",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            'zero_optimization.offload_param.device is "cpu": weights stay on the device',
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            'zero_optimization.offload_optimizer.device is "nvme", and the recipe makes it "cpu" '
            "(offload.strategy=host); leave it out",
        ),
        ({"bf16": True}, "bf16 is true, and DeepSpeed has a table there"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps is true, and the re"),
        ({"train_batch_sise": 8}, "DeepSpeed has no setting train_batch_sise; did you mean train_"),
        (
            {"zero_optimization": {"reduce_buckets": 1}},
            "DeepSpeed has no setting reduce_buckets under zero_optimization; did you mean reduce_",
        ),
        ({"elasticity": {}}, "DeepSpeed has no setting elasticity; take it out"),
    ],
)
def test_what_would_train_otherwise_is_refused_with_its_reason(
    own: object, said: str, refused: Callable[..., list[str]]
) -> None:
    (problem,) = refused(own)
    assert problem.startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON (Expecting value: line 1, column 1); mend it there"),
        ("[1]", "holds a list, and settings of DeepSpeed are one object, in braces"),
        ("3", "holds a single value, and settings of DeepSpeed are one object, in braces"),
        ('{"a": 1,\n "b" 2}', "is not JSON (Expecting ':' delimiter: line 2, column 6); mend it"),
        ('{\n// batch\n"train_batch_size": 8}', "line 2 is a comment, which JSON has not"),
        ('{"train_batch_size": 8 # rows\n}', "line 1 is a comment, which JSON has not; take it"),
        ('{"bf16": {"a": 1, "a": 2}}', "has a twice in one table; take one of them out"),
        ('{"gradient_clipping": NaN}', "holds NaN, which is no number of JSON"),
        ('{"a":' * 100_000, "holds tables within tables without end"),
    ],
)
def test_a_file_that_is_no_json_object_is_told_of(
    text: str, said: str, refused: Callable[..., list[str]]
) -> None:
    (problem,) = refused(text)
    assert problem.startswith(said)


def test_a_file_that_cannot_be_read_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(f"parallel.deepspeed_config={tmp_path}/none.json")
    assert str(caught.value) == (
        f"parallel.deepspeed_config={tmp_path}/none.json: there is no such file; if it was moved, "
        "say where to, as parallel.deepspeed_config=PATH"
    )
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        settings_of(f"parallel.deepspeed_config={tmp_path}")
    (tmp_path / "bytes.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r"is not text in UTF-8 \(byte 7\)"):
        settings_of(f"parallel.deepspeed_config={tmp_path}/bytes.json")


# ---- beside DeepSpeed itself ---------------------------------------------------------------------

SUMMED = """
import os, warnings
os.environ["DS_ACCELERATOR"] = "cpu"
warnings.filterwarnings("ignore")
import copy, json, logging
import deepspeed, torch
from deepspeed.utils import safe_get_full_grad
logging.disable(logging.WARNING)

# Collectives for inference, which would be compiled first.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
rank, found = torch.distributed.get_rank(), []
for settings in SETTINGS:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    twin, generator = copy.deepcopy(model).bfloat16(), torch.Generator().manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    passes = settings["gradient_accumulation_steps"]
    sums = [torch.zeros(weight.shape) for weight in twin.parameters()]
    for number in range(passes):
        x = torch.randn(4, 64, generator=generator).bfloat16()
        engine.backward((engine(x).float() ** 2).sum())
        loss = (twin(x).float() ** 2).sum() / passes
        for total, one in zip(sums, torch.autograd.grad(loss, list(twin.parameters()))):
            total += one.float()
        if number < passes - 1:
            engine.step()
    for total in sums:
        torch.distributed.all_reduce(total)
    got = [safe_get_full_grad(weight) for weight in engine.module.parameters()]
    apart = [(a.float() - b / 2).abs().max() / b.abs().max() for a, b in zip(got, sums)]
    found.append([type(engine.optimizer).__name__, float(max(apart))])
    engine.step()
    engine.destroy()
if rank == 0:
    print("FOUND", json.dumps(found), flush=True)
torch.distributed.barrier()
"""


def test_gradients_in_bfloat16_are_summed_in_float32_in_every_stage(tmp_path: Path) -> None:
    usual = "train.compute_dtype=bfloat16 train.microbatch_rows=1 parallel.zero_stage="
    words = [f"{usual}{stage} offload.strategy=host" for stage in (1, 2, 3)]
    words += [f"{usual}{stage}" for stage in (2, 3)]
    made = [settings_of(each) for each in words]
    in_bfloat16 = {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}
    made.append(made[-1] | in_bfloat16)
    # One pass of one row: what ranks send is all that is summed.
    made.append(settings_of(f"{usual}1".replace("rows=1", "rows=4")))
    done = run_on_ranks(f"SETTINGS = {made!r}\n{SUMMED}", tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    *exact, rounded, once = json.loads(line.removeprefix("FOUND "))
    assert [apart for _, apart in exact] == [0.0] * 5
    assert rounded[1] > 1e-3
    # The sum is exact; that it is kept in bfloat16 is the only rounding.
    assert once[1] < 2**-8
    kinds = {name for name, _ in (*exact, rounded, once)}
    assert kinds == {"DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"}


ASKED = """
import json, os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

def names(kind):
    fields = kind.model_fields
    return sorted({*fields, *(field.alias for field in fields.values() if field.alias)})

taken = []
for settings in json.loads(sys.argv[1]):
    config = DeepSpeedConfig(settings)
    zero = config.zero_config
    taken.append([
        config.train_batch_size, config.gradient_accumulation_steps, config.gradient_clipping,
        config.bfloat16_config.enabled, str(config.communication_data_type),
        config.grad_accum_dtype, int(zero.stage), zero.sub_group_size,
        zero.offload_optimizer.device if zero.offload_optimizer else "none",
    ])
kinds = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "bf16": DeepSpeedBF16Config,
}
print(json.dumps([taken, {path: names(kind) for path, kind in kinds.items()}]))
"""


def test_deepspeed_takes_the_json_and_has_the_settings_that_are_known() -> None:
    words = [f"parallel.zero_stage={stage} offload.strategy=host" for stage in (1, 2, 3)]
    words.append("train.compute_dtype=bfloat16 train.microbatch_rows=4")
    made = [settings_of(each, ranks=1) for each in words]
    done = subprocess.run(
        [sys.executable, "-c", ASKED, json.dumps(made)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    taken, names = json.loads(done.stdout.splitlines()[-1])
    usual = [8, 1, 1.0, False, "torch.float32", "fp32"]
    assert taken[:3] == [[*usual, stage, 100_000_000, "cpu"] for stage in (1, 2, 3)]
    assert taken[3] == [8, 2, 1.0, True, "torch.float32", "fp32", 3, 100_000_000, "none"]
    for path, there in names.items():
        assert set(there) <= KNOWN[path]
        # What later versions have brought is not missed in earlier ones.
        newest = metadata.version("deepspeed").startswith("0.19.8")
        assert not newest or set(there) == KNOWN[path]


REFUSED_BY_DEEPSPEED = """
import os
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
from interlace.trainer.engines.zero.accepted import require_accepted
from interlace.trainer.errors import ConfigError

for settings in SETTINGS:
    try:
        require_accepted(settings, "own.json")
        print("SAID nothing", flush=True)
    except ConfigError as error:
        print("SAID", error, flush=True)
"""


def test_what_deepspeed_refuses_by_itself_is_a_mistake_of_the_file(
    merged: Callable[..., dict[str, Any]],
) -> None:
    own = [
        {"zero_optimization": {"overlap_comm": False}},
        {"zero_optimization": {"reduce_bucket_size": "big", "allgather_bucket_size": -1}},
        {"communication_data_type": "fp8"},
        {"tensorboard": {"enabeld": True}},
    ]
    script = f"SETTINGS = {[merged(each) for each in own]!r}\n{REFUSED_BY_DEEPSPEED}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("SAID ")]
    start = "SAID parallel.deepspeed_config=own.json: DeepSpeed refuses it: "
    assert said[0] == "SAID nothing"
    assert said[1].startswith(f"{start}reduce_bucket_size='big': Input should be a valid integer")
    assert "; allgather_bucket_size=-1: Input should be greater than or equal to 0" in said[1]
    assert said[2].startswith(f"{start}ValueError: Invalid communication_data_type.")
    assert said[3].startswith(f"{start}tensorboard.enabeld=True: Extra inputs are not permitted")
    assert said[3].endswith("; mend it")
