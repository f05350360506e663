"""The schema of a recipe: one frozen section per concern, a docstring per setting, units in the
names.

`RunConfig` holds what the user asked for and nothing derived: `interlace.trainer.plan.resolve`
turns it into what will happen. Values that depend on each other are checked in
`interlace.trainer.config.checks`.
"""

from typing import Annotated, Literal

from pydantic import Field

from interlace.trainer.config.checkpoint_section import CheckpointSection
from interlace.trainer.config.clip_section import CoordinateClipSection
from interlace.trainer.config.distill_section import DistillSection
from interlace.trainer.config.energy_section import EnergySection
from interlace.trainer.config.guard_section import GuardSection
from interlace.trainer.config.model_section import ModelSection
from interlace.trainer.config.mup_section import MupSection
from interlace.trainer.config.section import Fraction, NonNegativeInt, PositiveInt, Section
from interlace.trainer.config.sharpness_section import SharpnessSection
from interlace.trainer.config.watchdog_section import WatchdogSection


class RunSection(Section):
    """Where the run lives and what makes it repeatable."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Names the run folder where `run.dir` does not; a recipe's own name unless it says
    otherwise.
    """

    dir: str = ""
    """Run folder; empty means `runs/<name>-<number>`. An existing run folder is resumed."""

    seed: NonNegativeInt = 0
    """Seed of the initial weights, the data order and the samples."""

    start_from: str = ""
    """Run folder, model folder or Hugging Face folder whose weights a new run starts with; empty
    means fresh ones. A resumed run goes on from its own checkpoints.
    """

    branch_of: str = ""
    """Run folder that a new run goes on from, as if it had been interrupted; empty means none.
    `interlace train --resume RUN --from-step STEP` sets it.
    """

    branch_step: NonNegativeInt = 0
    """Step of the checkpoint of `run.branch_of` that a new run goes on from."""


class SourceSection(Section):
    """One source of a mixture."""

    source: Annotated[str, Field(min_length=1)]
    """`stdlib`, a file or glob (`corpus/*.jsonl`), `KIND:LOCATION`, or a Hugging Face dataset
    name.
    """

    weight: Annotated[float, Field(gt=0.0)] = 1.0
    """Share of this source in the mixture, counted in tokens, relative to the other weights."""

    text_field: str | None = None
    """Field that holds the text in jsonl, parquet and hub rows; unset means `data.text_field`."""

    subset: str | None = None
    """Configuration name of a Hugging Face dataset (`wikitext-2-raw-v1`)."""

    split: str = "train"
    """Split of a Hugging Face dataset that is read."""


class DataSection(Section):
    """What text is trained on and how it becomes rows of tokens."""

    source: str | list[SourceSection] = "stdlib"
    """One source as text, or a list of tables with weights; see `SourceSection`."""

    text_field: str = "text"
    """Field that holds the text in jsonl, parquet and hub rows."""

    tokenizer: Annotated[str, Field(min_length=1)] = "bytes"
    """`bytes`, `bpe` (byte-level BPE trained on the sources), or the path of a `tokenizer.json`."""

    end_of_text: str | None = None
    """Token of a `tokenizer.json` that opens every document; unset means the first usual name."""

    vocabulary_size: Annotated[PositiveInt, Field(ge=258)] = 4096
    """Entries of a BPE vocabulary trained here, the end-of-text token included; others bring
    their own.
    """

    sequence_length: Annotated[PositiveInt, Field(ge=2)] = 256
    """Tokens per row that the model sees and predicts."""

    respect_documents: bool = True
    """Attention never crosses a document boundary and positions restart there; false packs
    blindly.
    """

    validation_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.05
    """Share of the documents held out for validation, chosen by hash."""

    on_bad_row: Literal["fail", "skip"] = "fail"
    """What an unreadable row does: stop with its file and number, or be counted and quarantined."""

    bad_row_budget: Fraction = 0.001
    """With `on_bad_row = "skip"`: the largest share of bad rows that is tolerated."""

    prepared_dir: Annotated[str, Field(min_length=1)] = "prepared"
    """Folder that receives tokenised corpora; runs with the same data settings share them."""

    skip_batches: Annotated[str, Field(pattern=r"^(\d+:\d+(,\d+:\d+)*)?$")] = ""
    """Batches that are left out, such as `201:401` (from 1, the last one not included; several
    spans with commas between): those that these steps would have taken. Later ones come earlier.
    """

    workers: PositiveInt | None = None
    """Processes that tokenise; unset means one per CPU core."""


