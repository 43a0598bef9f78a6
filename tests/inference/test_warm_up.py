"""Programs compiled side by side: none twice, none missing."""

import threading
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from megalodon_jax.bench.load import count_compilations
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.sampling import Features
from megalodon_jax.inference.speculation import SpeculationSettings
from megalodon_jax.inference.warm_up import Program, SlotProgram, compile_programs
from tests.inference.models import small_model


@partial(jax.jit, static_argnums=1, donate_argnums=0)
def power(x: jax.Array, count: int) -> jax.Array:
    for _ in range(count):
        x = jnp.sin(x) @ x
    return x


def test_calls_find_the_compiled_programs_and_nothing_is_donated():
    x = jax.block_until_ready(jnp.full((8, 8), 0.5))
    numbers = []
    with count_compilations() as compilations:
        compile_programs((Program(power, (x, count)) for count in (2, 3)), numbers.append)
        assert len(compilations) == 2
        assert sorted(numbers) == [1, 2]
        result = jax.block_until_ready(power(x, 3))
        assert len(compilations) == 2
    assert x.is_deleted()
    assert result.shape == (8, 8)


def test_programs_are_compiled_at_the_same_time(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    # Each waits until the other is being compiled.
    barrier = threading.Barrier(2, timeout=60)

    class Function:
        def lower(self, argument):
            assert argument == "argument"
            return self

        def compile(self):
            barrier.wait()

    compile_programs([Program(Function(), ("argument",))] * 2)


def test_the_compilers_error_reaches_the_caller():
    class Function:
        def lower(self):
            return self

        def compile(self):
            raise RuntimeError("no memory left")

    with pytest.raises(RuntimeError, match="no memory left"):
        compile_programs([Program(Function(), ())])


def test_an_interruption_starts_no_further_compilation(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    may_end, compiled = threading.Event(), []

    class Function:
        def lower(self, name):
            if name == "interrupted":
                threading.Timer(0.2, may_end.set).start()
                raise KeyboardInterrupt
            self.name = name
            return self

        def compile(self):
            may_end.wait(60)
            compiled.append(self.name)

    with pytest.raises(KeyboardInterrupt):
        compile_programs(Program(Function(), (name,)) for name in ("one", "two", "interrupted"))
    assert compiled == ["one"]


@pytest.mark.slow
def test_an_engine_compiles_each_of_its_programs_once(monkeypatch):
    engine = Engine(
        small_model(), slots=2, prefill_rows=2, prefix_cache_bytes=1 << 20,
        speculation=SpeculationSettings(),
    )  # fmt: skip
    numbers = {}

    def compile_and_count(programs, on_compiled):
        programs = list(programs)
        with count_compilations() as before:
            compile_programs(programs, on_compiled)
        numbers["programs"], numbers["compiled"] = len(programs), len(before)

    run = SlotProgram.run

    def run_without_compilation(self, slots):
        with count_compilations() as compilations:
            slots = run(self, slots)
        assert not compilations
        return slots

    monkeypatch.setattr("megalodon_jax.inference.engine.compile_programs", compile_and_count)
    monkeypatch.setattr(SlotProgram, "run", run_without_compilation)
    jax.clear_caches()
    engine.warm_up([Features(), Features(random=True)])
    assert numbers["programs"] == numbers["compiled"]
