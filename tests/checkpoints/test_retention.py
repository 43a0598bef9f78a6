"""Which checkpoints are deleted, and when: never before a later finite loss."""

import math

import pytest

from megalodon_jax.checkpoints.directory import LocalDirectory
from megalodon_jax.checkpoints.retention import HeldoutLosses, steps_to_remove


@pytest.mark.parametrize(
    ("steps", "confirmed", "settings", "removed"),
    [
        # Saved, but no later loss has been seen: both stay.
        ([3, 6], 5, {}, []),
        ([3, 6], 6, {}, [3]),
        ([3, 6, 9, 12], 12, {"keep": 2}, [3, 6]),
        ([3, 6, 9, 12], 11, {"keep": 2}, [3]),
        ([3, 6, 9, 12], 12, {"keep_every": 6}, [3, 9]),
        ([3, 6, 9, 12], 12, {"best": 3}, [6, 9]),
        ([3, 6, 9, 12], 100, {"best": 12}, [3, 6, 9]),
        ([], 5, {}, []),
        # An incomplete one replaces nothing; an old one without manifest is deleted as any other.
        ([3, 6], 6, {"complete": [3]}, []),
        ([3, 6], 6, {"complete": []}, []),
        ([3, 6, 9], 9, {"complete": [9]}, [3, 6]),
    ],
)
def test_steps_to_remove(steps, confirmed, settings, removed):
    settings = {"complete": steps, "keep": 1, **settings}
    assert steps_to_remove(steps, confirmed=confirmed, **settings) == removed


def test_one_complete_checkpoint_always_remains():
    for confirmed in range(12):
        for complete in ([2], [2, 8], [8], [5, 8]):
            removed = steps_to_remove([2, 5, 8], complete=complete, confirmed=confirmed, keep=1)
            assert {*complete} - {*removed}, (confirmed, complete)


def test_heldout_losses_survive_and_ignore_steps_without_checkpoint(tmp_path):
    directory = LocalDirectory(tmp_path)
    losses = HeldoutLosses(directory)
    assert losses.best([3]) is None
    for step, loss in ((3, 2.0), (6, 1.5), (9, math.nan), (12, 1.7)):
        losses.add(step, loss, steps=[3, 6, 9])
    for read in (losses, HeldoutLosses(directory)):
        assert read.best([3, 6, 9, 12]) == 6
        assert read.best([3, 9, 12]) == 12
    # The checkpoint of step 6 is gone: its loss is forgotten with the next one.
    losses.add(15, 1.9, steps=[3, 12])
    assert HeldoutLosses(directory).best([3, 6, 12, 15]) == 12
    # Step 15 is still being written at the next evaluation.
    losses.add(18, 1.8, steps=[3, 12])
    assert losses.best([15, 18]) == 18
    assert losses.best([15]) == 15
    losses.forget_after(12)
    assert losses.best([15]) is None


def test_a_damaged_file_of_losses_is_told(tmp_path, capsys):
    (tmp_path / "heldout.json").write_text("[1")
    assert HeldoutLosses(LocalDirectory(tmp_path)).best([3]) is None
    assert "heldout.json cannot be read" in capsys.readouterr().err
