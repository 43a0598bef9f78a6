"""Cycles of kernels, from the schedules that the TPU compiler dumps."""

import pytest

from megalodon_jax.bench.tpu_decode_estimates import estimate_decode
from megalodon_jax.bench.tpu_estimates import Loop, read_schedule
from megalodon_jax.chips import require_chip
from megalodon_jax.config import ModelConfig
from tests.topologies import tpu_device

# Two bundles of the grid's loop, a loop of 5 + 4 bundles that runs 32 / 4 times, the grid's end.
SCHEDULE = """
     0   :  { %1 = vsyncpa [#allocation9], 0 }
  0x18 LB: > { %s2 = sphi %s1, %s9 }
  0x19   : > { %s3 = smov 0 }
  0x1a LB: >> { %s10_s1 = sphi %s3, %s11_s1 }
  0x1b   : >> { %s11_s1 = sadd.s32 4, %s10_s1 }
  0x1c   : >> { %p5 = scmp.ge.s32.totalorder %s11_s1, 32 /* loop exit test */ }
  0x1d   :  {}
  0x1e   : >> { %12 = sbr.rel (!%p5) target = $region4 }
  0x1f   : >> { }
  0x20   : >> { }
  0x21   : >> { }
  0x22   : >> { %v7 = vadd.f32 %v6, %v5 }
  0x23   : > { %s9_s2 = sadd.s32 1, %s2 }
  0x24   : > { %p8 = scmp.ge.s32.totalorder %s9_s2, 18 /* loop exit test */ }
  0x25   : > { %13 = sbr.rel (!%p8) target = $region1 }
"""


def test_loops_count_with_their_trips():
    schedule = read_schedule(SCHEDULE)
    assert schedule.loops == (Loop(bundles=9, trips=8),)
    assert schedule.cycles(first=0, last=0) == (schedule.straight + 72, 0)
    assert schedule.cycles(first=1, last=0) == (schedule.straight, 72)


@pytest.mark.slow
def test_decoding_is_estimated_beside_its_bytes():
    """mega200M on a v5e: a slot has 4,608 bytes, a block 256 slots, 1,152 slots are filled."""
    device = tpu_device("v5e:1x1")
    sheet = require_chip(device.device_kind)
    assert sheet.clock_hz is not None
    config = ModelConfig.from_preset("mega200M", dtype="bfloat16")
    slot = 8 * 4608 / sheet.memory_bytes_per_second * 1e6
    # Five blocks of a row: their bytes take longer than a cycle each, a million cycles than them.
    for cycles, expected in ((1, 1280 * slot), (10**6, 8 * 5 * 1e12 / sheet.clock_hz)):
        found = estimate_decode(
            device, sheet, config, rows=8, kv="model", count_step_cycles=lambda _, n=cycles: n
        )
        assert found.filled == pytest.approx(1152 * slot)
        assert found.all_slots == pytest.approx(2048 * slot)
        assert found.kernel == pytest.approx(expected)
        assert 0 < found.around < found.all_slots < found.xla
