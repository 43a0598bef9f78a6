"""The options of the benchmarks; importing this module is cheap."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from megalodon_jax.config.mesh import MeshConfig
from megalodon_jax.config.model import DType, KvFormat, Remat, WeightFormat
from megalodon_jax.presets import preset_names
from pallas_kernels.common.dispatch import Implementation

# The shipped model sizes, listed by `--help`.
if TYPE_CHECKING:
    ModelPreset = str
else:
    ModelPreset = Literal[tuple(preset_names())]

BenchedOperation = Literal[
    "cema", "timestep_norm", "chunk_attention", "noncausal_attention", "rowwise"
]
BenchMode = Literal["plain", "packed", "carried"]
DecayRange = Literal["initial", "long"]
# Meshes of which one axis takes all devices, or all but pairs along a second axis.
MeshName = Literal["data", "fsdp", "chunk", "model", "fsdp+chunk", "fsdp+model"]
ScalingKind = Literal["weak", "strong"]
EstimatedChip = Literal["v4", "v5e", "v5p", "v6e"]
DecodePart = Literal["step", "context", "first_token", "prefill"]
DecodeKernel = Literal["chunk_decode", "skinny_matmul"]


@dataclass(frozen=True, kw_only=True)
class BenchOpsOptions:
    """Measures every implementation of the operations under the model: time, memory, error.

    Example: megalodon bench ops --op cema --check
    """

    op: tuple[BenchedOperation, ...] = get_args(BenchedOperation)
    """Operations to measure."""
    implementation: tuple[Implementation, ...] = ()
    """Implementations to measure; if not given, all but the reference."""
    mode: tuple[BenchMode, ...] = ("plain", "packed", "carried")
    """One document a row (plain), eight documents (packed), or an initial state (carried)."""
    decay_range: DecayRange = "initial"
    """CEMA's decay: as at the start of training (initial), or |q| up to 1 - 1e-3 (long)."""
    check: bool = False
    """Compare a short sequence with the float64 reference."""
    profile: bool = False
    """Show the time of a call's kernels alone, without gaps and launches (GPU)."""
    small: bool = False
    """Shapes for a CPU; all implementations."""
    seed: int | None = None
    """Seed of the inputs; if not given, a new one at every run."""
    json: str = ""
    """Also write the measurements to this file."""


@dataclass(frozen=True, kw_only=True)
class BenchTrainOptions:
    """Measures training steps of the model presets: tokens/s, MFU, memory, compile time.

    Example: megalodon bench train --preset mega200M --against transformer --profile
    """

    preset: ModelPreset | None = None
    """Model size; if not given, a table of cases is measured and the next options are ignored."""
    rows: int = 8
    """Rows of the batch."""
    length: tuple[int, ...] = (2048,)
    """Tokens of a row; every length is one case."""
    tokens: int = 0
    """Tokens of the batch, which replace `rows` by tokens // length, at least 1; 0: use `rows`."""
    against: Literal["transformer"] | None = None
    """Also measure the Transformer of the same size at the same shapes."""
    remat: tuple[Remat, ...] = ("none",)
    """Rematerialization policies (`model.remat`); a later one is tried where a step with those
    before it does not fit the device's memory."""
    documents: int = 0
    """Documents packed into a row; 0: no segment ids."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices of a step and how it is sharded over them; rows and tokens are those of all."""
    reduce_dtype: DType = "float32"
    """Dtype in which devices sum gradients (`model.reduce_dtype`)."""
    scan_layers: bool = False
    """Run the blocks in one loop, which compiles sooner."""
    implementation: Implementation | None = None
    """Implementation of all operations (`model.implementation`); if not given, the defaults."""
    steps: int = 10
    """Steps that are timed."""
    profile: bool = False
    """Show the GPU time by kind of kernel."""
    plan: bool = False
    """Show memory, collectives and time that `megalodon plan` reads in the program beside those
    measured."""
    small: bool = False
    """A model for a CPU."""
    json: str = ""
    """Also write the measurements to this file."""


