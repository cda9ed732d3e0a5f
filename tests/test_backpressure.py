"""A burst of more requests than the server takes: what it accepts it finishes, the rest it refuses at once."""

import asyncio
import collections
import pathlib
from typing import Any

import aiohttp

from tests.serving import Server

BURST = 2000
MAX_QUEUE = 300


async def _burst(server: Server, count: int, max_tokens: int) -> list[tuple[int, dict[str, Any], str | None]]:
    """Status, document and Retry-After of `count` requests sent at once."""

    async def one(session: aiohttp.ClientSession, number: int) -> tuple[int, dict[str, Any], str | None]:
        prompt = [number % 200, number // 200, 7]
        body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "return_token_ids": True}
        async with session.post(f"{server.url}/v1/completions", json=body) as response:
            return response.status, await response.json(), response.headers.get("Retry-After")

    timeout = aiohttp.ClientTimeout(total=100)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        return await asyncio.gather(*(one(session, number) for number in range(count)))


def _assert_empty(server: Server) -> None:
    metrics = server.metrics()
    assert metrics["nmoe:num_requests_running"] == metrics["nmoe:num_requests_waiting"] == 0
    assert metrics["nmoe:kv_cache_usage_perc"] == 0


async def test_a_full_queue_refuses_and_loses_nothing(checkpoint: pathlib.Path) -> None:
    with Server({"model": {"path": str(checkpoint)}, "server": {"port": 0, "max_queue": MAX_QUEUE}}) as server:
        answers = await _burst(server, BURST, max_tokens=4)
        statuses = collections.Counter(status for status, _, _ in answers)
        assert set(statuses) == {200, 429}
        assert statuses[200] >= MAX_QUEUE
        for number, (status, document, retry_after) in enumerate(answers):
            if status == 429:
                assert int(retry_after or 0) >= 1
                assert str(MAX_QUEUE) in document["error"]["message"]
            else:
                (choice,) = document["choices"]
                assert choice["prompt_token_ids"] == [number % 200, number // 200, 7]
                assert len(choice["token_ids"]) == 4
        ended = server.metrics()['nmoe:request_success_total{finished_reason="length"}']
        assert ended == statuses[200]
        _assert_empty(server)


async def test_a_request_that_takes_too_long_ends_with_an_error(checkpoint: pathlib.Path) -> None:
    with Server(
        {
            "model": {"path": str(checkpoint)},
            "engine": {"max_batch_size": 2},
            "server": {"port": 0, "request_timeout_s": 2.0},  # the first have an answer by then, on a busy machine too
        }
    ) as server:
        answers = await _burst(server, 100, max_tokens=100)
        statuses = collections.Counter(status for status, _, _ in answers)
        assert set(statuses) == {200, 504}, statuses
        assert all("2 s" in document["error"]["message"] for status, document, _ in answers if status == 504)
        await asyncio.sleep(0.2)  # the last aborts reach the scheduler
        _assert_empty(server)
