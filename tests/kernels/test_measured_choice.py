"""Choices that were measured on the user's device: when they apply, and how they go away."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import rowwise
from pallas_kernels.cema import CemaParams
from pallas_kernels.cema import api as cema_api
from pallas_kernels.chunk_attention import api as attention_api
from pallas_kernels.common import measured_choice
from pallas_kernels.common.measured_choice import (
    MeasuredChoice,
    choices_file,
    find_measured,
    read_choices,
    reset_choices,
    write_choices,
)
from pallas_kernels.common.target import Target, find_target
from pallas_kernels.rowwise import api as rowwise_api
from pallas_kernels.timestep_norm import api as norm_api

A100 = Target("gpu", "NVIDIA A100-SXM4-80GB")
BF16 = jnp.bfloat16
shape = jax.ShapeDtypeStruct


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for module in (measured_choice, cema_api, norm_api, attention_api, rowwise_api):
        monkeypatch.setattr(module, "find_target", lambda: A100)
    monkeypatch.setattr(measured_choice.triton, "is_installed", lambda: True)


def measured(operation, width, implementation, tokens=16_384):
    write_choices(A100.kind, [MeasuredChoice(operation, "bfloat16", width, tokens, implementation)])


def cema_params(channels):
    shapes = (channels, 4), (channels, 4), (channels,), (channels, 4, 2), (channels,)
    return CemaParams(*(shape(each, jnp.float32) for each in shapes))


def chosen():
    """What every operation chooses for 16,384 tokens of 1,024 channels."""
    x = shape((8, 2048, 1024), BF16)
    v = shape((8, 2048, 1, 1024), BF16)
    return (
        cema_api._choose_implementation(x, cema_params(1024)),
        norm_api._choose_implementation(x, 32),
        rowwise_api._choose_implementation("rms_norm", (x,), (None,)),
        attention_api._choose_implementation(v, v, 2048, None),
    )


def test_nothing_changes_without_a_file():
    assert chosen() == ("xla",) * 4
    assert not choices_file().exists()


def test_measured_implementations_become_the_default():
    for operation in ("cema", "timestep_norm", "rms_norm"):
        measured(operation, 1024, "triton")
    measured("chunk_attention", 1024, "xla")
    assert chosen() == ("triton", "triton", "triton", "xla")
    measured("cema", 1024, "xla")
    assert chosen()[0] == "xla"
    assert len(read_choices(A100.kind)) == 4


def test_a_choice_holds_for_its_width_dtype_device_and_large_calls():
    measured("cema", 1024, "triton")

    def found(rows, width=1024, dtype=BF16):
        return find_measured("cema", shape((rows, 1024, width), dtype), tokens=rows * 1024)

    assert found(4) == found(64) == "triton"
    assert found(3) is None
    assert found(16, width=512) is None
    assert found(16, dtype=jnp.float32) is None
    assert not read_choices("NVIDIA L4")


def test_kernels_that_attention_would_not_choose_are_not_forced(monkeypatch):
    hopper = Target("gpu", "NVIDIA H200")
    for module in (measured_choice, attention_api):
        monkeypatch.setattr(module, "find_target", lambda: hopper)
    q, v = shape((8, 2048, 1, 256), BF16), shape((8, 2048, 1, 1024), BF16)
    assert attention_api._choose_implementation(q, v, 2048, None) == "mosaic_gpu"
    choice = MeasuredChoice("chunk_attention", "bfloat16", 1024, 16_384, "xla")
    write_choices(hopper.kind, [choice])
    assert attention_api._choose_implementation(q, v, 2048, None) == "xla"


def test_triton_is_not_chosen_after_it_was_uninstalled(monkeypatch):
    measured("cema", 1024, "triton")
    monkeypatch.setattr(measured_choice.triton, "is_installed", lambda: False)
    assert chosen()[0] == "xla"


def test_reset_and_a_broken_file():
    measured("cema", 1024, "triton")
    assert reset_choices()
    assert chosen()[0] == "xla"
    assert not reset_choices()
    choices_file().write_text("[1]")
    with pytest.raises(ValueError, match="megalodon tune --reset"):
        chosen()


def test_a_named_implementation_ignores_the_measurement(monkeypatch):
    cpu = find_target()
    for module in (measured_choice, rowwise_api):
        monkeypatch.setattr(module, "find_target", lambda: Target("cpu", cpu.kind))
    # A choice that cannot run here: only a call without a name follows it.
    write_choices(cpu.kind, [MeasuredChoice("rms_norm", "bfloat16", 128, 2, "mosaic_gpu")])
    options = {"eps": 1e-5, "dtype": BF16}
    x = jnp.ones((2, 128), BF16)
    rowwise.rms_norm(x, None, **options, implementation="xla")
    if cpu.platform == "cpu":
        with pytest.raises(ValueError, match="needs an NVIDIA Hopper"):
            rowwise.rms_norm(x, None, **options)