@dataclass(frozen=True, kw_only=True)
class BenchScalingOptions:
    """Measures the speed of several devices against one: weak and strong scaling.

    Example: megalodon bench scaling --preset mega1.3B --rows 4 --length 4096
    """

    preset: ModelPreset = "mega1.3B"
    """Model size."""
    rows: int = 4
    """Rows of one device's batch."""
    length: int = 4096
    """Tokens of a row on one device."""
    layers: int = 0
    """Blocks of the model, fewer compile sooner; 0: the preset's."""
    remat: Remat = "none"
    """Rematerialization policy (`model.remat`)."""
    reduce_dtype: DType = "float32"
    """Dtype in which devices sum gradients (`model.reduce_dtype`)."""
    mesh: tuple[MeshName, ...] = ("data", "fsdp", "chunk", "model")
    """Meshes to measure: copies of the weights (data), FSDP, context or tensor parallelism, or FSDP
    over pairs of devices with one of the last two."""
    scaling: tuple[ScalingKind, ...] = ("weak", "strong")
    """As much work for every device (weak), or as much in all (strong)."""
    steps: int = 10
    """Steps that are timed."""
    small: bool = False
    """A model for a CPU."""
    json: str = ""
    """Also write the measurements to this file."""


@dataclass(frozen=True, kw_only=True)
class BenchAgreementOptions:
    """Compares the results of several devices with those of one.

    Example: megalodon bench agreement --preset mega1.3B
    """

    preset: ModelPreset = "mega1.3B"
    """Model size."""
    layers: int = 2
    """Blocks of the model."""
    reduce_dtype: DType = "float32"
    """Dtype in which devices sum gradients (`model.reduce_dtype`)."""
    mesh: tuple[MeshName, ...] = ("data", "fsdp", "chunk", "model")
    """Meshes to compare: copies of the weights (data), FSDP, context or tensor parallelism, or FSDP
    over pairs of devices with one of the last two."""
    documents: tuple[int, ...] = (0, 3)
    """Documents packed into a row; 0: no segment ids."""
    steps: int = 5
    """Steps whose losses are compared."""
    small: bool = False
    """A model for a CPU."""


@dataclass(frozen=True, kw_only=True)
class BenchReferenceOptions:
    """Trains with the default implementations beside the reference ones on a text.

    Example: megalodon bench reference --text book.txt
    """

    text: str
    """File to train on."""
    steps: int = 200
    """Training steps."""
    rows: int = 4
    """Rows of a batch."""
    length: int = 512
    """Bytes of a row."""
    layers: int = 2
    """Blocks of the model."""
    seed: int = 0
    """Seed of the crops."""
    small: bool = False
    """A narrow model for a CPU."""


@dataclass(frozen=True, kw_only=True)
class BenchTpuEstimatesOptions:
    """Prints the TPU compiler's estimates of the kernels and of plain JAX.

    Example: megalodon bench tpu_estimates --chips v5e v6e --op timestep_norm
    """

    chips: tuple[EstimatedChip, ...] = ("v5e", "v6e")
    """Kinds of TPU."""
    op: Literal["cema", "timestep_norm", "chunk_decode"] = "cema"
    """The operation; chunk_decode has its own sizes, those of two models in decoding."""
    rows: int = 1
    """Rows of x."""
    length: int = 16_384
    """Tokens of a row."""
    channels: int = 4_096
    """Channels of a token."""
    groups: int = 64
    """Groups of TimestepNorm."""


@dataclass(frozen=True, kw_only=True)
class BenchLoaderOptions:
    """Measures how many tokens a second the data loader reads, by worker processes.

    Example: megalodon bench loader --files "books/*.txt" --tokenizer tokenizer.json --workers 0 4
    """

    files: tuple[str, ...]
    """Paths, folders or globs of text; at least as many documents as workers."""
    document_separator: str = ""
    """Separator of documents in plain text files, such as `\\0`."""
    text_field: str = "text"
    """Field with the text in .jsonl and .parquet files."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a tokenizer file."""
    workers: tuple[int, ...] = (0, 1, 2, 4)
    """Numbers of worker processes to measure; 0: a thread of the main process."""
    rows: int = 8
    """Rows of the batch."""
    length: int = 2048
    """Tokens of a row."""
    seconds: float = 10.0
    """Time that is measured."""
    warm_up: int = 64
    """Batches of every worker before that."""
    json: str = ""
    """Also write the measurements to this file."""


@dataclass(frozen=True, kw_only=True)
class BenchCemaMemoryOptions:
    """Prints the peak memory of CEMA, forward and backward.

    Example: megalodon bench cema_memory --run
    """

    run: bool = False
    """Run every case too."""


