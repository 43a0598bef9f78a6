"""CEMA's forward and backward pass fit in a few times the input."""

import pytest

from megalodon_jax.bench.cema_memory import Shape, compile_gradient, compiled_memory


@pytest.mark.slow
def test_gradient_needs_at_most_eight_times_the_input():
    shape = Shape(1, 16_384, 512, 16, "float32", packed=False)
    use = compiled_memory(compile_gradient(shape), shape)
    assert use.input == 16_384 * 512 * 4
    # The floor: x, the cotangent and dx; the compiler's account cannot be below it.
    assert use.multiple >= 3
    assert use.multiple <= 8, use
