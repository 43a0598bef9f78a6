"""Many clients at the same time: nothing is lost or mixed up."""

import asyncio

import openai
import pytest

from megalodon_jax.data import ByteTokenizer
from megalodon_jax.generate import text_request
from megalodon_jax.inference.sampling_params import SamplingParams
from tests.serve.conftest import MODEL, make_test_engine, running, settings

CLIENTS = 200


def fields(index: int) -> dict:
    return {"prompt": f"{index:03}", "max_tokens": 4 + index % 9, "seed": index}


async def ask(client: openai.AsyncOpenAI, index: int) -> str:
    if index % 2:
        answer = await client.completions.create(model=MODEL, **fields(index))
        return answer.choices[0].text
    stream = await client.completions.create(model=MODEL, **fields(index), stream=True)
    return "".join([chunk.choices[0].text async for chunk in stream])


@pytest.mark.slow
def test_200_clients_get_their_own_answers(tiny_model, direct):
    async def ask_all(address: str) -> list[str]:
        client = openai.AsyncOpenAI(
            base_url=f"{address}/v1", api_key="-", max_retries=0, timeout=300.0
        )
        async with client:
            return await asyncio.gather(*(ask(client, index) for index in range(CLIENTS)))

    with running(make_test_engine(tiny_model), settings()) as server:
        answers = asyncio.run(ask_all(server.address))
        assert server.thread.num_running == server.thread.num_waiting == 0
    expected = []
    for index in range(CLIENTS):
        given = fields(index)
        params = SamplingParams(max_tokens=given["max_tokens"], seed=given["seed"])
        expected.append(direct.submit(text_request(ByteTokenizer(), given["prompt"], params)))
    direct.run()
    assert answers == [stream.text for stream in expected]
