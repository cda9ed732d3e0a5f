"""Generation through the frontend against a scripted scheduler: prompts, answers, streams, stop strings, leaving clients."""

import asyncio

import pytest
import pytest_asyncio

from nmoe.messages import Abort, Finish, Rejected, Serving, Submit
from tests.scripted import BOS, EOS, MAX_SEQ_LEN, Rig, events, ids_of, ints, run, write_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest_asyncio.fixture(scope="module")
async def rig(tmp_path_factory):
    async with Rig(write_model(tmp_path_factory.mktemp("model"))) as running:
        yield running


async def answer(rig, path, output, reason="length", **body):
    """The JSON of a request that the scheduler answers with `output`, and its Submit."""
    asked = run(rig.ask(path, **body))
    submit = await rig.next(Submit)
    await rig.tokens(submit, output, reason)
    status, _, document = await asked
    assert status == 200, document
    return document, submit


async def stream(rig, path, pieces, reason="length", **body):
    """The events of a streaming request whose tokens come in `pieces`, and its Submit."""

    async def read():
        async with rig.post(path, stream=True, **body) as response:
            return await events(response)

    reading = run(read())
    submit = await rig.next(Submit)
    for piece in pieces:
        await rig.tokens(submit, piece)
        await asyncio.sleep(0.002)
    await rig.tokens(submit, "", reason)
    return await reading, submit


async def test_completion(rig):
    document, submit = await answer(rig, COMPLETIONS, "héllo", prompt="hi", max_tokens=6, model="tiny")
    assert ints(submit.prompt) == [BOS, *ids_of("hi")]
    assert document["object"] == "text_completion" and document["model"] == "tiny"
    assert document["id"] == f"cmpl-{submit.uid:x}"
    assert document["choices"] == [{"index": 0, "text": "héllo", "logprobs": None, "finish_reason": "length"}]
    assert document["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 6,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
