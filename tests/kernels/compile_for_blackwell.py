"""Compiles Mosaic GPU kernels for a Blackwell card, and prints registers and spills as JSON.

A process of its own: after a compilation for Hopper the compiler of a process refuses Blackwell's
instructions.

    python -m tests.kernels.compile_for_blackwell 100
"""

import contextlib
import json
import sys

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import core

from pallas_kernels import cema, rowwise, timestep_norm
from pallas_kernels.common.devices import GPU_LIMITS
from tests.topologies import blackwell_device, compile_for, ptxas_usage

BF16 = jnp.bfloat16
shape = jax.ShapeDtypeStruct


def gradients(function, *arguments):
    def run(dy, *arguments):
        y, pull_back = jax.vjp(function, *arguments)
        return y, pull_back(dy)

    return run, (arguments[0], *arguments)


def cema_case(packed):
    matrix, vector = shape((256, 16), jnp.float32), shape((256,), jnp.float32)
    params = cema.CemaParams(matrix, matrix, vector, shape((256, 16, 2), jnp.float32), vector)
    ids = jnp.ones((2, 512), jnp.int32) if packed else None

    def run(x, params):
        return cema.cema(x, params, segment_ids=ids, implementation="mosaic_gpu").y

    return gradients(run, shape((2, 512, 256), BF16), params)


def rowwise_case():
    def run(x, scale, bias):
        options = {"eps": 1e-5, "dtype": BF16, "implementation": "mosaic_gpu"}
        return rowwise.layer_norm(x, scale, bias, **options)

    vector = shape((1024,), jnp.float32)
    return gradients(run, shape((512, 1024), BF16), vector, vector)


def timestep_norm_case():
    def run(x, scale, bias):
        options = {"num_groups": 32, "implementation": "mosaic_gpu"}
        return timestep_norm.timestep_norm(x, scale, bias, **options).y

    vector = shape((1024,), jnp.float32)
    return gradients(run, shape((1, 512, 1024), BF16), vector, vector)


@contextlib.contextmanager
def shared_memory_of(capability):
    """Ahead of time the compiler assumes Hopper's shared memory."""
    limit = getattr(core, "artificial_shared_memory_limit", None)
    if capability == 100:
        yield
    elif limit is None:
        raise ValueError("this jax cannot compile for a GPU with less shared memory than Hopper")
    else:
        with limit(GPU_LIMITS[capability].shared_memory):
            yield


CASES = {
    "cema": lambda: cema_case(packed=False),
    "cema packed": lambda: cema_case(packed=True),
    "rowwise": rowwise_case,
    "timestep_norm": timestep_norm_case,
}


def main(capability):
    found = {}
    for name, case in CASES.items():
        function, arguments = case()
        try:
            with shared_memory_of(capability):
                usage = ptxas_usage(compile_for(blackwell_device(capability), function, *arguments))
        except ValueError as error:
            found[name] = str(error)
        else:
            found[name] = [list(kernel) for kernel in usage]
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
