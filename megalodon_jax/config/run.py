"""Configuration of a training run."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from megalodon_jax.config.checks import Rule, check
from megalodon_jax.config.data import DataConfig
from megalodon_jax.config.examples import ExamplesConfig
from megalodon_jax.config.kinds import AnyEncoderConfig, AnyModelConfig
from megalodon_jax.config.lora import LoraConfig
from megalodon_jax.config.mesh import MeshConfig, ProcessesConfig
from megalodon_jax.config.model import ModelConfig
from megalodon_jax.config.optimizer import OptimConfig
from megalodon_jax.config.ranges import (
    Content,
    Interval,
    LocalPath,
    Location,
    Range,
    RequiredLocation,
    Seed,
    Steps,
    Tokens,
    Weight,
)
from megalodon_jax.config.sft import SftConfig

TaskName = Literal[
    "language", "sft", "listops", "pixels", "patches", "pathfinder", "text", "retrieval", "audio",
    "masked_language",
]  # fmt: skip
ENCODER_TASKS = get_args(TaskName)[2:]
IMAGE_TASKS = ("pixels", "patches")

RULES = (
    Rule(
        lambda c: c.optim.warmup_steps <= c.steps,
        "optim.warmup_steps is {c.optim.warmup_steps}, longer than the run of steps = {c.steps}; "
        "use at most {c.steps}",
    ),
    Rule(
        lambda c: not c.optim.decay_steps or c.optim.warmup_steps + c.optim.decay_steps <= c.steps,
        "optim.warmup_steps and optim.decay_steps are {c.optim.warmup_steps} and "
        "{c.optim.decay_steps}, together longer than the run of steps = {c.steps}",
    ),
    Rule(
        lambda c: c.resume_step is None or c.resume,
        "resume_step is {c.resume_step}, but resume is not set; add --resume",
    ),
    Rule(
        lambda c: not c.model.skip_attention,
        "model.skip_attention is {c.model.skip_attention}, which is for inference: train with 0",
    ),
    Rule(
        lambda c: not c.data.carry_state or c.model.kind == "megalodon",
        "data.carry_state is set for model.kind = {c.model.kind!r}, whose state grows with the "
        "document; use a megalodon, or carry_state = false",
    ),
    Rule(
        lambda c: not c.data.carry_state or c.mesh.chunk == 1,
        "data.carry_state is set with mesh.chunk = {c.mesh.chunk}, but sequence shards start from "
        "the empty state; use mesh.data, mesh.replica or mesh.model",
    ),
    Rule(
        lambda c: not c.data.carry_state or c.task == "language",
        "data.carry_state is set for task {c.task!r}, whose rows do not follow each other; use "
        "task = 'language', or carry_state = false",
    ),
    Rule(
        lambda c: isinstance(c.model, AnyEncoderConfig) == (c.task in ENCODER_TASKS),
        "task is {c.task!r} and model.kind {c.model.kind!r}; an encoder has one of the tasks "
        f"{', '.join(ENCODER_TASKS)}, and other models have language or sft",
    ),
    Rule(
        lambda c: (
            not isinstance(c.model, AnyEncoderConfig)
            or (c.model.head == "tokens") == (c.task == "masked_language")
        ),
        "model.head is {c.model.head!r} and task {c.task!r}; masked_language has the head "
        "'tokens', the other tasks have 'classes', and retrieval 'pairs'",
    ),
    Rule(
        lambda c: (
            c.task in IMAGE_TASKS
            or not (c.examples.is_augmented or c.examples.is_mixed or c.examples.repeats > 1)
        ),
        "task {c.task!r} has no images to augment; examples.random_crop, random_flip, "
        "rand_augment, random_erasing, mixup, cutmix and repeats are for "
        f"{' and '.join(IMAGE_TASKS)}",
    ),
    Rule(
        lambda c: (
            not c.examples.is_mixed or (c.data.packing == "pad" and c.data.batch_size % 2 == 0)
        ),
        "examples.mixup {c.examples.mixup} and cutmix {c.examples.cutmix} mix the rows of pairs; "
        "use data.packing = 'pad' and an even data.batch_size, not {c.data.packing!r} and "
        "{c.data.batch_size}",
    ),
    Rule(
        lambda c: not isinstance(c.model, AnyEncoderConfig) or not c.lora.rank,
        "lora.rank is {c.lora.rank} for an encoder; factors are for language models: use 0",
    ),
    Rule(
        lambda c: not c.profile_steps or _is_step_range(c.profile_steps),
        "profile_steps is {c.profile_steps!r}; use FIRST:END with 1 <= FIRST < END, such as "
        '"10:13"',
    ),
    Rule(
        lambda c: not c.lora.rank or bool(c.init_from),
        "lora.rank is {c.lora.rank}, but init_from is empty; name the trained model to adapt",
    ),
    Rule(
        lambda c: c.sft.max_length <= c.data.seq_len,
        "sft.max_length is {c.sft.max_length}, more than the data.seq_len {c.data.seq_len} of a "
        "row; an example is never cut by packing",
    ),
    Rule(
        lambda c: not c.lora.rank or c.optim.name == "adamw",
        "lora.rank is {c.lora.rank} and optim.name {c.optim.name!r}; factors are trained by adamw",
    ),
)

# Value of `compilation_cache`: the cache directory of the user.
USER_CACHE = "user"
COMPILATION_CACHE_GB = 10.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: model, data, optimizer, mesh and settings of the loop."""

    model: AnyModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    task: TaskName = "language"
    """Task of the run: its examples, its loss and its metric. language: the next token of running
    text; sft: supervised fine-tuning, the responses of prompts or of conversations in .jsonl. The
    others are those of encoders: listops, pixels, patches, pathfinder, text (bytes), retrieval
    (pairs of texts) and audio classify documents; masked_language finds masked tokens of running
    text."""
    run_dir: RequiredLocation = "runs/default"
    """Directory of the run's checkpoints, logs and resolved configuration; a path, or a URL gs://
    or s3://."""
    steps: Steps = 1000
    """Number of updates."""
    seed: Seed = 0
    """Seed of parameter initialization and dropout."""
    z_loss: Weight = 0.0
    """Weight of the z-loss log(Z)^2, which keeps the logits' log-normalizer near 0."""
    loss_chunk_size: Tokens = 2048
    """Tokens per slice of the loss; logits exist for one slice at a time."""
    log_every: Steps = 10
    """Steps between log lines."""
    eval_every: Interval = 200
    """Steps between held-out evaluations; 0: only at the end."""
    eval_batches: Interval = 8
    """Batches of a held-out evaluation during training."""
    final_eval_batches: Interval = 64
    """Batches of the final held-out evaluation."""
    checkpoint_every: Interval = 200
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: Steps = 3
    """Number of newest checkpoints to keep; an older one is deleted after a later finite loss. The
    checkpoint of the lowest held-out loss is kept too."""
    keep_every: Interval = 0
    """Keep every checkpoint whose step is a multiple of this; 0: none."""
    max_skipped_updates: Interval = 10
    """Updates in a row that may be skipped, parameters unchanged, before the run ends: those that
    are not finite, and spikes if on_spike is skip."""
    on_spike: Literal["warn", "skip", "stop"] = "warn"
    """Reaction to a spike of the loss or the gradient norm: warn, skip the update, or end the
    run."""
    spike_window: Annotated[int, Range(low=2, high=1_000_000)] = 64
    """Updates whose median and median absolute deviation define a spike."""
    spike_threshold: Annotated[float, Range(low=0.0, open_low=True)] = 10.0
    """A spike is above the median by this number of deviations (1.4826 times the median absolute
    deviation, at least 1 % of the median)."""
    init_from: Location = ""
    """Initialize the weights from this run_dir or one of its checkpoints (also a URL gs:// or s3://),
    .safetensors file, folder in the Hugging Face form or released checkpoint, of a model that
    differs in chunk_size and rope_base at most; empty: random weights."""
    resume: bool = False
    """Resume from the newest checkpoint in `run_dir`; an error if there is none."""
    auto_resume: bool = False
    """Resume if `run_dir` has a complete checkpoint, else begin with the first step: one command
    starts a run and continues it."""
    resume_step: Annotated[int | None, Range(low=0, high=2_000_000_000)] = None
    """With `resume`: the step to resume from; later checkpoints are renamed to `later_<step>`."""
    allow_unverified: bool = False
    """Also load checkpoints without manifest, which older versions wrote; damage goes unnoticed."""
    sample_tokens: Interval = 256
    """Tokens of the text sample generated at the end; 0: no sample."""
    sample_prompt: Content = ""
    """Prompt of the text sample."""
    wandb_project: str = ""
    """Weights & Biases project to log to; empty: none."""
    profile_steps: str = ""
    """Updates to trace with the profiler into `run_dir`/profile: "10:13" traces the updates 10, 11
    and 12; empty: none."""
    compilation_cache: LocalPath = USER_CACHE
    """Directory of compiled programs, which a restart reads; `user`: $XDG_CACHE_HOME/megalodon, by
    default in ~/.cache; empty: none."""
    compilation_cache_gb: Weight = COMPILATION_CACHE_GB
    """Largest size of that directory in GB: beyond it the programs that have not been used for the
    longest time are removed; 0: no limit."""
    watchdog_seconds: Weight = 300.0
    """End the process, with the stacks of all threads and exit code 75, if a step, an evaluation
    batch or a save takes longer than this and than 20 median steps; 0: never."""

    def __post_init__(self) -> None:
        check(self, "", RULES)


def _is_step_range(text: str) -> bool:
    match = re.fullmatch(r"(\d{1,10}):(\d{1,10})", text)
    return match is not None and 1 <= int(match[1]) < int(match[2])


def locations(config: TrainConfig) -> tuple[str, ...]:
    """The paths and URLs that a run reads or writes; empty ones are left out."""
    data = config.data
    named = (config.run_dir, config.init_from, data.tokenizer, *data.files, *data.heldout_files)
    tables = (path for table in (*data.sources, *data.heldout_sets) for path in table.files)
    return tuple(path for path in (*named, *tables) if path)


def step_range(text: str) -> tuple[int, int] | None:
    """First update and end of a valid `profile_steps` such as "10:13"; None for an empty text."""
    if not text:
        return None
    first, end = map(int, text.split(":"))
    return first, end
