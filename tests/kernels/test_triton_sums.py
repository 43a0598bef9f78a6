"""Sums of partial gradients by Triton."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.common.devices import GPU_LIMITS
from pallas_kernels.common.target import find_target
from pallas_kernels.common.triton import load_kernels
from pallas_kernels.common.triton_sums import COLUMNS, MODULE, ROWS, sum_pairs, sum_partials
from tests.kernels.triton_compiler import CAPABILITIES, compile_kernel


@pytest.fixture(autouse=True)
def triton():
    return pytest.importorskip("triton", reason="needs the extra: pip install -e '.[triton]'")


@pytest.mark.parametrize("shape", [(1, 7), (5, 33), (ROWS + 3, 2, 48)])
def test_sums_equal_float64(shape):
    partials = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    interpret = find_target().platform != "gpu"
    sums = sum_partials(jnp.asarray(partials), interpret=interpret)
    np.testing.assert_allclose(sums, partials.astype(np.float64).sum(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 2, 7), (ROWS + 3, 2, 48)])
def test_sums_of_pairs_equal_float64(shape):
    partials = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    interpret = find_target().platform != "gpu"
    sums = sum_pairs(jnp.asarray(partials), interpret=interpret)
    np.testing.assert_allclose(
        np.stack(sums), partials.astype(np.float64).sum(0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "results"), [("sum_partials", ("sums",)), ("sum_pairs", ("first", "second"))]
)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_fit_every_generation(capability, name, results, tmp_path):
    usage = compile_kernel(
        getattr(load_kernels(MODULE), name),
        capability,
        {"partials": "float32", "num_partials": "i32"} | dict.fromkeys(results, "float32"),
        {"WIDTH": 8192, "ROWS": ROWS, "COLUMNS": COLUMNS},
        tmp_path,
    )
    assert usage.spilled == 0
    # Twelve programs of four warps run at a time.
    assert usage.registers * 32 * 4 * 12 <= GPU_LIMITS[capability].registers
