"""Sessions and the prefix cache: states go on bit for bit, also in another process."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from safetensors.numpy import load_file, save_file

from megalodon_jax.errors import SessionError
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.prefill import Piece
from megalodon_jax.inference.requests import Request
from megalodon_jax.inference.sampling import SamplingParams
from megalodon_jax.inference.sessions import Session
from tests.inference.models import CHUNK, CONFIG, greedy, random_prompt, small_model
from tests.model.conftest import perturbed

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
GREEDY = SamplingParams(temperature=0.0, max_tokens=CHUNK + 5)
SAMPLED = SamplingParams(temperature=0.9, seed=3, max_tokens=CHUNK + 5)
FIRST, SECOND = random_prompt(CHUNK + 6, 1), random_prompt(7, 2)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(small_model(), slots=4)


def run(engine: Engine, prompt, params=GREEDY, **options) -> Any:
    stream = engine.submit(Request(prompt=prompt, params=params, **options))
    engine.run()
    return stream


def test_a_session_goes_on_where_it_ended(engine):
    first = run(engine, FIRST, keep_session=True)
    assert first.session.num_tokens == len(FIRST) + len(first.tokens)
    assert first.session.pending == (first.tokens[-1],)
    second = run(engine, SECOND, session=first.session)
    everything = [*FIRST, *first.tokens, *SECOND]
    assert second.tokens == greedy(everything, GREEDY.max_tokens)


def test_forks_do_not_disturb_each_other(engine):
    session = run(engine, FIRST, keep_session=True).session
    forks = [
        engine.submit(Request(prompt=random_prompt(5, seed), params=GREEDY, session=session))
        for seed in range(3)
    ]
    engine.run()
    for seed, fork in enumerate(forks):
        alone = run(engine, random_prompt(5, seed), session=session)
        assert fork.tokens == alone.tokens


def test_an_empty_prompt_continues_the_session(engine):
    session = run(engine, FIRST, keep_session=True).session
    more = run(engine, (), session=session)
    whole = greedy(FIRST, 2 * GREEDY.max_tokens)
    assert more.tokens == whole[GREEDY.max_tokens :]


def test_a_session_at_a_chunk_border_holds_no_keys_and_values(engine):
    params = dataclasses.replace(GREEDY, max_tokens=3)
    # The last token is pending: 2 * CHUNK tokens have been through the model.
    at_border = run(engine, random_prompt(2 * CHUNK - 2), params, keep_session=True).session
    inside = run(engine, random_prompt(2 * CHUNK + 5), params, keep_session=True).session
    assert at_border.cache.layers[0].keys_and_values.key.size == 0
    assert inside.cache.layers[0].keys_and_values.key.shape[2] == 7
    states = CONFIG.num_layers * (2 * CONFIG.cema_ndim * CONFIG.model_dim * 4)
    moments = (CONFIG.num_layers + 1) * (2 * CONFIG.norm_num_groups * 4 + 4)
    assert at_border.num_bytes == states + moments + 8


PROCESS = """
import sys
import numpy as np
from megalodon_jax.inference.engine import Engine
from megalodon_jax.inference.requests import Request
from tests.inference.models import small_model
from tests.inference.test_sessions import SAMPLED, SECOND

