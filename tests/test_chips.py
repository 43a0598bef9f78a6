"""Chips are found under all of JAX's names for them."""

import pytest

from megalodon_jax.chips import CHIPS, device_kind_of, find_chip, require_chip
from megalodon_jax.errors import ConfigError
from pallas_kernels.common.devices import TPU_VMEM


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6e", "v6e"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
    ],
)
def test_names_of_devices(device_kind, name):
    assert require_chip(device_kind).name == name
    assert find_chip(device_kind_of(name)) == require_chip(device_kind)


def test_every_tpu_that_kernels_know_has_a_data_sheet():
    assert set(TPU_VMEM) <= set(CHIPS)
    assert len({chip.name for chip in CHIPS.values()}) == len(CHIPS)


def test_unknown_chips():
    assert find_chip("cpu") is None
    with pytest.raises(ConfigError, match="no data sheet for 'cpu'; there are: TPU v4"):
        require_chip("cpu")
    with pytest.raises(ConfigError, match="no chip 'v9'; there are: v4"):
        device_kind_of("v9")
