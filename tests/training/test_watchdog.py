"""The watchdog's limit and its exemptions; a process that hangs is in test_resilience."""

import time

import pytest

from megalodon_jax.training.watchdog import Watchdog


@pytest.fixture
def ended(monkeypatch) -> list[str]:
    """What the watchdog would have ended."""
    found: list[str] = []

    def end(self, seconds):
        found.append(self._activity)
        self._ended.set()

    monkeypatch.setattr(Watchdog, "_end_process", end)
    return found


def test_the_limit_is_twenty_median_steps(tmp_path):
    watchdog = Watchdog(300.0, tmp_path)
    assert watchdog.limit() == 300.0
    for seconds in (10.0, 20.0, 900.0):
        watchdog.step_took(seconds)
    assert watchdog.limit() == 400.0


def test_only_what_does_not_progress_is_ended(tmp_path, ended):
    with Watchdog(0.2, tmp_path) as watchdog:
        time.sleep(0.4)
        for _ in range(8):
            watchdog.beat("evaluation")
            time.sleep(0.05)
        with watchdog.exempt():
            time.sleep(0.4)
        assert ended == []
        watchdog.beat("saving step 3")
        time.sleep(0.4)
    assert ended == ["saving step 3"]


def test_zero_means_never(tmp_path, ended):
    with Watchdog(0.0, tmp_path) as watchdog:
        watchdog.beat("step 1")
        time.sleep(0.1)
    assert ended == []
