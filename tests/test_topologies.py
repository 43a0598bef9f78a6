"""Ahead-of-time compilers accept Pallas kernels, and report on them."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.devices import HOPPER
from tests.topologies import compile_for, h100_device, h200_device, ptxas_usage, tpu_device

MATRIX = jax.ShapeDtypeStruct((16, 1024), jnp.float32)


def affine_tpu(x):
    def kernel(x_ref, y_ref):
        y_ref[...] = 2 * x_ref[...] + 1

    return pl.pallas_call(kernel, out_shape=x)(x)


def sums_in_registers(x, *, sums: int, warpgroups: int = 1, name: str = "kernel"):
    """A kernel that holds `sums` numbers in every thread, one column of x to a thread."""
    rows, columns = x.shape

    def kernel(x_ref, y_ref, x_tile, y_tile, barrier):
        warpgroup = lax.axis_index("warpgroup")
        column = pl.ds((lax.axis_index("block") * warpgroups + warpgroup) * 128, 128)
        plgpu.copy_gmem_to_smem(x_ref.at[:, column], x_tile.at[warpgroup], barrier.at[warpgroup])
        plgpu.barrier_wait(barrier.at[warpgroup])
        layout = plgpu.Layout.WG_STRIDED((128,), vec_size=1)

        def step(t, values):
            new = plgpu.load(x_tile.at[warpgroup, t], layout=layout)
            return tuple(value * (n + 1) + new for n, value in enumerate(values))

        start = plgpu.load(x_tile.at[warpgroup, 0], layout=layout)
        values = lax.fori_loop(1, rows, step, (start,) * sums)
        y_tile[warpgroup, 0] = functools.reduce(jnp.add, values)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(y_tile.at[warpgroup], y_ref.at[:, column])
        plgpu.wait_smem_to_gmem(0)

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((1, columns), x.dtype),
        grid=(columns // (128 * warpgroups),),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((warpgroups, rows, 128), x.dtype),
            plgpu.SMEM((warpgroups, 1, 128), x.dtype),
            plgpu.Barrier(num_arrivals=1, num_barriers=warpgroups),
        ],
    )(x)


@pytest.mark.parametrize(("name", "kind"), [("v5e:1x1", "TPU v5 lite"), ("v4:2x2x1", "TPU v4")])
def test_tpu(name, kind):
    device = tpu_device(name)
    assert device.device_kind == kind
    compiled = compile_for(device, affine_tpu, MATRIX)
    assert "tpu_custom_call" in compiled.as_text()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.argument_size_in_bytes == math.prod(MATRIX.shape) * 4


def test_tpu_compiler_refuses_what_does_not_fit():
    too_large = jax.ShapeDtypeStruct((2048, 2048), jnp.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile_for(tpu_device("v5e:1x1"), affine_tpu, too_large)


@pytest.mark.slow
def test_h200_registers_and_spills():
    device = h200_device()
    assert device.device_kind == "NVIDIA H200"

    def usage(sums: int, warpgroups: int = 1):
        function = functools.partial(sums_in_registers, sums=sums, warpgroups=warpgroups)
        (report,) = ptxas_usage(compile_for(device, function, MATRIX))
        # A process compiles a kernel once; the report is kept.
        jax.clear_caches()
        assert ptxas_usage(compile_for(device, function, MATRIX)) == [report]
        assert report.name == "kernel"
        return report

    few, many, too_many = usage(8), usage(40), usage(72, warpgroups=8)
    assert 8 < few.registers < 40 < many.registers <= HOPPER.max_registers_per_thread
    assert few.spill_bytes == many.spill_bytes == 0
    # Eight warpgroups share the registers of a multiprocessor.
    per_thread = HOPPER.registers // (8 * 128)
    assert per_thread == 64
    assert too_many.registers <= per_thread
    assert too_many.spill_bytes >= 4 * (72 - per_thread)


def test_h100_compiles_the_same_kernel():
    device = h100_device()
    assert device.device_kind == "NVIDIA H100 80GB HBM3"
    compiled = compile_for(
        device, functools.partial(sums_in_registers, sums=9, name="h100"), MATRIX
    )
    (report,) = ptxas_usage(compiled)
    assert report.name == "h100"
    assert 9 < report.registers < 50
    assert report.spill_bytes == 0


def test_h200_several_kernels_and_ordinary_operations():
    def function(x):
        few = sums_in_registers(jnp.sin(x), sums=9, name="few")
        return few + sums_in_registers(x @ x.T @ x, sums=50, name="many")

    compiled = compile_for(h200_device(), function, MATRIX)
    usage = {report.name: report.registers for report in ptxas_usage(compiled)}
    assert usage.keys() == {"few", "many"}
    assert usage["few"] < 50 < usage["many"]
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes >= math.prod(MATRIX.shape) * 4


def test_no_report_is_an_error():
    compiled = compile_for(h200_device(), jnp.sin, MATRIX)
    with pytest.raises(ValueError, match="no Mosaic GPU kernel"):
        ptxas_usage(compiled)


def test_the_process_itself_stays_where_it_was():
    before = jax.devices()
    tpu_device("v5e:1x1")
    h200_device()
    assert jax.devices() == before
    assert jax.jit(lambda x: x + 1)(jnp.ones(3)).devices() <= set(before)
