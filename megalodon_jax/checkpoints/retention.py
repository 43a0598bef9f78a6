"""Which checkpoints of a run are kept, and the held-out losses by which the best one is found."""

import json
import math
import sys
from collections.abc import Collection

from megalodon_jax.checkpoints.directory import Directory

_FILE = "heldout.json"


def steps_to_remove(
    steps: Collection[int],
    *,
    complete: Collection[int],
    confirmed: int,
    keep: int,
    keep_every: int = 0,
    best: int | None = None,
) -> list[int]:
    """Steps of the checkpoints that may be removed, in ascending order.

    Nothing is removed that is newer than `confirmed`, and nothing unless a complete checkpoint is
    confirmed, that is: its parameters gave a finite loss.

    Args:
      steps: steps of all checkpoints.
      complete: steps of those with a manifest.
      confirmed: the newest step whose parameters gave a finite loss.
      keep: number of newest confirmed checkpoints to keep.
      keep_every: keep every checkpoint whose step is a multiple; 0: none.
      best: step of the checkpoint with the lowest held-out loss.
    """
    old = sorted(step for step in steps if step <= confirmed)
    usable = [step for step in old if step in complete]
    if not usable:
        return []
    kept = {*old[-keep:], *usable[-1:], best}
    return [
        step for step in old if step not in kept and not (keep_every and step % keep_every == 0)
    ]


class HeldoutLosses:
    """Held-out losses by step, in a file beside the checkpoints, so that they survive a resume."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._losses: dict[int, float] = {}
        if _FILE not in directory.names():
            return
        try:
            content = json.loads(directory.read(_FILE))
            self._losses = {int(step): float(loss) for step, loss in content.items()}
        except (ValueError, TypeError, AttributeError, OSError) as error:
            print(
                f"held-out losses in {directory}/{_FILE} cannot be read ({error}): the best "
                "checkpoint is chosen from now on",
                file=sys.stderr,
            )

    def best(self, steps: Collection[int]) -> int | None:
        """The step with the lowest loss among `steps`; the earliest of equal ones."""
        known = sorted(step for step in steps if step in self._losses)
        return min(known, key=self._losses.__getitem__, default=None)

    def add(self, step: int, loss: float, *, steps: Collection[int]) -> None:
        """Adds a loss and forgets those of steps that have no checkpoint and will get none.

        Args:
          step: number of updates of the evaluated parameters.
          loss: nats per token; ignored if it is not finite.
          steps: steps of all checkpoints.
        """
        if math.isfinite(loss):
            # The checkpoint of a step behind the newest one may still be written.
            newest = max(steps, default=-1)
            kept = {at: value for at, value in self._losses.items() if at in steps or at > newest}
            self._losses = {**kept, step: loss}
            self._directory.write(_FILE, json.dumps(self._losses).encode())

    def forget_after(self, step: int) -> None:
        """Forgets the losses of later steps, which a resumed run computes again."""
        self._losses = {known: loss for known, loss in self._losses.items() if known <= step}
