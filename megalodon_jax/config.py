"""Everything that can be set: the model's shape, the data, the optimizer, the run.

A configuration is a tree of frozen dataclasses. It is read from a TOML file (`load_config`), can be
overridden field by field (`--optim.lr 3e-4` on the command line), and is stored resolved beside
every checkpoint. The text under a field is its `--help`.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

DType = Literal["float32", "bfloat16"]
InitMode = Literal["he", "xavier", "bert", "gaussian"]
Remat = Literal["none", "inputs", "dots", "block"]
Implementation = Literal["reference", "xla", "mosaic_gpu", "pallas_tpu"]
CemaImplementation = Literal["reference", "xla", "mosaic_gpu", "pallas_tpu"]
AttentionImplementation = Literal["reference", "xla", "mosaic_gpu", "pallas_tpu"]
RowwiseImplementation = Literal["xla", "mosaic_gpu"]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what came in and what to do."""


def configs_dir() -> Path:
    """The shipped TOML files: inside the package when installed, else the checkout's."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a MEGALODON model and how it computes. Defaults are `mega200M`'s."""

    num_layers: int = 12
    """Blocks, each one gated chunk attention and one feed-forward network."""
    model_dim: int = 1024
    """Width D of the residual stream."""
    z_dim: int = 256
    """Width Z of queries and keys, all heads together."""
    value_dim: int = 2048
    """Width E of values and of their gate, all heads together."""
    num_heads: int = 1
    """Attention heads H."""
    ffn_hidden_dim: int = 2560
    """Hidden width F of the feed-forward network."""
    cema_ndim: int = 16
    """Orders N of the complex moving average in every channel, 1 to 32."""
    chunk_size: int = 2048
    """Tokens C that attend to one another; attention never crosses a chunk."""
    vocab_size: int = 32_000
    """Rows V of the embedding."""
    output_size: int | None = None
    """Columns of the output matrix; `vocab_size` if not set."""
    norm_num_groups: int = 32
    """Feature groups G of every TimestepNorm."""
    norm_affine: bool = True
    """Learned scale (and bias) in RMSNorm and LayerNorm. TimestepNorm always has them."""
    norm_eps: float = 1e-5
    """Added to variances before the square root."""
    norm_prior_count: int = 0
    """Tokens that TimestepNorm's learned prior weighs; 0: none, as in every released model."""
    rope_base: float = 10_000.0
    """Base of the rotary angles."""
    swiglu: bool = False
    """Gate the feed-forward network: (silu(x W1) * (x W3)) W2."""
    rescale_nffn: bool = False
    """Multiply the feed-forward output by a learned vector that starts at 0.1 * 0.5^layer."""
    scale_emb: bool = False
    """Multiply embeddings by sqrt(model_dim)."""
    share_emb: bool = False
    """Use the embedding, transposed, as the output matrix."""
    init_mode: InitMode = "he"
    """Start values of the linear weights."""
    dropout: float = 0.0
    """Dropped fraction of embeddings and of both sub-layers' outputs."""
    hidden_dropout: float = 0.0
    """Dropped fraction inside the sub-layers."""
    attention_dropout: float = 0.0
    """Dropped fraction of attention."""
    attention_dropout_mode: Literal["softmax", "dropkey"] = "softmax"
    """Where attention drops: weights after the softmax, or scores before it (DropKey)."""
    dtype: DType = "float32"
    """Type of matrix products and activations. Norms, CEMA, softmax and logits stay float32."""
    param_dtype: DType = "float32"
    """Type in which weights are kept. CEMA's parameters stay float32."""
    remat: Remat = "none"
    """What the backward pass computes again beside pointwise work: nothing ("none"), TimestepNorm,
    CEMA and the projections that attention needs ("inputs"), all but matrix products ("dots"), or
    whole blocks ("block"). In this order memory falls."""
    scan_layers: bool = True
    """Run the blocks in one loop, so that compile time does not grow with depth. False writes them
    out one after another, which compiles longer and saves the loop's copies of activations."""
    cema_implementation: CemaImplementation | None = None
    """Implementation of CEMA; the fastest known for the platform if not set."""
    timestep_norm_implementation: Implementation | None = None
    """Implementation of TimestepNorm; the fastest known for the platform if not set."""
    attention_implementation: AttentionImplementation | None = None
    """Implementation of chunk attention; the fastest known for the platform if not set."""
    rowwise_implementation: RowwiseImplementation | None = None
    """Implementation of RMSNorm, LayerNorm and gates; the fastest known for the platform if not
    set."""

    def __post_init__(self) -> None:
        for name in (
            "num_layers", "model_dim", "z_dim", "value_dim", "num_heads", "ffn_hidden_dim",
            "chunk_size", "vocab_size", "norm_num_groups",
        ):  # fmt: skip
            _require(
                getattr(self, name) >= 1,
                f"model.{name} is {getattr(self, name)}; must be at least 1",
            )
        _require(1 <= self.cema_ndim <= 32, f"model.cema_ndim is {self.cema_ndim}; use 1 to 32")
        for name in ("dropout", "hidden_dropout", "attention_dropout"):
            rate = getattr(self, name)
            _require(0.0 <= rate < 1.0, f"model.{name} is {rate}; must be in [0, 1)")
        for name, dim in (("z_dim", self.z_dim), ("value_dim", self.value_dim)):
            _require(
                dim % self.num_heads == 0,
                f"model.{name} {dim} is not a multiple of num_heads {self.num_heads}",
            )
        _require(
            self.head_dim % 2 == 0,
            f"z_dim / num_heads is {self.head_dim}; rotary pairs need an even number",
        )
        _require(
            self.model_dim % self.norm_num_groups == 0 and self.model_dim > self.norm_num_groups,
            f"model_dim {self.model_dim} must be a multiple, two or more, of norm_num_groups "
            f"{self.norm_num_groups}",
        )
        for name in ("dtype", "param_dtype"):
            _require(
                getattr(self, name) != "float16",
                f"model.{name} float16 is refused: its range (65,504) overflows in the gated "
                "products and needs loss scaling; use bfloat16",
            )
        _require_literals(self, "model")
        _require(
            not self.share_emb or self.output_size in (None, self.vocab_size),
            f"share_emb needs output_size == vocab_size, got {self.output_size} and "
            f"{self.vocab_size}",
        )

    @property
    def head_dim(self) -> int:
        """Width of one query/key head."""
        return self.z_dim // self.num_heads

    @property
    def value_head_dim(self) -> int:
        """Width of one value head."""
        return self.value_dim // self.num_heads

    @property
    def num_outputs(self) -> int:
        """Columns of the output matrix."""
        return self.vocab_size if self.output_size is None else self.output_size

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A named size, read from `configs/models/<name>.toml`, with some fields changed."""
        table = _read_preset("models", "model", name)
        return cls(**_check_keys(cls, {**table, **overrides}, "model"))


def preset_names(folder: str = "models") -> list[str]:
    """Names that `from_preset` knows: of models, or of meshes with folder "meshes"."""
    return sorted(path.stem for path in (configs_dir() / folder).glob("*.toml"))


def _read_preset(folder: str, table: str, name: str) -> dict[str, Any]:
    presets = preset_names(folder)
    if name not in presets:
        raise ConfigError(
            f"no {table} preset {name!r}{_did_you_mean(name, presets)}; "
            f"there are: {', '.join(presets)}"
        )
    return tomllib.loads((configs_dir() / folder / f"{name}.toml").read_text())[table]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes rows of tokens."""

    source: Literal["python_stdlib", "files", "tfds"] = "python_stdlib"
    """The Python standard library's own source text, text files, or a prepared TFDS data set."""
    files: tuple[str, ...] = ()
    """Paths or globs of training text: plain, .gz, .jsonl, .parquet (source `files`)."""
    heldout_files: tuple[str, ...] = ()
    """Paths or globs of held-out text; if empty, documents are split off by `heldout_fraction`."""
    heldout_fraction: float = 0.05
    """Fraction of documents kept out of training, chosen by a hash of each document's name."""
    text_field: str = "text"
    """Field that holds the text in .jsonl and .parquet files and in TFDS examples."""
    document_separator: str = ""
    """Splits a plain text file into documents, such as "\\u0000"; empty: a file is a document."""
    tfds_name: str = ""
    """Name of the TFDS data set, with its config and version if needed."""
    tfds_dir: str = ""
    """Directory of prepared TFDS data sets; nothing is ever downloaded."""
    tfds_split: str = "train"
    """TFDS split to train on."""
    tfds_heldout_split: str = "validation"
    """TFDS split held out."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a `tokenizer.json` (tokenizers) or `.model` (sentencepiece) file."""
    seq_len: int = 1024
    """Tokens in a row."""
    batch_size: int = 8
    """Rows in a batch, over all devices."""
    packing: Literal["pack", "pad"] = "pack"
    """Pack documents into full rows, each its own segment; or one piece of a document a row."""
    shuffle_seed: int = 0
    """Seed of the order of documents."""
    num_shards: int = 0
    """Parts that the documents of training are dealt out to, each with its own rows of every batch.
    Batches depend on it, not on the processes that load them. 0: as many as there are processes
    with rows of their own when the run starts; a resumed run keeps its number."""
    num_workers: int = 0
    """Processes that read and tokenize a shard beside the main one."""

    def __post_init__(self) -> None:
        _require_literals(self, "data")
        _require(
            self.seq_len >= 2, f"data.seq_len is {self.seq_len}; a row needs at least 2 tokens"
        )
        _require(self.batch_size >= 1, f"data.batch_size is {self.batch_size}; must be at least 1")
        _require(
            self.num_shards >= 0, f"data.num_shards is {self.num_shards}; must not be negative"
        )
        _require(
            0.0 <= self.heldout_fraction < 1.0,
            f"data.heldout_fraction is {self.heldout_fraction}; must be in [0, 1)",
        )
        _require(
            self.source != "files" or bool(self.files),
            "data.source is 'files' but data.files is empty; name at least one path or glob",
        )
        _require(
            self.source != "tfds" or bool(self.tfds_name),
            "data.source is 'tfds' but data.tfds_name is empty; name a prepared data set",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule, as in the released code (every parameter decays)."""

    lr: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay after warm-up."""
    warmup_steps: int = 100
    """Steps in which the rate rises from lr * init_ratio to lr."""
    init_ratio: float = 1e-4
    """First rate over the peak rate."""
    end_ratio: float = 0.01
    """Last rate over the peak rate."""
    beta1: float = 0.9
    """Decay of the gradient's moving average."""
    beta2: float = 0.95
    """Decay of the squared gradient's average: 0.95 for large models, 0.98 for small ones."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the learning rate."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 means no clipping."""
    accumulate_steps: int = 1
    """Batches whose gradients make one update, weighted by their tokens."""

    def __post_init__(self) -> None:
        _require_literals(self, "optim")
        _require(self.lr > 0, f"optim.lr is {self.lr}; must be positive")
        _require(
            self.warmup_steps >= 0,
            f"optim.warmup_steps is {self.warmup_steps}; must not be negative",
        )
        _require(self.clip_norm >= 0, f"optim.clip_norm is {self.clip_norm}; must not be negative")
        _require(
            self.accumulate_steps >= 1,
            f"optim.accumulate_steps is {self.accumulate_steps}; must be at least 1",
        )


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many parts the run is split into along each axis; one of them may be -1: the rest."""

    replica: int = 1
    """Whole copies of the weights: the slices of a multi-slice job, or plain data parallelism."""
    data: int = 1
    """Parts of the batch; weights and optimizer state are split over them too (FSDP)."""
    chunk: int = 1
    """Parts of the sequence; each holds whole attention chunks."""
    model: int = 1
    """Parts of heads, features and vocabulary (tensor parallelism)."""

    def __post_init__(self) -> None:
        sizes = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        for name, size in sizes.items():
            _require(size == -1 or size >= 1, f"mesh.{name} is {size}; use 1 or more, or -1")
        _require(
            list(sizes.values()).count(-1) <= 1,
            "mesh has -1 more than once; only one axis can take the devices that are left",
        )

    @classmethod
    def from_preset(cls, name: str, **overrides: int) -> Self:
        """A named mesh, read from `configs/meshes/<name>.toml`, with some axes changed."""
        table = _read_preset("meshes", "mesh", name)
        return cls(**_check_keys(cls, {**table, **overrides}, "mesh"))


@dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """How the processes of a run on several hosts find one another."""

    coordinator: str = ""
    """Address of process 0, "host:port"; with `count` and `index`, if they are not detected."""
    count: int = 0
    """Processes of the run."""
    index: int = -1
    """Which of them this one is, from 0."""
    detect: bool = True
    """Without a coordinator, join the processes of a TPU pod, SLURM or Open MPI. Under the last two
    a process gets one GPU, that of its place on the host, unless JAX_LOCAL_DEVICE_IDS lists more.
    """

    def __post_init__(self) -> None:
        given = [bool(self.coordinator), self.count != 0, self.index != -1]
        _require(
            all(given) or not any(given),
            f"processes.coordinator is {self.coordinator!r}, count {self.count}, index "
            f"{self.index}; set all three, or none",
        )
        if any(given):
            _require(
                0 <= self.index < self.count,
                f"processes.index is {self.index}; with count {self.count} use 0 to "
                f"{self.count - 1}",
            )
            host, _, port = self.coordinator.rpartition(":")
            _require(
                bool(host) and port.isdigit(),
                f'processes.coordinator is {self.coordinator!r}; use "host:port"',
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    run_dir: str = "runs/default"
    """Directory of the run's checkpoints, logs and resolved configuration."""
    steps: int = 1000
    """Updates of the weights."""
    seed: int = 0
    """Seed of start values and dropout."""
    z_loss: float = 0.0
    """Weight of log(Z)^2, which keeps logits near zero."""
    loss_chunk_size: int = 2048
    """Tokens whose logits exist at a time in the loss."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 200
    """Steps between held-out measurements; 0: only at the end."""
    eval_batches: int = 8
    """Batches of a held-out measurement during training."""
    final_eval_batches: int = 64
    """Batches of the held-out measurement at the end."""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept."""
    init_from: str = ""
    """Start with the weights of this run_dir, trained or converted; empty: fresh weights."""
    resume: bool = False
    """Go on from the newest checkpoint in `run_dir`."""
    sample_tokens: int = 256
    """Tokens of generated text shown at the end; 0: none."""
    sample_prompt: str = ""
    """Start of the generated text."""
    wandb_project: str = ""
    """Also log to this Weights & Biases project; empty: no."""

    def __post_init__(self) -> None:
        for name in ("steps", "loss_chunk_size", "keep_checkpoints", "log_every"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} is {value}; must be at least 1")


def load_config(path: str | Path) -> TrainConfig:
    """Reads a `TrainConfig` from a TOML file.

    `[model]` and `[mesh]` may hold `preset = "<name>"`: the named size or mesh, with the
    table's other keys changed.

    Raises:
      ConfigError: the file is missing or malformed, a key is unknown (the closest known one is
        named), or a value has the wrong type or is out of range.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    try:
        return config_from_dict(table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def config_from_dict(table: Mapping[str, Any]) -> TrainConfig:
    """Builds a `TrainConfig` from nested mappings; the inverse of `dataclasses.asdict`."""
    import cattrs

    table = dict(table)
    for name, kind in (("model", ModelConfig), ("mesh", MeshConfig)):
        part = table.get(name, {})
        _require(isinstance(part, Mapping), f"{name} must be a table, got {part!r}")
        part = dict(part)
        if preset := part.pop("preset", None):
            table[name] = {**dataclasses.asdict(kind.from_preset(preset)), **part}
    _check_nested_keys(TrainConfig, table, "")
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    for scalar in (int, float, str, bool):
        converter.register_structure_hook(scalar, _strict_scalar)
    # Choices are checked by the dataclasses themselves, whose messages are better.
    converter.register_structure_hook_func(
        lambda kind: get_origin(kind) is Literal, lambda value, _: value
    )
    try:
        return converter.structure(table, TrainConfig)
    except cattrs.BaseValidationError as error:
        messages = cattrs.transform_error(
            error, path="config", format_exception=lambda cause, _: str(cause)
        )
        raise ConfigError("; ".join(messages)) from error


def _strict_scalar(value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def _check_nested_keys(cls: type, table: Mapping[str, Any], path: str) -> None:
    _check_keys(cls, table, path or "config")
    for entry in dataclasses.fields(cls):
        if entry.name in table and dataclasses.is_dataclass(entry.type):
            value = table[entry.name]
            _require(isinstance(value, Mapping), f"{entry.name} must be a table, got {value!r}")
            _check_nested_keys(entry.type, value, entry.name)  # type: ignore[arg-type]


def _check_keys(cls: type, table: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    known = [entry.name for entry in dataclasses.fields(cls)]
    for key in table:
        _require(key in known, f"unknown key {key!r} in {path}{_did_you_mean(key, known)}")
    return table


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _require_literals(config: Any, path: str) -> None:
    for entry in dataclasses.fields(config):
        kinds = (entry.type, *get_args(entry.type))
        allowed = [
            value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)
        ]
        value = getattr(config, entry.name)
        if allowed and value is not None:
            _require(
                value in allowed,
                f"{path}.{entry.name} is {value!r}; use one of {', '.join(map(repr, allowed))}",
            )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
