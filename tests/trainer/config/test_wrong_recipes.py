"""Forty wrong recipes, each with the exact message a user sees."""

from pathlib import Path

import pytest

from interlace.trainer.config import RunConfig, list_recipes, load_recipe
from interlace.trainer.config.problems import SYNONYMS, all_settings
from interlace.trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]

SECTIONS = (
    "run, model, data, train, distill, energy, optimizer, coordinate_clip, mup, offload, parallel, "
    "checkpoint, guard, watchdog, observe, sharpness"
)

WRONG_OVERRIDES = {
    "train.steps=0": "train.steps=0: must be 1 or more (Optimizer steps of the whole run); "
    "the default is train.steps=300",
    "train.steps=-5": "train.steps=-5: must be 1 or more (Optimizer steps of the whole run); "
    "the default is train.steps=300",
    "train.steps=many": "train.steps=many: must be a whole number (Optimizer steps of the whole "
    "run); the default is train.steps=300",
    "train.steps=1e3": "train.steps=1000.0: must be a whole number (Optimizer steps of the whole "
    "run); type train.steps=1000",
    "train.steps=true": "train.steps=true: must be a whole number (Optimizer steps of the whole "
    "run); the default is train.steps=300",
    "train.step=10": "train.step=10: there is no such setting; did you mean train.steps?",
    "train.learning_rate=1": "train.learning_rate=1: there is no such setting; here it is called "
    "optimizer.peak_lr",
    "optimizer.lr=1e-3": "optimizer.lr=0.001: there is no such setting; here it is called "
    "optimizer.peak_lr",
    "model.hidden_size=64": "model.hidden_size=64: there is no such setting; here it is called "
    "model.width",
    "train.batch_size=8": "train.batch_size=8: there is no such setting; here it is called "
    "train.tokens_per_step",
    "model.sequence_length=8": "model.sequence_length=8: there is no such setting; here it is "
    "called data.sequence_length",
    "modle.width=64": f"modle: there is no such section; did you mean model?; the sections are "
    f"{SECTIONS}",
    "checkpoint.zzz=1": "checkpoint.zzz=1: there is no such setting; settings of [checkpoint]: "
    "every, every_steps, hours_between_failures, asynchronous, copy_budget_gib, tries, "
    "retry_seconds, notice_seconds, keep_last, keep_every_steps",
    "data.skip_batches=9:5": "data.skip_batches=9:5: 9:5 holds no batch, or begins before batch 1; "
    "type spans as first:last, from 1, in order, such as data.skip_batches=9:209",
    "data.skip_batches=5:9,8:12": "data.skip_batches=5:9,8:12: 8:12 holds no batch, or begins "
    "before batch 9; type spans as first:last, from 1, in order, such as "
    "data.skip_batches=9:209",
    "run.branch_of=runs/old": "run.branch_of=runs/old: which of its checkpoints does this run go "
    "on from? Type run.branch_step=STEP as well",
    "run.branch_step=5": "run.branch_step=5: of which run? Type run.branch_of=RUN as well, or "
    "run.branch_step=0",
    "guard.spike_sigmas=6 offload.overlap=backward optimizer.clip=0": "guard.spike_sigmas=6.0: "
    "whether a step is a spike is known after backward only, and offload.overlap=backward starts "
    "updates before; type offload.overlap=forward or guard.spike_sigmas=0",
    "guard.check_state_every_steps=5": "guard.check_state_every_steps=5: offload.strategy=none "
    "keeps no state on the host; type guard.check_state_every_steps=0 or another offload.strategy",
    "watchdog.seconds=0.5": "watchdog.seconds=0.5: a machine that is busy may keep a rank waiting "
    "for so long; type watchdog.seconds=1 or more, or watchdog.seconds=0 to turn the watchdog off",
    "watchdog.straggler_factor=1.0": "watchdog.straggler_factor=1.0: half of all ranks take that "
    "many times the median rank's seconds; type watchdog.straggler_factor=1.5 or another number "
    "above 1, or 0 to name nobody",
    "data.source=https://me:word@host/text.jsonl": "data.source: holds a password in an address, "
    "and the run folder would keep it; leave it out and let the library find it (HF_TOKEN, "
    "~/.netrc, or a file that you download yourself)",
    "model.width=250 model.heads=4": "model.width=250: does not split into model.heads=4 heads; "
    "type model.width=248 or model.width=252, or give model.head_width",
    "model.heads=3 model.kv_heads=1": "model.width=256: does not split into model.heads=3 heads; "
    "type model.width=255 or model.width=258, or give model.head_width",
    "model.kv_heads=3": "model.kv_heads=3: must divide model.heads=4; type one of "
    "model.kv_heads=1, 2, 4",
    "model.head_width=33": "model.head_width=33: rotary position embedding turns pairs of "
    "coordinates, so it must be even; type model.head_width=34",
    "model.pattern=AX": "model.pattern=AX: no block is registered as X; known letters: "
    "A (attention), E (moe), F (swiglu), M (mamba2)",
    "model.pattern=af": "model.pattern=af: 'af' is not a word of capital letters, with *N behind "
    "it or not; write layers as words, as in model.pattern='AF MF*3'",
    "model.depth_plan=deep": "model.depth_plan=deep: there is no such depth plan; known: repeat, "
    "spread",
    "train.objective=next": "train.objective=next: there is no such objective; known: distill, "
    "energy, next_token",
    'model.pattern=""': 'model.pattern="": string should have at least 1 character (Residual '
    "blocks, a letter each (A: attention, F: SwiGLU, M: Mamba-2, E: mixture of experts). Words "
    "separated by spaces are layers, and `*N` repeats one: `AMF*7 MF*50`); the default is "
    "model.pattern=AF",
    "model.layers=0": "model.layers=0: must be 1 or more (How often the whole pattern is "
    "repeated); the default is model.layers=4",
    "model.rope_base=1": "model.rope_base=1: must be more than 1.0 (Base of the rotary position "
    "embedding's wavelengths); the default is model.rope_base=10000.0",
    "model.pattern=MF model.mamba_head_width=60": "model.mamba_head_width=60: does not divide the "
    "inner width 512 of Mamba-2 (model.width=256 times model.mamba_expand=2), so the last head "
    "would be cut; type model.mamba_head_width=32",
    "model.pattern=MF model.mamba_expand=0.001": "model.mamba_expand=0.001: leaves no channel of "
    "model.width=256; type model.mamba_expand=2",
    "model.pattern=MF model.mamba_groups=3": "model.mamba_groups=3: must divide the 8 heads of "
    "Mamba-2 (inner width 512 in heads of model.mamba_head_width=64); type one of "
    "model.mamba_groups=1, 2, 4, 8",
    "model.pattern=AE model.moe_top_k=9": "model.moe_top_k=9: a token cannot go through more "
    "experts than model.moe_experts=8; type model.moe_top_k=8 or model.moe_experts=9",
    "model.pattern=AE model.moe_top_k=1": "model.moe_top_k=1: the weights of the chosen experts "
    "sum to one, so a single one always weighs 1 and the likelihood could not train the router; "
    "type model.moe_top_k=2",
    "model.mamba_conv_width=1": "model.mamba_conv_width=1: must be 2 or more (Taps of the causal "
    "convolution before the scan of Mamba-2); the default is model.mamba_conv_width=4",
    "model.attention_backend=flash": "model.attention_backend=flash: must be one of 'auto', "
    "'reference', 'chunked', 'sdpa', 'flex', 'flash_attn' or 'triton' (Kernels of attention; auto: "
    "as measured, `interlace doctor RECIPE` says which and why. A name wins over the environment "
    "variable INTERLACE_ATTENTION); type model.attention_backend=flash_attn",
    "model.attn_implementation=sdpa": "model.attn_implementation=sdpa: there is no such setting; "
    "here it is called model.attention_backend",
    "model.query_key_norm=True": "model.query_key_norm=True: must be true or false (Normalise "
    "queries and keys per head (RMSNorm) before the rotary embedding); type "
    "model.query_key_norm=true",
    "data.sequence_length=1": "data.sequence_length=1: must be 2 or more (Tokens per row that the "
    "model sees and predicts); the default is data.sequence_length=256",
    "data.sequence_length=300": "train.tokens_per_step=2048: is not a multiple of "
    "data.sequence_length=300, so a step would end inside a row; type train.tokens_per_step=1800 "
    "or 2100",
    "train.tokens_per_step=100": "train.tokens_per_step=100: is not a multiple of "
    "data.sequence_length=256, so a step would end inside a row; type train.tokens_per_step=256",
    "train.validation_tokens=10": "train.validation_tokens=10: is less than one row of "
    "data.sequence_length=256; type train.validation_tokens=256",
    "data.validation_fraction=0.9": "data.validation_fraction=0.9: must be 0.5 or less (Share of "
    "the documents held out for validation, chosen by hash); the default is "
    "data.validation_fraction=0.05",
    "data.on_bad_row=ignore": "data.on_bad_row=ignore: must be one of 'fail' or 'skip' (What an "
    "unreadable row does: stop with its file and number, or be counted and quarantined); type "
    "data.on_bad_row=fail",
    "data.tokenizer=gpt2": "data.tokenizer=gpt2: is neither `bytes` nor `bpe`, and there is no "
    "such file; type data.tokenizer=bytes or the path of a tokenizer.json",
    "data.end_of_text=<eos>": "data.end_of_text=<eos>: data.tokenizer=bytes is made here and has "
    "its own; type data.end_of_text=none or the path of a tokenizer.json",
    'data.source=""': 'data.source="": there is nothing to train on; type data.source=stdlib',
    "data.vocabulary_size=100": "data.vocabulary_size=100: must be 258 or more (Entries of a BPE "
    "vocabulary trained here, the end-of-text token included; others bring their own); the "
    "default is data.vocabulary_size=4096",
    "optimizer.rule=adam": "optimizer.rule=adam: there is no such update rule; known: adamw, "
    "clipped_sgd, sgd, signum",
    "observe.diagnostics=['norms']": "observe.diagnostics=norms: there is no such diagnostic; "
    "known: clip_fraction, critical_sharpness, directional_sharpness, gradient_histogram, "
    "gradient_norms",
    "observe.diagnostics=['directional_sharpness'] sharpness.rules=['sgd','lion']": "sharpness."
    "rules=lion: there is no such update rule; known: adamw, clipped_sgd, sgd, signum",
    "observe.diagnostics=['directional_sharpness'] train.objective=energy": "observe.diagnostics="
    "directional_sharpness: needs a second derivative, and the loss of train.objective=energy "
    "holds one already, so this would be the third; type observe.diagnostics="
    "['critical_sharpness']",
    "observe.diagnostics=['directional_sharpness'] train.objective=distill": "observe.diagnostics="
    "directional_sharpness: needs a second derivative, and the loss of train.objective=distill "
    "has only the first; type observe.diagnostics=['critical_sharpness']",
    "observe.diagnostics=['directional_sharpness'] model.pattern=MF": "observe.diagnostics="
    "directional_sharpness: needs a second derivative, and block M of model.pattern=MF has only "
    "the first; type observe.diagnostics=['critical_sharpness']",
    "observe.diagnostics=['directional_sharpness'] model.attention_backend=sdpa": "observe."
    "diagnostics=directional_sharpness: needs a second derivative, and model.attention_backend="
    "sdpa has only the first; type model.attention_backend=auto",
    "offload.strategy=auto": "offload.strategy=auto: must be one of 'none', 'host', 'stride' or "
    "'optimal' (All state on the device, all on the host, every k-th subgroup staged, or as the "
    "performance model says); type offload.strategy=none",
    "offload.overlap=backward": "offload.overlap=backward: optimizer.clip=1.0 needs the norm of "
    "all gradients, which is known after backward only; type offload.overlap=forward or "
    "optimizer.clip=0",
    "optimizer.rule=clipped_sgd optimizer.clip=0.5 offload.overlap=backward": "offload.overlap="
    "backward: optimizer.clip=0.5 needs the norm of all gradients, which is known after backward "
    "only; type offload.overlap=forward or optimizer.clip=0",
    "optimizer.rule=clipped_sgd coordinate_clip.policy=global_quantile offload.overlap=backward": ""
    "coordinate_clip.policy=global_quantile: the quantile of all gradients is known after backward "
    "only, and offload.overlap=backward starts updates before; type offload.overlap=forward, or "
    "coordinate_clip.policy=lagged_quantile",
    "coordinate_clip.stage=update coordinate_clip.policy=lagged_quantile": "coordinate_clip.policy="
    "lagged_quantile: quantiles are those of the gradient, and coordinate_clip.stage=update clips "
    "what the rule makes of it, which has another scale; type coordinate_clip.policy=fixed or "
    "coordinate_clip.stage=gradient",
    "optimizer.rule=clipped_sgd coordinate_clip.stage=none": "coordinate_clip.stage=none: "
    "optimizer.rule=clipped_sgd would clip nothing; type optimizer.rule=sgd for gradient descent "
    "as it is, or coordinate_clip.stage=gradient",
    "optimizer.rule=clipped_sgd optimizer.nesterov=true optimizer.beta1=0": "optimizer.beta1=0.0: "
    "is the momentum of optimizer.rule=clipped_sgd, and optimizer.nesterov=true looks ahead along "
    "it; type optimizer.beta1=0.9 or optimizer.nesterov=false",
    "optimizer.nesterov=true": "optimizer.nesterov=true: optimizer.rule=adamw does not look ahead; "
    "type optimizer.nesterov=false, or one of optimizer.rule=sgd, clipped_sgd",
    "coordinate_clip.share=1": "coordinate_clip.share=1: must be less than 1.0 (With a quantile: "
    "share of coordinates that are clipped. Published are 0.1 for gradient descent and 0.5 for "
    "Adam's first moment); the default is coordinate_clip.share=0.1",
    "offload.stride=3": "offload.stride=3: offload.strategy=none does not use it; type "
    "offload.strategy=stride or offload.stride=none",
    "offload.cpu_threads=100000": "offload.cpu_threads=100000: must be 1024 or less (more threads "
    "than any host has cores); type offload.cpu_threads=none",
    "offload.staging_slots=1000000": "offload.staging_slots=1000000: must be 64 or less (each "
    "costs device memory, and two keep both copy directions busy); type offload.staging_slots=2",
    "train.steps=5 observe.trace_steps=50:53": "observe.trace_steps=50:53: begins after the last "
    "of train.steps=5, so no update would be traced; type observe.trace_steps=3:6 or "
    "observe.trace_steps=none",
    "observe.trace_steps=5:5": "observe.trace_steps=5:5: holds no step; type first:last with "
    "first at least 1 and last above it, such as observe.trace_steps=5:8",
    "optimizer.schedule=wds": "optimizer.schedule=wds: must be one of 'constant', 'cosine' or "
    "'wsd' (Learning rate over the steps: constant, cosine, or warm-up-stable-decay); type "
    "optimizer.schedule=wsd",
    "optimizer.peak_lr=0": "optimizer.peak_lr=0: must be more than 0.0 (Learning rate after "
    "warm-up; under muP, at the base width); the default is optimizer.peak_lr=0.003",
    "optimizer.peak_lr=nan": "optimizer.peak_lr=nan: must be a finite number (Learning rate after "
    "warm-up; under muP, at the base width); the default is optimizer.peak_lr=0.003",
    "optimizer.beta1=1.0": "optimizer.beta1=1.0: must be less than 1.0 (Decay of the first "
    "moment: the momentum of rules that have one; with 0 `clipped_sgd` keeps no state at all); the "
    "default is optimizer.beta1=0.9",
    "optimizer.clip=-1": "optimizer.clip=-1: must be 0.0 or more (Largest global gradient norm; a "
    "longer gradient is scaled down. 0 turns clipping by norm off; unset means 1.0, or off where "
    "coordinates are clipped, which needs no norm and lets updates run during backward); type "
    "optimizer.clip=none for the default",
    "train.compute_dtype=fp16": "train.compute_dtype=fp16: must be one of 'auto', 'float32' or "
    "'bfloat16' (Precision of activations and matrix products; auto: bfloat16 on a GPU, float32 "
    "on a CPU); type train.compute_dtype=bfloat16",
    "checkpoint.keep_last=0": "checkpoint.keep_last=0: must be 1 or more (Newest checkpoints that "
    "stay); the default is checkpoint.keep_last=2",
    "checkpoint.every=auto checkpoint.keep_every_steps=50": "checkpoint.keep_every_steps=50: "
    "checkpoint.every=auto saves when the time has come, at a multiple of that only by chance, so "
    "none would stay for good; type checkpoint.keep_every_steps=0 or checkpoint.every=steps",
    "run.seed=-1": "run.seed=-1: must be 0 or more (Seed of the initial weights, the data order "
    "and the samples); the default is run.seed=0",
    "steps=10": "'steps=10': not an override; write it as section.key=value, as in train.steps=100",
    "train.steps": "'train.steps': not an override; write it as section.key=value, as in "
    "train.steps=100",
}