class TrainSection(Section):
    """How long, how large a step, in which precision."""

    objective: str = "next_token"
    """What is minimised: `next_token` likelihood, `energy` (predictions by descent on a learnt
    energy), `distill` (a teacher's outputs), or a plug-in's.
    """

    steps: PositiveInt = 300
    """Optimizer steps of the whole run."""

    tokens_per_step: PositiveInt = 4096
    """Batch size: tokens per optimizer step over all ranks; accumulation is derived from it."""

    microbatch_rows: PositiveInt | None = None
    """Most rows one rank passes through the model at once; unset means up to 16,384 tokens."""

    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of activations and matrix products; auto: bfloat16 on a GPU, float32 on a CPU."""

    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    """What backward recomputes: nothing, whole layers, or all but matrix products and attention."""

    compile: bool | None = None
    """Compile every layer with `torch.compile`; unset means on a GPU only."""

    z_loss: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the squared log-partition penalty (PaLM, section 5); 0 turns it off."""

    max_bad_steps: PositiveInt = 5
    """Steps in a row with a loss or gradient that is not finite before the run stops."""

    validate_every_steps: NonNegativeInt = 100
    """Steps between validations; 0 validates at the end only."""

    validation_tokens: PositiveInt = 131_072
    """Held-out tokens of one validation, rounded down to whole rows and to what there is."""


class OptimizerSection(Section):
    """How parameters are updated."""

    rule: str = "adamw"
    """Update rule: `adamw` (Loshchilov and Hutter 2019), `sgd` (whose decay is part of the
    gradient), `clipped_sgd` (see `coordinate_clip`), `signum`, or a plug-in's.
    """

    peak_lr: Annotated[float, Field(gt=0.0)] = 3e-3
    """Learning rate after warm-up; under muP, at the base width."""

    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Decay of the first moment: the momentum of rules that have one; with 0 `clipped_sgd` keeps no
    state at all.
    """

    nesterov: bool = False
    """Let `sgd` and `clipped_sgd` look ahead along the momentum."""

    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """Decay of the second moment."""

    epsilon: Annotated[float, Field(gt=0.0)] = 1e-8
    """Added to the root of the second moment."""

    weight_decay: Annotated[float, Field(ge=0.0)] | None = None
    """Weight decay of matrices, times the learning rate; norms and biases have none. Unset means
    0.1, and 0 for `sgd` and `clipped_sgd`, whose learning rates are hundreds of times larger.
    """

    clip: Annotated[float, Field(ge=0.0)] | None = None
    """Largest global gradient norm; a longer gradient is scaled down. 0 turns clipping by norm off;
    unset means 1.0, or off where coordinates are clipped, which needs no norm and lets updates run
    during backward.
    """

    schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    """Learning rate over the steps: constant, cosine, or warm-up-stable-decay."""

    warmup_steps: NonNegativeInt = 20
    """Steps over which the learning rate rises linearly from zero."""

    decay_fraction: Fraction = 0.4
    """With `schedule = "wsd"`: share of the steps, at the end, over which the rate falls
    linearly.
    """

    final_lr_fraction: Fraction = 0.0
    """Learning rate at the last step as a share of the peak (cosine and wsd)."""


class OffloadSection(Section):
    """Where optimizer state lives and who updates it."""

    strategy: Literal["none", "host", "stride", "optimal"] = "none"
    """All state on the device, all on the host, every k-th subgroup staged, or as the performance
    model says.
    """

    overlap: Literal["auto", "none", "forward", "backward"] = "auto"
    """What updates run beside; auto: backward where no update waits for the norm or a quantile of
    all gradients, else the next forward, and none where all state is on the device.
    """

    stride: PositiveInt | None = None
    """With `strategy = "stride"`: every so many subgroups one is staged; unset means the published
    rule.
    """

    subgroup_elements: PositiveInt = 100_000_000
    """Parameters per subgroup, about; a larger parameter is a subgroup of its own."""

    staging_slots: PositiveInt = 2
    """Sets of device buffers that staged subgroups pass through."""

    device_budget_gib: Annotated[float, Field(ge=0.0)] | None = None
    """Device memory for optimizer state and kept gradients, per rank; unset means what weights and
    activations leave.
    """

    host_budget_gib: Annotated[float, Field(ge=0.0)] | None = None
    """Host memory for optimizer state, per rank; unset means 90% of what is free."""

    moments: Literal["float32", "bfloat16"] = "float32"
    """Precision of moments; bfloat16 rounds stochastically and halves their memory and traffic."""

    split_master: bool = False
    """Keep fp32 masters of bfloat16 weights as the weight and a 16-bit remainder (exact)."""

    cpu_threads: PositiveInt | None = None
    """Threads that update on the host, per rank; unset means this rank's share of the cores."""

    recalibrate: bool = True
    """Measure every step and choose homes anew when prediction and measurement part by 10%."""


