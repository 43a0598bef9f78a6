"""The frame around CEMA's TPU kernels: grid, blocks of every operand, references by name."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int32

from pallas_kernels.cema.pallas_tpu.layout import (
    BLOCK,
    CHANNELS,
    LANES,
    Documents,
    Plan,
)
from pallas_kernels.cema.pallas_tpu.tables import TableSeeds, kernel_inputs

Operand = tuple[Array | jax.ShapeDtypeStruct, pl.BlockSpec]


class Frame:
    """Collects a kernel's operands by name and calls it.

    The grid is (channels / 128, rows, tiles): the tables of 128 channels are made once and stay in
    VMEM for all rows and tiles, and the tables' gradients add up there.
    """

    def __init__(
        self,
        plan: Plan,
        shape: tuple[int, ...],
        picked_block: Int32[Array, " B"],
        documents: Documents | None,
        *,
        backward: bool,
    ):
        """Starts with the documents.

        Args:
          plan: what the kernel is specialised for.
          shape: of x.
          picked_block: the block of every row whose entering state is wanted.
          documents: or None.
          backward: visits tiles from a row's end to its start.
        """
        self.plan = plan
        self.shape = shape
        self.backward = backward
        self.scalars = {"picked_block": picked_block}
        self.inputs: dict[str, Operand] = {}
        self.outputs: dict[str, Operand] = {}
        if documents is not None:
            self.scalars |= {"cuts": documents.cuts, "most_cuts": documents.most_cuts}
            spec = pl.BlockSpec((1, plan.blocks, BLOCK), lambda d, b, k, *_: (b, self._tile(k), 0))
            self.inputs["piece"] = (documents.piece, spec)
            self.inputs["piece_from_end"] = (documents.piece_from_end, spec)

    def _tile(self, k: Any) -> Any:
        return self.plan.tiles - 1 - k if self.backward else k

    def add_seeds(self, seeds: TableSeeds) -> None:
        """Adds what tables are made from."""
        for name, value in kernel_inputs(seeds, self.plan, backward=self.backward).items():
            self.inputs[name] = (value, self._channels_spec(value.shape))

    def _channels_spec(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        block = (shape[0] * CHANNELS // self.shape[2], *shape[1:])
        zeros = (0,) * (len(shape) - 1)
        return pl.BlockSpec(block, lambda d, b, k, *_: (d, *zeros))

    def sequence(self, value: Array | jax.ShapeDtypeStruct) -> Operand:
        """(B, L, D)."""
        block = (1, self.plan.tile, CHANNELS)
        return value, pl.BlockSpec(block, lambda d, b, k, *_: (b, self._tile(k), d))

    def row_state(self, value: Array | jax.ShapeDtypeStruct) -> Operand:
        """(B, G, 128), a state of every row."""
        return value, pl.BlockSpec((1, self.plan.groups, LANES), lambda d, b, k, *_: (b, d, 0))

    def block_states(self, value: Array | jax.ShapeDtypeStruct) -> Operand:
        """(B, J, G, 128), a state of every block."""
        block = (1, self.plan.blocks, self.plan.groups, LANES)
        return value, pl.BlockSpec(block, lambda d, b, k, *_: (b, self._tile(k), d, 0))

    def add_outputs(self, **outputs: Operand) -> None:
        """Adds outputs made by the methods above."""
        self.outputs |= outputs

    def add_sums(self, **shapes: tuple[int, ...]) -> None:
        """Adds float32 outputs of 128 channels, the same block for all rows and tiles."""
        for name, shape in shapes.items():
            value = jax.ShapeDtypeStruct(shape, jnp.float32)
            self.outputs[name] = (value, self._channels_spec(shape))

    def call(
        self,
        kernel: Callable[[Any], None],
        refs: Callable[..., Any],
        scratch: Mapping[str, Any],
        *,
        name: str,
        products: int,
    ) -> dict[str, Array]:
        """Runs `kernel(refs(**references by name))`.

        Args:
          kernel: the body.
          refs: makes the kernel's argument.
          scratch: VMEM scratch by name.
          name: of the kernel.
          products: (T, T) products a block, for the cost estimate.
        """
        plan, (rows, _, channels) = self.plan, self.shape
        names = [*self.scalars, *self.inputs, *self.outputs, *scratch]
        arrays = [*self.scalars.values(), *(value for value, _ in self.inputs.values())]
        shapes = [value for value, _ in self.outputs.values()]
        results = pl.pallas_call(
            lambda *references: kernel(refs(**dict(zip(names, references, strict=True)))),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(self.scalars),
                grid=(channels // CHANNELS, rows, plan.tiles),
                in_specs=[spec for _, spec in self.inputs.values()],
                out_specs=[spec for _, spec in self.outputs.values()],
                scratch_shapes=list(scratch.values()),
            ),
            out_shape=shapes,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=plan.vmem_limit,
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * rows * plan.tiles * plan.tile * channels * BLOCK,
                bytes_accessed=sum(a.size * a.dtype.itemsize for a in [*arrays, *shapes]),
                transcendentals=0,
            ),
            interpret=plan.interpret,
            name=name,
        )(*arrays)
        return dict(zip(self.outputs, results, strict=True))


class Tile(NamedTuple):
    """A grid step as the parts of a kernel see it.

    Attributes:
      refs: references by name.
      plan: what the kernel is specialised for.
      row: the row's number.
      number: the tile's number in the row.
      most_cuts: the most borders in a block of the tile; None where there are none.
    """

    refs: Any
    plan: Plan
    row: Array
    number: Array
    most_cuts: Array | None

    def for_groups(self, body: Callable[["Tile", Array], None]) -> None:
        """Runs `body` on every group of channels."""
        lax.fori_loop(
            0,
            self.plan.groups,
            lambda group, _: body(self, group),
            None,
            unroll=self.plan.unroll,
        )

    def is_whole(self, block: Array) -> Array | None:
        """Whether a block hands the state before it on; None: all do."""
        if self.most_cuts is None:
            return None
        return self.refs.cuts[self.row, self.number * self.plan.blocks + block] == 0

    @property
    def corrects_decay(self) -> bool:
        """Whether to replace the product of a tile's decays, whose errors add up, by their power.

        Float32 outputs of channels that forget slowly show it: 2e-5 at |q| = 1 - 1e-5.
        """
        return self.plan.exact and self.most_cuts is None

    @property
    def in_first(self) -> Array | None:
        """Tokens (J, T) that see the state before their block; None: all do."""
        return None if self.most_cuts is None else self.refs.piece[0] == 0

    @property
    def in_last(self) -> Array | None:
        """Tokens (J, T) that reach the state after their block; None: all do."""
        return None if self.most_cuts is None else self.refs.piece_from_end[0] == 0


def run_tile(
    compute: Callable[[Tile], None], refs: Any, plan: Plan, row: Array, number: Array
) -> None:
    """Runs `compute` on a tile, without any masks where the tile has no border."""
    if refs.most_cuts is None:
        compute(Tile(refs, plan, row, number, None))
        return
    most_cuts = refs.most_cuts[row, number]

    @pl.when(most_cuts == 0)
    def _without_borders() -> None:
        compute(Tile(refs, plan, row, number, None))

    @pl.when(most_cuts > 0)
    def _with_borders() -> None:
        compute(Tile(refs, plan, row, number, most_cuts))
