"""The decode workload through a whole server, `nmoe serve`: a streaming completion per request, an event per token (the
first event of a stream has those that came before the response's head was sent)."""

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson

from nmoe.config import Config

_READY = "nmoe ready on "


@contextlib.contextmanager
def serving(config_path: str) -> Iterator[tuple[str, float]]:
    """Run a server, stopped at the end; yields its address and the seconds it took to be ready."""
    started = time.monotonic()
    command = [sys.executable, "-m", "nmoe", "serve", "--config", config_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            ready = next((line for line in server.stdout if line.startswith(_READY)), None)
            if ready is None:
                raise SystemExit("the server did not start")
            yield ready.removeprefix(_READY).strip(), time.monotonic() - started
        finally:
            server.terminate()


def decode_over_http(url: str, config: Config, batch: int, vocab_size: int) -> dict[str, Any]:
    """One batch of `batch` requests per GPU; a step's time is the time between two tokens of a request, and `tokens_s`
    is the number of tokens per second over all requests."""
    arrivals = asyncio.run(_all(url, config, batch * config.parallel.world_size, vocab_size))
    first = max(times[1] for times in arrivals)
    last = min(times[-1] for times in arrivals)
    inside = [[at for at in times if first <= at <= last] for times in arrivals]
    gaps = np.concatenate([np.diff(times) for times in inside]) * 1e3
    return {
        "batch": batch,
        "steps": min(map(len, inside)) - 1,
        "step_ms": round(
            float(statistics.median((times[-1] - times[0]) / (len(times) - 1) for times in inside)) * 1e3, 3
        ),
        "p99_ms": round(float(np.percentile(gaps, 99)), 3),
        "tokens_s": round(sum((len(times) - 1) / (times[-1] - times[0]) for times in inside)),
    }


async def _all(url: str, config: Config, requests: int, vocab_size: int) -> list[list[float]]:
    rng = np.random.default_rng(config.benchmark.seed + requests)
    prompts = rng.integers(0, vocab_size, (requests, config.benchmark.decode_ctx_len)).tolist()
    return await asyncio.gather(*(_one(url, config, prompt) for prompt in prompts))


async def _one(url: str, config: Config, prompt: list[int]) -> list[float]:
    """When each token of a request arrived, in seconds on the monotonic clock."""
    where = urllib.parse.urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    body = {
        "model": config.model_name,
        "prompt": prompt,
        "max_tokens": config.benchmark.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    times: list[float] = []
    async for line in reader:
        if line.startswith(b"data: {"):
            event = orjson.loads(line.removeprefix(b"data: "))
            if "error" in event:
                break
            for choice in event["choices"]:
                times += [time.monotonic()] * len(choice["token_ids"])
        elif b"[DONE]" in line:
            break
    writer.close()
    if len(times) < config.benchmark.output_len:
        raise SystemExit(f"a stream ended after {len(times)} of {config.benchmark.output_len} tokens: {line!r}")
    return times