class ParallelSection(Section):
    """How several ranks share one model."""

    replicas: PositiveInt = 1
    """Groups of ranks that each hold a whole copy (HSDP); 1 shards over all ranks (FSDP2)."""

    engine: Literal["fsdp2", "deepspeed"] = "fsdp2"
    """What spreads the model over the ranks: `fsdp2` (torch), or `deepspeed` (its ZeRO, which needs
    `pip install 'interlace[deepspeed]'`).
    """

    zero_stage: Literal[1, 2, 3] = 3
    """With `engine = "deepspeed"`: what is divided among the ranks: optimizer state (1), gradients
    too (2), weights too (3).
    """

    deepspeed_config: str = ""
    """With `engine = "deepspeed"`: JSON file whose settings of DeepSpeed are added to those that
    follow from the recipe, seen from where it is named; empty means none.
    """


class ObserveSection(Section):
    """What a person sees."""

    log_every_steps: PositiveInt = 10
    """Steps between printed lines; `metrics.jsonl` holds every step."""

    diagnostics: list[str] = []
    """More numbers about the steps whose line is printed: `gradient_norms` (of every block),
    `gradient_histogram` (magnitudes of coordinates), a plug-in's; and about the steps that
    `sharpness` names: `directional_sharpness`, `critical_sharpness`.
    """

    trace_steps: Annotated[str, Field(pattern=r"^\d+:\d+$")] | None = None
    """Steps whose updates are traced, such as `10:13` (from 1, the last one not included)."""

    sample_prompts: list[str] = ["def ", "import "]
    """Texts that the model continues at the end of a run."""

    sample_tokens: NonNegativeInt = 200
    """Most tokens of such a sample; 0 writes none."""

    sample_temperature: Annotated[float, Field(ge=0.0)] = 0.8
    """Randomness of samples; 0 always takes the likeliest token."""


class RunConfig(Section):
    """Everything the user asked for. Sections are tables of the recipe."""

    run: RunSection = RunSection()
    """Where the run lives and what makes it repeatable."""

    model: ModelSection = ModelSection()
    """The shape of the model."""

    data: DataSection = DataSection()
    """What text is trained on."""

    train: TrainSection = TrainSection()
    """How long, how large a step, in which precision."""

    distill: DistillSection = DistillSection()
    """Whom the `distill` objective learns from, and what counts."""

    energy: EnergySection = EnergySection()
    """How the `energy` objective descends, and what is trained of it."""

    optimizer: OptimizerSection = OptimizerSection()
    """How parameters are updated."""

    coordinate_clip: CoordinateClipSection = CoordinateClipSection()
    """How single coordinates of a direction are clipped."""

    mup: MupSection = MupSection()
    """How everything follows the width of the model."""

    offload: OffloadSection = OffloadSection()
    """Where optimizer state lives and who updates it."""

    parallel: ParallelSection = ParallelSection()
    """How several ranks share one model."""

    checkpoint: CheckpointSection = CheckpointSection()
    """When state is saved and which checkpoints stay."""

    guard: GuardSection = GuardSection()
    """What is done about numbers that cannot be right."""

    watchdog: WatchdogSection = WatchdogSection()
    """How a run notices that a rank hangs or falls behind."""

    observe: ObserveSection = ObserveSection()
    """What a person sees."""

    sharpness: SharpnessSection = SharpnessSection()
    """When and along what the curvature of the loss is measured."""
