"""Checks of sampling parameters, and the features that they need."""

import dataclasses
import pickle

import pytest

from megalodon_jax.inference.sampling import Features, SamplingParams, sampling_row


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": 1e-40},
        {"temperature": "1"}, {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0.0}, {"top_p": 1.1},
        {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"presence_penalty": 2.5},
        {"frequency_penalty": float("inf")}, {"seed": -1}, {"seed": 2**64}, {"logprobs": 21},
        {"max_tokens": 0}, {"stop": ("",)}, {"stop_ids": (-1,)}, {"logit_bias": {-3: 1.0}},
        {"logit_bias": {3: float("nan")}}, {"top_k": True},
    ],
    ids=str,
)  # fmt: skip
def test_parameters_out_of_range_are_rejected(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SamplingParams(**wrong)


def test_an_error_has_all_faults():
    with pytest.raises(ValueError, match=r"top_p is 2\.0.*min_p is -1.*stop has ''"):
        SamplingParams(top_p=2.0, min_p=-1, stop=("a", ""))


def test_a_single_stop_text_or_id_is_one_element():
    params = SamplingParams(stop="END", stop_ids=7)  # type: ignore[arg-type]
    assert (params.stop, params.stop_ids) == (("END",), (7,))


def test_ids_outside_the_tokenizer_are_rejected_for_a_row():
    for params in (SamplingParams(logit_bias={250: 1.0}), SamplingParams(stop_ids=(3, 250))):
        with pytest.raises(ValueError, match="token 250; use ids below 250"):
            sampling_row(params, vocab_size=257, num_tokens=250, seed=0)
    with pytest.raises(ValueError, match="prompt has token 257"):
        sampling_row(SamplingParams(), vocab_size=257, prompt=[3, 257], seed=0)
    with pytest.raises(ValueError, match="num_tokens is 300"):
        sampling_row(SamplingParams(), vocab_size=257, num_tokens=300, seed=0)


def test_sampling_needs_a_seed_and_prefers_the_requests_own():
    with pytest.raises(ValueError, match="needs a seed"):
        sampling_row(SamplingParams(), vocab_size=5)
    sampling_row(SamplingParams(temperature=0.0), vocab_size=5)
    row = sampling_row(SamplingParams(seed=2**33 + 5), vocab_size=5, seed=1)
    assert row.seed.tolist() == [2, 5]


def test_features_are_what_a_request_needs():
    assert Features.of(SamplingParams(temperature=0.0, top_k=5, top_p=0.5)) == Features()
    params = SamplingParams(top_p=0.5, frequency_penalty=0.1, logprobs=0)
    needed = Features.of(params)
    assert needed == Features(random=True, top_p=True, penalties=True, logprobs=0)
    both = needed.union(Features(min_p=True, logprobs=4))
    assert both == Features(random=True, top_p=True, min_p=True, penalties=True, logprobs=4)
    assert both.covers(needed)
    assert not needed.covers(both)
    assert not Features(random=True).covers(Features(logprobs=0))


def test_parameters_can_be_pickled_and_copied():
    bias = {3: 1.5}
    params = SamplingParams(logit_bias=bias, stop=("a",), seed=3)
    bias[3] = 9.0
    assert params.logit_bias == {3: 1.5}
    assert pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.asdict(params)["logit_bias"] == {3: 1.5}
