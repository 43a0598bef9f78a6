"""The TPU compiler's estimates of chunk decoding: the kernel beside plain JAX and the bytes' time.

    megalodon bench tpu_estimates --op chunk_decode --chips v5e v5p v6e      # no TPU is needed

The kernel's cycles are those of all blocks that have a filled slot, with both of its branches in
every step, of which one runs: an upper bound. Steps after the token's slot are not counted.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megalodon_jax.bench.decode_bytes import num_bytes
from megalodon_jax.cache import empty_keys_and_values
from megalodon_jax.chips import Chip
from megalodon_jax.compiled.hlo import parse_program
from megalodon_jax.compiled.kernels import count_estimated_cycles
from megalodon_jax.config import KvFormat, ModelConfig
from pallas_kernels.chunk_decode import chunk_decode
from pallas_kernels.chunk_decode.block_sizes import choose_tpu_block

PRESETS, ROWS = ("mega200M", "mega1.3B"), (8, 64)
FORMATS: tuple[KvFormat, ...] = ("model", "int8")
# Filled slots, the mean of `bench decode`.
FILL = 1152


class DecodeEstimate(NamedTuple):
    """Microseconds of one layer in one step.

    Attributes:
      filled: the filled slots' bytes at the peak rate.
      all_slots: all slots' bytes.
      xla: plain JAX, which reads all slots.
      kernel: the kernel's cycles, or the bytes of its blocks if those take longer.
      around: XLA's operations around the kernel.
    """

    filled: float
    all_slots: float
    xla: float
    kernel: float
    around: float


def estimate_decode(
    device: Any,
    sheet: Chip,
    config: ModelConfig,
    *,
    rows: int,
    kv: KvFormat,
    count_step_cycles: Callable[[str], int],
) -> DecodeEstimate:
    """The estimates for one layer of a model on one kind of TPU.

    Args:
      device: to compile for.
      sheet: the chip's numbers.
      config: of the model, in bfloat16.
      rows: rows that decode.
      kv: format of keys and values.
      count_step_cycles: cycles of a grid step of the kernel of a name that was just compiled.
    """
    assert sheet.clock_hz is not None
    compiled = {
        name: _compile(device, config, rows, kv, name).as_text() or ""
        for name in ("xla", "pallas_tpu")
    }
    xla, around = (
        count_estimated_cycles(parse_program(text)) / sheet.clock_hz * 1e6
        for text in compiled.values()
    )
    cache: Any = jax.eval_shape(partial(empty_keys_and_values, rows, config, kv))
    size = choose_tpu_block(cache.key, cache.value)
    assert size is not None
    steps = -(-FILL // size)
    all_slots = num_bytes(cache) / sheet.memory_bytes_per_second * 1e6
    cycles = rows * config.num_heads * steps * count_step_cycles("chunk_decode")
    blocks = all_slots * steps * size / config.chunk_size
    return DecodeEstimate(
        all_slots * FILL / config.chunk_size,
        all_slots,
        xla,
        max(cycles / sheet.clock_hz * 1e6, blocks),
        around,
    )


def _compile(
    device: Any, config: ModelConfig, rows: int, kv: KvFormat, implementation: Any
) -> jax.stages.Compiled:
    sharding = NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec())
    heads, dtype = (rows, config.num_heads), jnp.dtype(config.dtype)

    def make() -> tuple[Any, ...]:
        q = jnp.zeros((*heads, config.head_dim), dtype)
        v = jnp.zeros((*heads, config.value_head_dim), dtype)
        cache = empty_keys_and_values(rows, config, kv)
        return q, q, v, cache, jnp.zeros(rows, jnp.int32), v

    def decode(q: Any, k: Any, v: Any, cache: Any, positions: Any, gate: Any) -> Any:
        return chunk_decode(q, k, v, cache, positions, gate=gate, implementation=implementation)

    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(make),
    )
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        return jax.jit(decode, donate_argnums=3).lower(*shapes).compile()


def decode_table(
    name: str, device: Any, sheet: Chip, dumps: Path, read_cycles: Callable[[str], int]
) -> Iterator[str]:
    """Lines of a table of both sizes, numbers of rows and formats.

    Args:
      name: of the chip.
      device: to compile for.
      sheet: the chip's numbers.
      dumps: the directory of the compiler's dumps; emptied.
      read_cycles: cycles of a grid step from the text of a dump.
    """

    def count_step_cycles(kernel: str) -> int:
        paths = sorted(dumps.glob(f"*{kernel}*-final_bundles.txt"))
        return read_cycles(next(p for p in paths if "schedule-analysis" not in p.name).read_text())

    yield "| chip | model | rows | kv | filled slots | all slots | plain JAX | kernel | around it |"
    for preset in PRESETS:
        config = ModelConfig.from_preset(preset, dtype="bfloat16")
        for rows in ROWS:
            for kv in FORMATS:
                found = estimate_decode(
                    device, sheet, config, rows=rows, kv=kv, count_step_cycles=count_step_cycles
                )
                for path in dumps.iterdir():
                    path.unlink()
                numbers = " | ".join(f"{number:.0f}" for number in found)
                yield f"| {name} | {preset} | {rows} | {kv} | {numbers} |"