@pytest.mark.parametrize("words", WRONG_OVERRIDES)
def test_a_wrong_setting_is_answered_with_key_value_reason_and_remedy(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("quickstart", words.split())
    assert list(caught.value.problems) == [WRONG_OVERRIDES[words]]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("quickstart", ["train.steps=0", "model.kv_heads=3", "modle.width=1"])
    assert len(caught.value.problems) == 3


def test_an_unknown_recipe_suggests_a_near_one() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("quikstart")
    shipped = sorted(path.stem for path in (ROOT / "configs").glob("*.toml"))
    assert "quickstart" in shipped
    assert str(caught.value) == (
        f"recipe quikstart: not found; did you mean quickstart?; shipped recipes: "
        f"{', '.join(shipped)}; your own needs its path, as in ./quikstart.toml"
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(f"{tmp_path}/none.toml")
    path = f"{tmp_path}/none.toml"
    assert str(caught.value) == f"recipe {path}: no such file (looked at {path})"


def test_malformed_toml_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.toml", "[train]\nsteps = \n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        f"recipe {path}: not valid TOML: Invalid value (at line 2, column 9)"
    )


def test_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "twice.toml", "[train]\nsteps = 1\nsteps = 2\n")
    with pytest.raises(ConfigError, match="Cannot overwrite a value"):
        load_recipe(path)


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", 'extends = "b"\n')
    path = write(tmp_path / "b.toml", 'extends = "a"\n')
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value) == "recipe b: extends itself (b -> a -> b); remove one `extends`"


