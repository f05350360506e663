"""Clipped coordinates on four ranks: sharded, sharded and replicated, or whole, the bits are equal.

Gradients are small multiples of 2**-10, so that sums and means over rows are exact in any order,
and nothing but clipping could differ.
"""

from pathlib import Path

from ranks import run_on_ranks

SCRIPT = """
import hashlib, itertools, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from interlace.kernels.update import AdamW, CoordinateClip, clipped_sgd
from interlace.offload import MemoryBudget, OffloadedOptimizer, OffloadOptions

dist.init_process_group("gloo")
rank, ROWS = dist.get_rank(), 4
SHAPES = {"fused": (8, 6), "table": (10, 4), "vector": (5,), "single": (1,), "idle": (3,)}
BLOCKS = (
    {"rows": 3}, {"rows": 4, "lr": 0.25, "threshold": 2.0}, {"rows": 1, "weight_decay": 4.0}
)
MESHES = {
    "shards": init_device_mesh("cpu", (4,)),
    "replicas": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")),
    "whole": None,
}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, coefficients):
        named = [(getattr(self, name), c) for name, c in coefficients.items()]
        return torch.stack([(weight * c).sum() for weight, c in named]).sum()

def rows_of(step, name):
    generator = torch.Generator().manual_seed(100 * step + len(name))
    rows = torch.randint(-50, 51, (ROWS, *SHAPES[name]), generator=generator) / 2.0**10
    if name == "table":
        # A vocabulary: most rows have no gradient, and which have changes.
        rows[:, [n for n in range(10) if n % 5 != step % 5]] = 0.0
    if name == "idle" and step < 2:
        rows[:] = 0.0
    return rows

def train(layout, rule, overlap, strategy, sizes, accumulation):
    mesh = MESHES[layout]
    model = Net()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    groups = [
        {"params": [model.fused], "row_blocks": BLOCKS, "weight_decay": 0.5},
        {"params": [getattr(model, name) for name in SHAPES if name != "fused"], "lr": 0.02},
    ]
    optimizer = OffloadedOptimizer(
        groups, rule, strategy=strategy, budget=MemoryBudget(10**9, 10**9), overlap=overlap,
        model=model if overlap != "none" else None,
        options=OffloadOptions(
            subgroup_elements=sizes, stride=2, cpu_threads=1, stream_gradients=True,
            accumulation_steps=accumulation,
        ),
    )
    fractions = []
    for step in range(5):
        mine = slice(None) if mesh is None else slice(rank, rank + 1)
        rows = {name: rows_of(step, name)[mine].mean(0) for name in SHAPES}
        for _ in range(accumulation):
            (model(rows) / accumulation).backward()
        optimizer.step()
        # After the other steps, what ranks have to tell each other waits for the next gradient.
        if step in (1, 4):
            optimizer.finish_step()
            fractions.append(list(optimizer.clip_fractions().values()))
    digest = hashlib.sha256(repr(fractions).encode())
    for parameter in (getattr(model, name) for name in SHAPES):
        for tensor in (parameter, *optimizer.state[parameter].values()):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            digest.update(whole.detach().contiguous().numpy().tobytes())
    thresholds = optimizer.state[model.fused].get("threshold")
    optimizer.close()
    return digest.hexdigest(), fractions, thresholds

RULES = {
    "fixed": clipped_sgd(lr=0.01, threshold=0.01, weight_decay=0.1),
    "lagged": clipped_sgd(lr=0.01, policy="lagged_quantile", share=0.3),
    "global": clipped_sgd(lr=0.01, policy="global_quantile", share=0.3),
    "adam": CoordinateClip(AdamW(lr=0.01), policy="lagged_quantile", share=0.5),
}
for name, rule in RULES.items():
    found = {}
    for number, (layout, overlap) in enumerate(
        itertools.product(MESHES, ("none", "forward", "backward"))
    ):
        if name == "global" and overlap == "backward":
            continue
        way = (layout, overlap, ("host", "none", "stride")[number % 3], (1, 60)[number % 2],
            (1, 2, 4)[number // 3 % 3])
        found[way], fractions, thresholds = train(layout, rule, *way[1:])
    assert len(set(found.values())) == 1, (name, found)
    assert any(0 < share < 1 for share in fractions[-1]), fractions
    if name == "lagged":
        assert len(thresholds) == 3 and bool((thresholds > 0).all()), thresholds
    everywhere = [None] * 4
    dist.all_gather_object(everywhere, set(found.values()))
    assert len(set.union(*everywhere)) == 1, name
print("RANK", rank, "AGREES")
"""


def test_layout_overlap_and_accumulation_change_no_bit(tmp_path: Path) -> None:
    done = run_on_ranks(SCRIPT, tmp_path, ranks=4)
    assert done.stdout.count("AGREES") == 4, done.stdout + done.stderr
