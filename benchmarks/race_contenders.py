"""Who runs in `benchmarks/versus_deepspeed.py`: the ways to train what does not fit a device.

A contender is a name, an engine and what that is told; how each is built is in `race_engines`, and
nothing is loaded here. Where time is short, the first of them are worth most.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from interlace.offload.schedule import Strategy

Engine = Literal["deepspeed", "attached", "fsdp2", "interlace"]
"""DeepSpeed as it is; DeepSpeed with our update attached; torch alone; our optimizer on FSDP2."""

CLIP_NORM = 1.0
"""Largest global norm of the gradients, for everyone who clips by it."""

WEIGHT_DECAY, BETAS, EPSILON = 0.1, (0.9, 0.95), 1e-6

STRIDE = 2
"""Every second subgroup on the device: what the published system found best."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to train.

    Attributes:
        name: As it is typed.
        title: As it is shown.
        engine: What trains it.
        strategy: Of our optimizer, for the engines `interlace` and `attached`.
        rule: `adamw`, or our coordinate-clipped SGD.
        clips: Whether gradients are clipped by their norm.
        offloads: For `fsdp2`: whether parameters, gradients and state live on the host.
        twin: Whether as much state is resident as the others' budget allows (`ratio`).
        zero: Entries of `zero_optimization`, laid over the usual ones.
        offload: Entries of its `offload_optimizer`, likewise.
        mathematics: Contenders with the same end in the same loss; empty where nobody else does.
        caveat: Shown beside the figures.
        drops: Whether an iteration can end without an update.
    """

    name: str
    title: str
    engine: Engine
    strategy: Strategy = "host"
    rule: Literal["adamw", "clipped_sgd"] = "adamw"
    clips: bool = True
    offloads: bool = False
    twin: bool = False
    zero: dict[str, Any] = field(default_factory=dict[str, Any])
    offload: dict[str, Any] = field(default_factory=dict[str, Any])
    mathematics: str = "AdamW"
    caveat: str = ""
    drops: bool = True

    @property
    def is_exact(self) -> bool:
        """Whether it must end in the loss of AdamW with clipping, computed in any other way."""
        return self.mathematics == "AdamW"

    @property
    def is_stock_deepspeed(self) -> bool:
        """Whether it is one of the variants of DeepSpeed that ours are compared with."""
        return self.engine == "deepspeed" and self.name != "zenflow"

    @property
    def is_ours(self) -> bool:
        """Whether our update runs in it, which is predicted."""
        return self.engine in ("interlace", "attached")


def ours(strategy: Strategy, rule: Literal["adamw", "clipped_sgd"] = "adamw") -> Contender:
    """Return our own optimizer on FSDP2."""
    clipped = rule == "clipped_sgd"
    k = f" k={STRIDE}" if strategy == "stride" else ""
    return Contender(
        name=f"{strategy}-clipped-sgd" if clipped else strategy,
        title=f"Interlace {strategy}{k}" + (", clipped SGD" if clipped else ""),
        engine="interlace",
        strategy=strategy,
        rule=rule,
        clips=not clipped,
        mathematics="clipped SGD" if clipped else "AdamW",
        caveat="another update rule" if clipped else "",
    )


ZENFLOW = {
    "topk_ratio": 0.1,
    "select_strategy": "step",
    "select_interval": 16,
    "update_interval": 4,
    "full_warm_up_rounds": 0,
    "overlap_step": True,
}

CONTENDERS: tuple[Contender, ...] = (
    Contender(name="zero3-offload", title="DeepSpeed ZeRO-3 offload", engine="deepspeed"),
    ours("optimal"),
    Contender(name="resident", title="torch, all resident", engine="fsdp2"),
    Contender(
        name="twin-flow",
        title="DeepSpeed Twin-Flow",
        engine="deepspeed",
        twin=True,
        caveat="as much device memory for state as Interlace is given",
    ),
    Contender(
        name="superoffload-clip",
        title="DeepSpeed SuperOffload, clipping",
        engine="deepspeed",
        offload={"super_offload": True},
    ),
    Contender(
        name="superoffload",
        title="DeepSpeed SuperOffload, no clipping",
        engine="deepspeed",
        offload={"super_offload": True},
        clips=False,
        mathematics="",
        caveat="does not clip",
    ),
    ours("optimal", "clipped_sgd"),
    Contender(
        name="attach-optimal",
        title="DeepSpeed with attach, optimal",
        engine="attached",
        strategy="optimal",
    ),
    ours("host"),
    Contender(name="fsdp2-offload", title="FSDP2 CPUOffloadPolicy", engine="fsdp2", offloads=True),
    Contender(
        name="zenflow",
        title="DeepSpeed ZenFlow",
        engine="deepspeed",
        zero={"zenflow": ZENFLOW},
        mathematics="",
        caveat="not the same mathematics: most gradients wait up to 4 steps",
        drops=False,
    ),
    ours("stride"),
    Contender(
        name="attach-host", title="DeepSpeed with attach, host", engine="attached", strategy="host"
    ),
    ours("host", "clipped_sgd"),
    ours("stride", "clipped_sgd"),
)

NAMES = tuple(contender.name for contender in CONTENDERS)


def chosen(names: Sequence[str]) -> tuple[Contender, ...]:
    """Return the contenders of these names in their own order; all for no names.

    Raises:
        ValueError: Some name is none of theirs; the message lists those that are.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(
            f"no contender is called {', '.join(unknown)}; there are: {', '.join(NAMES)}"
        )
    return tuple(each for each in CONTENDERS if not names or each.name in names)


def deepspeed_settings(
    contender: Contender,
    *,
    rows: int,
    lr: float,
    bf16: bool,
    pin: bool,
    subgroup: int,
    ratio: float,
) -> dict[str, Any]:
    """Return the configuration of a contender of DeepSpeed.

    Args:
        contender: Whose.
        rows: Of a micro-batch.
        lr: Learning rate.
        bf16: Whether to compute in bfloat16.
        pin: Whether host memory is pinned.
        subgroup: Parameters of a subgroup of one rank.
        ratio: Share of the subgroups that the CPU updates, for Twin-Flow.
    """
    offload: dict[str, Any] = {"device": "cpu", "pin_memory": pin, **contender.offload}
    if contender.twin:
        offload["ratio"] = ratio
    return {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP_NORM if contender.clips else 0.0,
        "bf16": {"enabled": bf16},
        # DeepSpeed picks its own Adam on the CPU for this, ZenFlow one of its own.
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": lr,
                "betas": list(BETAS),
                "eps": EPSILON,
                "weight_decay": WEIGHT_DECAY,
            },
        },
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": subgroup,
            "offload_optimizer": offload,
            **contender.zero,
        },
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
