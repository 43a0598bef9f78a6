"""`bench engine`: arrivals, latencies and capacity by their definitions, with a simulated clock."""

import json
import math
import types

import jax
import numpy as np
import pytest

from megalodon_jax.bench.engine import Capacity, ratio
from megalodon_jax.bench.load import (
    Arrival,
    Lengths,
    Percentiles,
    count_compilations,
    draw_arrivals,
    run_load,
)
from megalodon_jax.cli.main import main

LENGTHS = Lengths(prompt=(10, 1000), answer=(5, 7))


def test_arrivals_are_a_poisson_process_with_lengths_in_their_range():
    draw = {"rate": 50.0, "seconds": 40.0, "vocab_size": 99}
    arrivals = draw_arrivals(np.random.default_rng(0), LENGTHS, **draw)
    again = draw_arrivals(np.random.default_rng(0), LENGTHS, **draw)
    assert [arrival.seconds for arrival in arrivals] == [arrival.seconds for arrival in again]
    # 2,000 expected, with a standard deviation of 45.
    assert abs(len(arrivals) - 2000) < 180
    gaps = np.diff([0.0, *(arrival.seconds for arrival in arrivals)])
    assert gaps.min() > 0
    # Exponential gaps have a standard deviation as large as their mean.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)
    prompts = np.array([len(arrival.prompt) for arrival in arrivals])
    assert prompts.min() >= 10
    assert prompts.max() <= 1000
    # Log-uniform: half of the prompts are below the geometric mean of the ends.
    assert np.mean(prompts < 100) == pytest.approx(0.5, abs=0.05)
    assert {arrival.answer for arrival in arrivals} == {5, 6, 7}
    assert max(arrival.prompt.max() for arrival in arrivals) == 98


class FakeEngine:
    """Serves one request at a time: two tokens in every step of 0.1 s."""

    def __init__(self):
        self.now = 0.0
        self.queue = []
        self.cancelled = []

    @property
    def is_idle(self):
        return not self.queue

    @property
    def num_running(self):
        return min(1, len(self.queue))

    @property
    def num_waiting(self):
        return max(0, len(self.queue) - 1)

    def submit(self, request):
        stream = types.SimpleNamespace(tokens=[], is_finished=False, left=request.params.max_tokens)
        self.queue.append(stream)
        return stream

    def step(self):
        self.now += 0.1
        stream = self.queue[0]
        stream.tokens += [0] * min(2, stream.left)
        stream.left -= 2
        if stream.left <= 0:
            stream.is_finished = True
            del self.queue[0]

    def cancel(self, stream):
        self.cancelled.append(stream)
        self.queue.remove(stream)

    def run(self):
        assert not self.queue

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds


def run(arrivals, **options):
    engine = FakeEngine()
    result = run_load(engine, arrivals, clock=lambda: engine.now, sleep=engine.sleep, **options)
    return engine, result


def test_latencies_count_from_the_arrival():
    prompt = np.zeros(3, np.int32)
    arrivals = [Arrival(0.5, prompt, 4), Arrival(0.55, prompt, 6), Arrival(3.0, prompt, 1)]
    engine, result = run(arrivals, seconds=4.0, skip=0.0)
    assert not engine.cancelled
    assert (result.arrived, result.finished, result.tokens, result.offered) == (3, 3, 11, 11)
    # The first waits for nothing, the second for the first's two steps.
    waits = [0.1, 0.7 + 0.1 - 0.55, 0.1]
    assert result.first_token.p50 == pytest.approx(np.median(waits), abs=2e-3)
    # Four tokens in 0.1 s after the first read, six in 0.2 s; one token has no such time.
    times = [0.1 / 3, 0.2 / 5]
    assert result.per_token == pytest.approx(np.percentile(times, (50, 95)), abs=1e-6)
    assert result.between_reads == pytest.approx((0.1, 0.1))
    assert result.most_waiting == 1
    assert result.waiting == pytest.approx(0.1 / 4, abs=1e-3)
    # 0.2 s, 0.3 s and 0.1 s of 4 s; a request that comes into an idle engine runs at once.
    assert result.running == pytest.approx(0.6 / 4, abs=2e-3)
    assert result.tokens_per_second == pytest.approx(11 / 4)


def test_a_load_counts_after_its_first_part_and_cancels_what_is_left():
    prompt = np.zeros(3, np.int32)
    arrivals = [Arrival(0.01, prompt, 1000), Arrival(2.5, prompt, 10)]
    engine, result = run(arrivals, seconds=5.0, skip=0.4)
    # Two tokens in every 0.1 s of the last 3 s.
    assert result.seconds == pytest.approx(3.0, abs=0.11)
    assert result.tokens == pytest.approx(60, abs=3)
    assert (result.arrived, result.offered, result.finished) == (1, 10, 0)
    assert len(engine.cancelled) == 2
    assert math.isnan(result.first_token.p50)
    assert 0.7 < result.waiting <= 1


def test_capacity_is_prefill_and_a_share_of_the_steps():
    capacity = Capacity(0.010, 0.004, 8, prompt=1000, answer=40)
    assert capacity.seconds_per_request == pytest.approx(0.010 + 40 * 0.004 / 8)
    assert capacity.tokens_per_second == pytest.approx(40 / 0.030)
    prompt = np.zeros(1, np.int32)
    # 20 tokens a second are offered and given: less than the capacity, hence all that is possible.
    _, result = run([Arrival(0.1 * i, prompt, 2) for i in range(1, 40)], seconds=4.0, skip=0.0)
    assert ratio(result, capacity) == pytest.approx(1.0, abs=0.06)
    assert ratio(result, capacity._replace(prefill_seconds=3.98)) == pytest.approx(
        result.tokens_per_second / 10
    )


def test_percentiles():
    assert Percentiles.of([*range(101)]) == (50, 95)


def test_compilations_are_counted():
    def double(x):
        return x * 2.5

    function = jax.jit(double)
    one, two = np.ones(3, np.float32), np.ones(4, np.float32)
    with count_compilations() as first:
        function(one)
    with count_compilations() as again:
        function(one)
    with count_compilations() as other:
        function(two)
    function(np.ones(5, np.float32))
    assert (len(first), len(again), len(other)) == (1, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "20", "10"], "--prompt is 20 10; use two numbers, 1 <= first <= second"),
        (["--answer", "0", "10"], "--answer is 0 10"),
        (["--load", "0.5", "0"], "--load has 0.0; use numbers above 0"),
        (["--slots", "1"], "--slots is 1; use at least 2"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--preset", "transformer200M"], "'transformer200M' is a Transformer"),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys, arguments, message):
    assert main(["bench", "engine", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_load_from_the_command_line(tmp_path, capsys, smaller_model):
    file = tmp_path / "load.json"
    arguments = ["--small", "--slots", "2", "--prompt", "17", "60", "--answer", "4", "12"]
    arguments += ["--load", "0.05", "--seconds", "2", "--repeats", "2"]
    assert main(["bench", "engine", *arguments, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    capacity = report["capacity"]
    seconds = capacity["prefill_seconds"] + capacity["answer"] * capacity["step_seconds"] / 2
    assert capacity["tokens_per_second"] == pytest.approx(capacity["answer"] / seconds)
    (row,) = report["loads"]
    result = row["result"]
    assert result["compilations"] == 0
    assert result["finished"] > 0
    assert result["tokens"] == pytest.approx(result["offered"], rel=0.5)
    assert 0 < result["first_token"]["p50"] <= result["first_token"]["p95"]
    assert "alone: " in capsys.readouterr().out