def test_a_number_in_quotes_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "quoted.toml", '[train]\nsteps = "10"\n')
    with pytest.raises(ConfigError, match=r"^train.steps=10: must be a whole number"):
        load_recipe(path)


def test_a_table_in_place_of_a_section_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "flat.toml", "train = 3\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith("train=3: must be a table; write [train]")


def test_a_bad_entry_of_a_mixture_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "mix.toml", '[[data.source]]\nsource = "stdlib"\nweight = -1.0\n')
    with pytest.raises(ConfigError, match=r"data.source.*weight"):
        load_recipe(path)


@pytest.mark.parametrize("name", sorted(list_recipes()))
def test_every_shipped_recipe_loads_and_says_what_it_teaches(name: str) -> None:
    assert load_recipe(name).config
    assert len(list_recipes()[name]) > 20


def test_every_setting_is_documented() -> None:
    assert [key for key, text in all_settings().items() if not text] == []


def test_every_synonym_points_at_a_setting() -> None:
    assert set(SYNONYMS.values()) <= set(all_settings())


def test_later_layers_win_and_their_history_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "own.toml", 'extends = "quickstart"\n[train]\nsteps = 9\n')
    recipe = load_recipe(path, ["train.steps=8", "model.kv_heads=none", "run.dir=2024"])
    assert recipe.config.train.steps == 8
    assert recipe.config.model.kv_heads is None
    assert recipe.config.run.dir == "2024"
    assert recipe.config.run.name == "own"
    assert [origin.value for origin in recipe.origins["train.steps"]] == [600, 9, 8]


def test_a_span_that_the_last_step_cuts_short_is_no_mistake() -> None:
    words = ["train.steps=51", "observe.trace_steps=50:53"]
    assert load_recipe("quickstart", words).config.observe.trace_steps == "50:53"


def test_a_run_can_leave_its_stride_behind(tmp_path: Path) -> None:
    saved = '[offload]\nstrategy = "stride"\nstride = 3\n'
    path = write(tmp_path / "config.toml", saved)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, ["offload.strategy=optimal"])
    remedy = str(caught.value).split(" or ")[-1]
    assert remedy == "offload.stride=none"
    config = load_recipe(path, ["offload.strategy=optimal", remedy]).config
    assert config.offload.stride is None


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().train.steps = 3  # type: ignore[misc]
