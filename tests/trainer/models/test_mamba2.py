"""Mamba-2: the recurrence of the paper, the layout of mamba_ssm, and decoding from a state."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.context import BlockContext, MambaCache
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.models.mixers.mamba2 import Mamba2
from interlace.trainer.parallel import cast_weights, replace_forward

CHUNK = 64
LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
SHAPES = {
    groups: ModelSection(
        width=24,
        pattern="M",
        layers=1,
        mamba_head_width=12,
        mamba_state_width=8,
        mamba_groups=groups,
        mamba_conv_width=3,
    )
    for groups in (1, 2)
}
VOCABULARY = 31
FREE = BlockContext(rotary=None, segments=None)


def build(groups: int = 2, dtype: torch.dtype = torch.float64) -> Mamba2:
    """Return a mixer whose every parameter matters: values far from their start."""
    config = SHAPES[groups]
    mixer = Mamba2(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in mixer.named_parameters():
        start = Mamba2.initial_value(name, tuple(parameter.shape), config, generator)
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (start + 0.2 * noise).to(dtype)
    # Steps near one let the state forget within a row.
    mixer.dynamics.dt_bias.data += 3
    return mixer


def inputs(length: int, rows: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(rows, length, 24, generator=generator, dtype=torch.float64).to(dtype)


def recurrence(mixer: Mamba2, x: torch.Tensor, groups: int) -> torch.Tensor:
    """The block as the paper writes it: one row (T, D), position by position, head by head."""
    weights = {name: value.detach() for name, value in mixer.named_parameters()}
    inner, width, states = 48, 12, 8
    heads, taps = inner // width, 3
    rows = x @ weights["in_proj.weight"].T
    z, mixed, raw = rows[:, :inner], rows[:, inner:-heads], rows[:, -heads:]
    earlier = torch.cat([torch.zeros(taps - 1, mixed.shape[1], dtype=x.dtype), mixed])
    state = torch.zeros(heads, width, states, dtype=x.dtype)
    results: list[torch.Tensor] = []
    for t in range(len(x)):
        summed = (earlier[t : t + taps].T * weights["conv.weight"]).sum(1) + weights["conv.bias"]
        convolved = summed * torch.sigmoid(summed)
        keys = convolved[inner:].view(2, groups, states)
        y = torch.empty(inner, dtype=x.dtype)
        for head in range(heads):
            group = head * groups // heads
            channels = slice(head * width, (head + 1) * width)
            dt = torch.log1p(torch.exp(raw[t, head] + weights["dynamics.dt_bias"][head]))
            decay = torch.exp(-dt * torch.exp(weights["dynamics.A_log"][head]))
            written = torch.outer(convolved[channels], keys[0, group])
            state[head] = decay * state[head] + dt * written
            skip = weights["dynamics.D"][head] * convolved[channels]
            y[channels] = state[head] @ keys[1, group] + skip
        gated = (y * z[t] * torch.sigmoid(z[t])).view(groups, -1)
        normed = gated / torch.sqrt(gated.square().mean(1, keepdim=True) + 1e-5)
        results.append(weights["out_proj.weight"] @ (normed.flatten() * weights["norm.weight"]))
    return torch.stack(results)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("groups", SHAPES)
def test_the_block_is_the_recurrence_of_the_paper(groups: int, length: int) -> None:
    mixer, x = build(groups), inputs(length, rows=1)
    expected = recurrence(mixer, x[0], groups)
    torch.testing.assert_close(mixer(x, FREE)[0], expected, rtol=1e-10, atol=1e-11)


TRANSFORMERS = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
results = {}
for groups in (1, 2):
    config = Mamba2Config(
        hidden_size=24, num_heads=4, head_dim=12, state_size=8, n_groups=groups, conv_kernel=3,
        expand=2, chunk_size=64, layer_norm_epsilon=1e-5, use_bias=False, num_hidden_layers=1,
    )
    mixer = Mamba2Mixer(config, 0).eval()
    tensors = load_file(f"{sys.argv[1]}/{groups}.safetensors")
    inputs = {name: tensors.pop(name) for name in list(tensors) if name.isdigit()}
    mixer.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        for name, x in inputs.items():
            results[f"{groups}/{name}"] = mixer(x).contiguous()
save_file(results, f"{sys.argv[1]}/results.safetensors")
"""
"""Our weights, renamed, in the mixer of transformers."""