engine = Engine(small_model(), slots=4)
session = engine.load_session(sys.argv[1])
stream = engine.submit(Request(prompt=SECOND, params=SAMPLED, session=session, keep_session=True))
engine.run()
stream.session.save(sys.argv[2])
print("TOKENS", stream.tokens)
"""


def test_another_process_continues_bit_for_bit(engine, tmp_path):
    session = run(engine, FIRST, SAMPLED, keep_session=True).session
    session.save(tmp_path / "session")
    here = run(engine, SECOND, SAMPLED, session=session, keep_session=True)
    here.session.save(tmp_path / "here")
    command = [sys.executable, "-c", PROCESS, tmp_path / "session", tmp_path / "there"]
    # The tests' settings of XLA are in the environment.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"TOKENS {here.tokens}" in done.stdout, done.stderr
    ours, theirs = (load_file(tmp_path / name) for name in ("here", "there"))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


def test_a_loaded_session_equals_the_saved_one(engine, tmp_path):
    session = run(engine, FIRST, keep_session=True).session
    session.save(tmp_path / "session")
    loaded = engine.load_session(tmp_path / "session")
    assert (loaded.pending, loaded.fingerprint) == (session.pending, session.fingerprint)
    assert run(engine, SECOND, session=loaded).tokens == run(engine, SECOND, session=session).tokens
    assert [path.name for path in tmp_path.iterdir()] == ["session"]


def test_damaged_and_foreign_sessions_are_refused(engine, tmp_path):
    path = tmp_path / "session"
    session = run(engine, FIRST, keep_session=True).session
    session.save(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(60):
        damaged = bytearray(content)
        if trial % 3 == 0:
            damaged = damaged[: int(rng.integers(0, len(content)))]
        else:
            damaged[int(rng.integers(0, len(content)))] ^= 1 << int(rng.integers(0, 8))
        path.write_bytes(damaged)
        with pytest.raises(SessionError):
            engine.load_session(path)
    with pytest.raises(SessionError, match="cannot be read"):
        engine.load_session(tmp_path / "missing")
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(SessionError, match="damaged, or no session"):
        engine.load_session(path)
    other = Engine(perturbed(CONFIG, seed=5), slots=2)
    session.save(path)
    with pytest.raises(SessionError, match="another model or of other weights"):
        other.load_session(path)
    with pytest.raises(SessionError, match="another model or to other weights"):
        other.submit(Request(prompt=(1,), session=session))
    metadata = json.dumps({"__metadata__": {"format": "1"}}).encode()
    path.write_bytes(len(metadata).to_bytes(8, "little") + metadata)
    with pytest.raises(SessionError, match="damaged"):
        engine.load_session(path)
    assert isinstance(session, Session)


# ---- The prefix cache.


@pytest.fixture
def pieces(monkeypatch) -> list[Piece]:
    """Pieces of prefill that run."""
    from megalodon_jax.inference import prefill_job as module

    found: list[Piece] = []
    prefill_piece = module.prefill_piece
    monkeypatch.setattr(
        module, "prefill_piece", lambda *args: found.append(args[-1]) or prefill_piece(*args)
    )
    return found


@pytest.fixture(scope="module")
def prefix_engine() -> Engine:
    return Engine(small_model(), slots=2, prefix_cache_bytes=1 << 20)


def test_a_prefix_hit_gives_the_same_tokens(pieces, prefix_engine):
    shared = random_prompt(2 * CHUNK, 9)
    prompts = [np.concatenate([shared, random_prompt(6, seed)]) for seed in (1, 2)]
    cold = run(prefix_engine, prompts[0])
    assert [piece.count for piece in pieces] == [CHUNK, CHUNK, 6]
    pieces.clear()
    # The last tokens, at most a chunk, go through the kernels of decoding.
    for prompt in (prompts[1], prompts[0], np.append(shared, 7)):
        hit = run(prefix_engine, prompt)
        assert hit.tokens == greedy(prompt, GREEDY.max_tokens)
        if prompt is prompts[0]:
            assert hit.tokens == cold.tokens
    assert not pieces
    # The last token of a prompt always goes through the model, and a new prefix through prefill.
    for prompt in (shared, np.concatenate([shared, random_prompt(CHUNK + 3, 3)])):
        assert run(prefix_engine, prompt).tokens == greedy(prompt, GREEDY.max_tokens)
    assert [piece.count for piece in pieces] == [CHUNK, CHUNK, 3]
    pieces.clear()
    run(prefix_engine, np.concatenate([shared[1:], shared[:3]]))
    assert sum(piece.count for piece in pieces) == 2 * CHUNK + 2


def test_a_known_prompt_has_its_own_random_numbers_and_session(pieces, prefix_engine):
    prompt = np.concatenate([random_prompt(CHUNK, 4), random_prompt(5, 5)])
    options: dict[str, Any] = {"params": SAMPLED, "keep_session": True}
    cold = run(prefix_engine, prompt, **options)
    pieces.clear()
    hit = run(prefix_engine, prompt, **options)
    assert not pieces
    assert hit.tokens == cold.tokens
    after = [run(prefix_engine, SECOND, session=stream.session).tokens for stream in (cold, hit)]
    assert after[0] == after[1]
    pieces.clear()
    # Samples of one prompt share a prefill; scores of a prompt need all of its tokens.
    samples = prefix_engine.submit_samples(Request(prompt=prompt, params=SAMPLED), 2)
    prefix_engine.run()
    assert samples[0].tokens == cold.tokens
    assert [piece.count for piece in pieces] == [5]


def test_a_known_prompt_starts_in_a_slot_that_held_nan(pieces, prefix_engine):
    prompt = np.concatenate([random_prompt(CHUNK, 6), random_prompt(5, 7)])
    clean = run(prefix_engine, prompt).tokens
    state = prefix_engine._state
    cache = jax.tree.map(
        lambda leaf: leaf * jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        state.cache,
    )
    prefix_engine._state = state._replace(cache=cache)
    pieces.clear()
    assert run(prefix_engine, prompt).tokens == clean
    assert not pieces


def test_the_least_recently_used_states_leave():
    engine: Any = Engine(small_model(), slots=2, prefix_cache_bytes=1 << 20)
    run(engine, random_prompt(CHUNK, 0))
    size = engine._prefiller.prefixes.num_bytes
    assert len(engine._prefiller.prefixes) == 1
    engine: Any = Engine(small_model(), slots=2, prefix_cache_bytes=2 * size)
    for seed in (0, 1, 0, 2):
        run(engine, np.concatenate([random_prompt(CHUNK, seed), [1, 2]]))
    assert len(engine._prefiller.prefixes) == 2
    assert engine._prefiller.prefixes.num_bytes == 2 * size
    empty = small_model().init_cache(1)
    found = [
        engine._prefiller.prefixes.get(np.append(random_prompt(CHUNK, seed), 1), empty)[0]
        for seed in range(3)
    ]
    assert found == [CHUNK, 0, CHUNK]