@dataclass(frozen=True, kw_only=True)
class BenchDecodeOptions:
    """Measures decoding: ms a step over the floor, first token, prefill, long contexts.

    Example: megalodon bench decode --batch 1 64 --weights model int8 --kv model int8 --profile
    """

    preset: ModelPreset = "mega200M"
    """Model size."""
    batch: tuple[int, ...] = (1, 8, 64, 256)
    """Rows that decode together; one row runs as in the engine, beside an idle one."""
    prompt: int = 1024
    """Tokens of the prompt; ids are random."""
    weights: tuple[WeightFormat, ...] = ("model",)
    """Formats of the weights: in `dtype` (model), or 8-bit integers (int8)."""
    kv: tuple[KvFormat, ...] = ("model",)
    """Formats of keys and values; every one is measured with every format of the weights."""
    dtype: DType = "bfloat16"
    """Dtype of products, keys and values (`model.dtype`)."""
    part: tuple[DecodePart, ...] = ("step", "context", "first_token", "prefill")
    """Parts to measure: steps of every batch, steps after a long context, the time to the first
    token, the speed of prefill."""
    contexts: tuple[int, ...] = (1_048_576,)
    """Tokens before the prompt; steps after them are compared with steps after the prompt alone."""
    context_batch: tuple[int, ...] = (1, 64)
    """Rows of these comparisons, and of those with the Transformer."""
    lengths: tuple[int, ...] = (1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
    """Lengths of the prompts of one row whose prefill is measured."""
    against: Literal["transformer"] | None = None
    """Also measure the Transformer of the same size, and one with a quarter of its key and value
    heads (grouped queries), in caches that are filled with random numbers."""
    against_contexts: tuple[int, ...] = (4096, 32_768, 131_072, 1_048_576)
    """Tokens in the Transformer's cache."""
    repeats: int = 10
    """Measurements whose median is taken."""
    profile: bool = False
    """Show the GPU time by kind of kernel; of a first token, host calls and kernels."""
    small: bool = False
    """A model for a CPU, and shorter chains of steps."""
    json: str = ""
    """Also write the measurements to this file."""


@dataclass(frozen=True, kw_only=True)
class BenchDecodeKernelsOptions:
    """Measures the kernels of a decoding step alone: chunk decoding and every product, beside XLA.

    Example: megalodon bench decode_kernels --rows 64 --kv model int8 --tilings --check
    """

    preset: ModelPreset = "mega200M"
    """Model size."""
    rows: tuple[int, ...] = (1, 8, 64)
    """Rows that decode together."""
    op: tuple[DecodeKernel, ...] = get_args(DecodeKernel)
    """Operations to measure."""
    weights: tuple[WeightFormat, ...] = ("model",)
    """Formats of the matrices: bfloat16 (model), or 8-bit integers (int8)."""
    kv: tuple[KvFormat, ...] = ("model",)
    """Formats of keys and values."""
    position: int = 1151
    """Position of every row's token: the slots of the chunk up to it are read."""
    layers: int = 12
    """Caches or matrices that calls use in turn, at least; more where they would fit into the
    device's L2 cache."""
    tilings: bool = False
    """Also measure the tilings around the chosen one: of chunk decoding, and of products of 17 to
    64 rows (Hopper)."""
    check: bool = False
    """Compare one call with XLA in float32 on the same rounded operands."""
    small: bool = False
    """A model for a CPU."""
    json: str = ""
    """Also write the measurements to this file."""


@dataclass(frozen=True, kw_only=True)
class BenchEngineOptions:
    """Measures the engine under a Poisson load: tokens/s, first token, time between tokens.

    Example: megalodon bench engine --preset mega200M --slots 64 --load 0.8 1.1 --seconds 30
    """

    preset: ModelPreset = "mega200M"
    """Model size."""
    slots: int = 64
    """Requests that run at the same time."""
    load: tuple[float, ...] = (0.8, 1.1)
    """Rates of arrival, as a share of the capacity measured before."""
    seconds: float = 30.0
    """Duration of a load; its first fifth is not counted."""
    prompt: tuple[int, int] = (64, 4096)
    """Shortest and longest prompt, in tokens; lengths are log-uniform."""
    answer: tuple[int, int] = (32, 512)
    """Shortest and longest answer, in tokens; lengths are log-uniform."""
    weights: WeightFormat = "model"
    """Format of the weights: in `dtype` (model), or 8-bit integers (int8)."""
    kv: KvFormat = "model"
    """Format of keys and values: in `dtype` (model), or 8-bit integers (int8)."""
    dtype: DType = "bfloat16"
    """Dtype of products, keys and values (`model.dtype`)."""
    fixed_bucket: bool = False
    """Always run all slots, which compiles fewer programs."""
    seed: int = 0
    """Seed of arrivals, lengths and ids."""
    repeats: int = 10
    """Measurements whose median is the capacity."""
    small: bool = False
    """A model for a CPU."""
    json: str = ""
    """Also write the measurements to this file."""