def test_transformers_computes_the_same_from_the_same_weights(tmp_path: Path) -> None:
    for groups in SHAPES:
        renamed = {
            name.replace("dynamics.", "").replace("conv.", "conv1d."): parameter.data
            for name, parameter in build(groups, torch.float32).named_parameters()
        }
        renamed["conv1d.weight"] = renamed["conv1d.weight"].unsqueeze(1)
        rows = {str(length): inputs(length, dtype=torch.float32) for length in LENGTHS}
        save_file(renamed | rows, tmp_path / f"{groups}.safetensors")
    # Isolated (-I): the bare folder `kernels` would shadow a package that transformers probes.
    command = [sys.executable, "-I", "-c", TRANSFORMERS, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "results.safetensors")
    for groups in SHAPES:
        mixer = build(groups, torch.float32)
        for length in LENGTHS:
            ours = mixer(inputs(length, dtype=torch.float32), FREE)
            torch.testing.assert_close(ours, theirs[f"{groups}/{length}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", SHAPES)
@pytest.mark.parametrize(
    "pieces", [(1,) * 12, (7, 1, 1, 3), (CHUNK, 1, CHUNK + 3, 2), (2, 2, 1)], ids=str
)
def test_pieces_of_any_length_go_on_from_the_state(groups: int, pieces: tuple[int, ...]) -> None:
    mixer, x = build(groups), inputs(sum(pieces))
    cache = mixer.new_cache(2, sum(pieces), x)
    context = BlockContext(rotary=None, segments=None, cache=cache)
    found = [mixer(piece, context) for piece in x.split(list(pieces), dim=1)]
    torch.testing.assert_close(torch.cat(found, 1), mixer(x, FREE), rtol=1e-10, atol=1e-11)
    assert cache.length == sum(pieces)


def test_a_prompt_into_an_empty_cache_is_the_ordinary_pass() -> None:
    mixer, x = build(), inputs(CHUNK + 9)
    cache = mixer.new_cache(2, 100, x)
    context = BlockContext(rotary=None, segments=None, cache=cache)
    assert torch.equal(mixer(x, context), mixer(x, FREE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_takes_the_bytes_it_says_however_long_the_prompt(dtype: torch.dtype) -> None:
    mixer, config = build(2, torch.float32), SHAPES[2]
    like = torch.empty(0, dtype=dtype)
    cache = mixer.new_cache(1, 10, like)
    said = Mamba2.cache_bytes(config, 10, dtype.itemsize)
    for _ in range(2):
        held = [tensor.untyped_storage().nbytes() for tensor in (cache.inputs, cache.state)]
        assert sum(held) == said == Mamba2.cache_bytes(config, 10_000, dtype.itemsize)
        assert cache.state.dtype == torch.float32
        with torch.no_grad():
            context = BlockContext(rotary=None, segments=None, cache=cache)
            mixer(inputs(70, rows=1, dtype=dtype), context)


def test_packed_documents_are_as_documents_alone() -> None:
    mixer, lengths = build(), (1, 9, CHUNK, 2, 30)
    x = inputs(sum(lengths))
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    together = mixer(x, BlockContext(rotary=None, segments=numbers))
    alone = [mixer(part, FREE) for part in x.split(list(lengths), dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-10, atol=1e-11)


def test_gradients_are_right_and_on_a_cpu_so_are_their_own() -> None:
    mixer, x = build(), inputs(5, rows=1).requires_grad_()
    numbers = torch.tensor([[0, 0, 0, 1, 1]])
    names = [name for name, _ in mixer.named_parameters()]
    values = [parameter.detach().requires_grad_() for parameter in mixer.parameters()]

    def total(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        context = BlockContext(rotary=None, segments=numbers)
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(mixer, weights, (x, context)).square().sum()

    assert torch.autograd.gradcheck(total, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(total, (x, *values), fast_mode=True)
    assert Mamba2.traits.order == 1


@pytest.mark.parametrize("length", [CHUNK, 2 * CHUNK, 24, 100])
def test_flops_are_those_of_the_flop_counter(length: int) -> None:
    mixer, x = build(2, torch.float32), inputs(length, 1, torch.float32).requires_grad_()
    said = Mamba2.flops_per_token(SHAPES[2], length)
    with FlopCounterMode(display=False) as forward:
        y = mixer(x, FREE)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    # Filled up to whole chunks, the figure of one token is a fraction.
    assert forward.get_total_flops() // length == said.forward
    assert backward.get_total_flops() // length == said.backward


@pytest.mark.parametrize("groups", SHAPES)
def test_parameters_are_counted_and_each_has_a_role(groups: int) -> None:
    parameters = dict(Mamba2(SHAPES[groups]).named_parameters())
    counted = sum(parameter.numel() for parameter in parameters.values())
    assert Mamba2.parameter_count(SHAPES[groups]) == counted
    assert set(Mamba2.roles(SHAPES[groups])) == set(parameters)
    assert [tuple(parameters[name].shape) for name in ("in_proj.weight", "conv.weight")] == [
        (2 * 48 + 2 * groups * 8 + 4, 24),
        (48 + 2 * groups * 8, 3),
    ]


def language_model(dtype: torch.dtype = torch.float32) -> LanguageModel:
    config = SHAPES[2].model_copy(update={"pattern": "MF", "layers": 2, "mamba_head_width": 2})
    model = LanguageModel(config, VOCABULARY, dtype)
    model.initialise(3)
    return model


def test_rates_steps_and_taps_start_in_their_ranges() -> None:
    config = ModelSection(pattern="M", layers=1, width=1024, mamba_head_width=2)
    start = {
        name: LanguageModel(config, 2).initial_value(f"layers.0.blocks.0.mixer.{name}", shape, 1)
        for name, shape in {
            "dynamics.A_log": (1024,),
            "dynamics.dt_bias": (1024,),
            "dynamics.D": (1024,),
            "norm.weight": (2048,),
            "conv.weight": (2304, 4),
            "conv.bias": (2304,),
            "in_proj.weight": (640, 1024),
            "out_proj.weight": (1024, 640),
        }.items()
    }
    steps = functional.softplus(start["dynamics.dt_bias"].double())
    assert 1e-3 * 0.999 <= float(steps.min()) < 1.1e-3 and 0.09 < float(steps.max()) <= 0.1 * 1.001
    # Log-uniform: half of them below the geometric mean.
    assert float((steps < 1e-2).double().mean()) == pytest.approx(0.5, abs=0.05)
    rates = start["dynamics.A_log"].exp()
    assert 1 <= float(rates.min()) < 1.2 and 15.8 < float(rates.max()) <= 16.001
    assert float(rates.mean()) == pytest.approx(8.5, rel=0.05)
    assert torch.equal(start["dynamics.D"], torch.ones(1024))
    assert torch.equal(start["norm.weight"], torch.ones(2048))
    for name in ("conv.weight", "conv.bias"):
        assert 0.49 < float(start[name].max()) <= 0.5
        assert -0.5 <= float(start[name].min()) < -0.49
    assert float(start["in_proj.weight"].std()) == pytest.approx(1024**-0.5, rel=0.02)
    # One block writes into the stream: nothing to share.
    assert float(start["out_proj.weight"].std()) == pytest.approx(640**-0.5, rel=0.02)


def test_a_bfloat16_model_keeps_its_dynamics_in_fp32() -> None:
    rough, exact = language_model(torch.bfloat16), language_model()
    cast_weights(rough, torch.bfloat16)
    exact_values = dict(exact.named_parameters())
    for name, parameter in rough.named_parameters():
        if ".dynamics." in name:
            assert torch.equal(parameter, exact_values[name]) and parameter.dtype == torch.float32
        else:
            assert parameter.dtype == torch.bfloat16
    tokens = torch.arange(100).view(2, 50) % VOCABULARY
    losses = [model(tokens, tokens).objective for model in (rough, exact)]
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-2, atol=2e-2)
    losses[0].backward()
    gradients = {name: value.grad for name, value in rough.named_parameters()}
    assert all(value is not None and value.isfinite().all() for value in gradients.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dynamics_hand_out_no_parameter(dtype: torch.dtype) -> None:
    dynamics = build(2, torch.promote_types(dtype, torch.float32)).dynamics
    given = dynamics(torch.zeros(2, 3, 4, dtype=dtype))
    owned = {value.untyped_storage().data_ptr() for value in dynamics.parameters()}
    for tensor in given:
        assert tensor.dtype == torch.promote_types(dtype, torch.float32)
        assert tensor.untyped_storage().data_ptr() not in owned


# Generating code for a CPU takes most of a minute; tracing alone shows that the graph is whole.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_a_compiled_layer_computes_the_same(backend: str) -> None:
    plain, compiled = (LanguageModel(SHAPES[2], VOCABULARY) for _ in range(2))
    for model in (plain, compiled):
        model.initialise(3)
    wrap = partial(torch.compile, backend=backend, fullgraph=True)
    for layer in compiled.layers:
        replace_forward(layer, wrap)
    tokens = torch.arange(2 * 70).view(2, 70) % VOCABULARY
    numbers = (torch.arange(70) > 40).long().expand(2, -1)
    losses = [model(tokens, tokens, segments=numbers).objective for model in (plain, compiled)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)


SHARDED = """
import torch
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.models.language_model import LanguageModel
from interlace.trainer.parallel import recompute_layers, shard
from interlace.trainer.world import World, process_group

SHAPE = ModelSection(
    width=24, pattern="AF MF*2", heads=2, layers=1, mamba_head_width=6, mamba_state_width=8,
    mamba_groups=2,
)
ALL = torch.randint(31, (4, 70), generator=torch.Generator().manual_seed(0))
NUMBERS = (torch.arange(70) // 27).expand(4, -1)

def losses(world, dtype, mode, rows):
    model = LanguageModel(SHAPE, 31, dtype)
    recompute_layers(list(model.layers), mode)
    shard(model, list(model.layers), world, 1, dtype)
    model.initialise(0)
    dynamics = model.layers[1].blocks[0].mixer.dynamics
    given = []
    dynamics.register_forward_hook(lambda module, inputs, outputs: given.append(outputs[0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    found = []
    for _ in range(3):
        loss = model(ALL[rows], ALL[rows], segments=NUMBERS[rows]).objective
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    name = "layers.1.blocks.0.mixer.dynamics.A_log"
    start = model.initial_value(name, (8,), 0)
    assert torch.equal(given[0], -start.exp()), "not exactly as in fp32"
    found = torch.stack(found)
    if world.size > 1:
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.AVG)
    moved = dict(model.named_parameters())[name]
    moved = moved.full_tensor() if world.size > 1 else moved
    assert not torch.equal(moved, start), "the dynamics were not trained"
    return found, moved.detach()

with process_group() as world:
    own = slice(2 * world.rank, 2 * world.rank + 2)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        alone = losses(World(), dtype, "none", slice(0, 4))
        for mode in ("none", "block", "selective"):
            both = losses(world, dtype, mode, own)
            torch.testing.assert_close(both, alone, rtol=tolerance, atol=tolerance)
    assert alone[0][-1] < alone[0][0]
    if world.is_main:
        print("equal", world.size)
"""


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    done = run_on_ranks(SHARDED, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal 2\n"


def test_decoding_state_is_that_of_the_mixer() -> None:
    model = language_model()
    caches = model.new_caches(1, 20)
    tokens = torch.arange(20)[None]
    pieces = [model.logits(tokens[:, :9], caches)]
    pieces += [model.logits(tokens[:, n : n + 1], caches) for n in range(9, 20)]
    torch.testing.assert_close(torch.cat(pieces, 1), model.logits(tokens), rtol=1e-4, atol=1e-5)
    states = [cache for layer in caches for cache in layer if cache is not None]
    assert all(isinstance(cache, MambaCache) and cache.length == 20 for cache in states)
    assert len(states) == 2
