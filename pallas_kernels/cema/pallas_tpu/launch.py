"""Calls of CEMA's TPU kernels: grid, blocks of every operand, references by name."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

from pallas_kernels.cema.pallas_tpu.layout import (
    BLOCK,
    CHANNELS,
    LANES,
    CemaTpuDocuments,
    CemaTpuPlan,
)
from pallas_kernels.cema.pallas_tpu.tables import TableParams, TableRefs, kernel_inputs
from pallas_kernels.cema.pallas_tpu.tile import DocumentRefs
from pallas_kernels.common import pallas_tpu
from pallas_kernels.common.pallas_tpu import Operand


class CemaKernelCall:
    """Collects a kernel's operands by name and calls it.

    The grid is (channels / 128, rows, tiles): the tables of 128 channels are made once and stay in
    VMEM for all rows and tiles, and the tables' gradients accumulate there.
    """

    def __init__(
        self,
        plan: CemaTpuPlan,
        shape: tuple[int, ...],
        selected_block: Int32[Array, " B"],
        documents: CemaTpuDocuments | None,
        *,
        backward: bool,
    ):
        """Starts with the documents.

        Args:
          plan: what the kernel is specialised for.
          shape: of x.
          selected_block: the block of every row whose previous state is wanted.
          documents: or None.
          backward: visits tiles from a row's end to its start.
        """
        self.plan = plan
        self.shape = shape
        self.backward = backward
        self.prefetched = {"selected_block": selected_block}
        self.inputs: dict[str, Operand] = {}
        self.outputs: dict[str, Operand] = {}
        if documents is not None:
            self.prefetched |= {"cuts": documents.cuts, "most_cuts": documents.most_cuts}
            block = (1, plan.blocks, BLOCK)
            spec = pl.BlockSpec(block, lambda d, b, k, *_: (b, self._tile(k), 0))
            self.inputs["piece"] = (documents.piece, spec)
            self.inputs["piece_from_end"] = (documents.piece_from_end, spec)

    def _tile(self, k: Any) -> Any:
        return self.plan.num_tiles - 1 - k if self.backward else k

    def _channels_spec(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        block = (shape[0] * CHANNELS // self.shape[2], *shape[1:])
        zeros = (0,) * (len(shape) - 1)
        return pl.BlockSpec(block, lambda d, b, k, *_: (d, *zeros))

    def sequence(self, value: Array | jax.ShapeDtypeStruct) -> Operand:
        """(B, L, D)."""
        block = (1, self.plan.tile_size, CHANNELS)
        return value, pl.BlockSpec(block, lambda d, b, k, *_: (b, self._tile(k), d))

    def row_state(self, value: Array | jax.ShapeDtypeStruct) -> Operand:
        """(B, G, 128), a state of every row."""
        block = (1, self.plan.num_groups, LANES)
        return value, pl.BlockSpec(block, lambda d, b, k, *_: (b, d, 0))

    def block_states(self, value: Array | jax.ShapeDtypeStruct) -> Operand:
        """(B, J, G, 128), a state of every block."""
        block = (1, self.plan.blocks, self.plan.num_groups, LANES)
        return value, pl.BlockSpec(block, lambda d, b, k, *_: (b, self._tile(k), d, 0))

    def add_table_params(self, table_params: TableParams) -> None:
        """Adds what tables are made from."""
        for name, value in kernel_inputs(table_params, self.plan, backward=self.backward).items():
            self.inputs[name] = (value, self._channels_spec(value.shape))

    def add_outputs(self, **outputs: Operand) -> None:
        """Adds outputs made by the methods above."""
        self.outputs |= outputs

    def add_sums(self, **shapes: tuple[int, ...]) -> None:
        """Adds float32 outputs per 128 channels, the same block for all rows and tiles."""
        for name, shape in shapes.items():
            value = jax.ShapeDtypeStruct(shape, jnp.float32)
            self.outputs[name] = (value, self._channels_spec(shape))

    def run(
        self,
        kernel: Callable[[Any], None],
        make_refs: Callable[..., Any],
        scratch: Mapping[str, Any],
        *,
        name: str,
        products: int,
    ) -> dict[str, Array]:
        """Runs `kernel(make_refs(tables=..., documents=..., **other references by name))`.

        Args:
          kernel: the kernel's body.
          make_refs: makes the kernel's argument.
          scratch: VMEM scratch by name.
          name: name of the kernel in profiles.
          products: (T, T) products per block, for the cost estimate.
        """
        plan, (rows, _, channels) = self.plan, self.shape

        def body(**refs):
            tables = TableRefs(*(refs.pop(field) for field in TableRefs._fields))
            documents = DocumentRefs(*(refs.pop(field, None) for field in DocumentRefs._fields))
            kernel(make_refs(tables=tables, documents=documents, **refs))

        return pallas_tpu.launch(
            body,
            name=name,
            grid=(channels // CHANNELS, rows, plan.num_tiles),
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            inputs=self.inputs,
            outputs=self.outputs,
            scratch=scratch,
            prefetched=self.prefetched,
            vmem_limit=plan.vmem_limit,
            flops=2 * products * rows * plan.num_tiles * plan.tile_size * channels * BLOCK,
            interpret=plan.interpret,
        )
