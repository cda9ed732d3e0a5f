"""Random load for minutes, then the question of what is left: pages, requests, descriptors, threads, memory.

    python -m benchmarks.soak [--minutes 20] [--world-size 2] [--clients 24]

Each client sends one random request after another: prompts of 1 to 800 tokens, answers of 1 to 200, greedy or
sampled, alone or two siblings, some with stop strings; a quarter of the clients leave before the end. Afterwards the
server must be as it was: no request running or waiting, no page held, the descriptors and threads from before, and no
process grown by more than GROWTH_MB since the first quarter of the time. Printed: how requests ended, the memory of
each process, a histogram of the gaps between events of running streams with the longest. The last line is JSON.
"""

import argparse
import asyncio
import collections
import json
import pathlib
import random
import tempfile
import time
from typing import Any

import aiohttp
import numpy as np

from benchmarks.openai_client import Outcome, complete
from tests.checkpoints import make_checkpoint
from tests.serving import Server

GROWTH_MB = 24  # allocators keep what a busy moment took; a leak of 1 kB per request shows after minutes
STALLS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
ENGINE = {"num_pages": 512, "page_size": 16, "max_batch_size": 12, "max_prefill_tokens": 256}
LONGEST = 800  # tokens of a prompt: with 200 of output it fits the context of tests/checkpoints.py, 1,024
WARM = 0.25  # share of the time after which memory counts


def random_body(rng: random.Random, model: str) -> dict[str, Any]:
    """A request of any kind that fits."""
    length = rng.randint(100, LONGEST) if rng.random() < 0.15 else rng.randint(1, 60)
    body: dict[str, Any] = {
        "model": model,
        "prompt": [rng.randrange(5, 90) for _ in range(length)],
        "max_tokens": rng.randint(1, 200) if rng.random() < 0.3 else rng.randint(1, 40),
        "temperature": rng.choice((0, 0.7, 1.0)),
        "ignore_eos": rng.random() < 0.5,
        "n": rng.choice((1, 1, 1, 2)),
    }
    if rng.random() < 0.3:
        body["prompt"] = [7] * length  # shares pages with its like
    if rng.random() < 0.2:
        body["stop"] = rng.choice(("a", "th", "e"))
    if rng.random() < 0.2:
        body |= {"frequency_penalty": 0.5, "logit_bias": {"7": 1}}
    return body


async def client(server: Server, seed: int, until: float, outcomes: list[Outcome]) -> None:
    """One request after the other."""
    rng = random.Random(seed)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        while time.monotonic() < until:
            leave = rng.randint(0, 30) if rng.random() < 0.25 else None
            outcomes.append(await complete(session, server.url, random_body(rng, server.model), leave))


async def load(server: Server, seconds: float, clients: int) -> tuple[list[Outcome], dict[str, int]]:
    """All clients at once; what they saw, and the memory of each process after the first quarter, in bytes."""
    outcomes: list[Outcome] = []
    began = time.monotonic()
    running = [asyncio.create_task(client(server, seed, began + seconds, outcomes)) for seed in range(clients)]
    await asyncio.sleep(seconds * WARM)
    warm = await asyncio.to_thread(memory, server)
    await asyncio.gather(*running)
    return outcomes, warm


def memory(server: Server) -> dict[str, int]:
    """Resident bytes by process."""
    return {process.name(): process.memory_info().rss for process in server.family()}


def held(server: Server) -> dict[str, float]:
    """What an idle server holds; waits a little until requests that were left are gone."""
    names = ("nmoe:num_requests_running", "nmoe:num_requests_waiting", "nmoe:kv_cache_usage_perc")
    deadline = time.monotonic() + 10
    while True:
        metrics = server.metrics()
        found = {name: next((v for k, v in metrics.items() if k.split("{")[0] == name), -1.0) for name in names}
        if not any(found.values()) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    time.sleep(1.2)  # connections that were left are closed; the scheduler's heart has beaten
    family = server.family()
    return found | {
        "descriptors": sum(process.num_fds() for process in family),
        "threads": sum(process.num_threads() for process in family),
        "processes": len(family),
    }


def run(server: Server, seconds: float, clients: int) -> dict[str, Any]:
    """The whole soak against a running server."""
    asyncio.run(load(server, 1.0, clients))  # every pool and cache of descriptors has its size
    before = held(server)
    outcomes, warm = asyncio.run(load(server, seconds, clients))
    after = held(server)
    grown = {name: round((now - warm[name]) / 2**20, 1) for name, now in memory(server).items()}
    gaps = [gap for outcome in outcomes for gap in outcome.gaps]
    counts = np.histogram(gaps, (0.0, *STALLS_S, np.inf))[0].tolist()
    problems = collections.Counter(outcome.problem for outcome in outcomes if outcome.problem)
    return {
        "benchmark": "soak",
        "seconds": seconds,
        "clients": clients,
        "requests": len(outcomes),
        "problems": dict(problems.most_common(5)),
        "leaked": {name: after[name] - before[name] for name in before if after[name] != before[name]},
        "grown_mb": grown,
        "growth_bound_mb": GROWTH_MB,
        "stalls": dict(zip([*(f"<= {bound:g} s" for bound in STALLS_S), "longer"], counts, strict=True)),
        "longest_stall_s": round(max(gaps, default=0.0), 3),
    }


def failures(result: dict[str, Any]) -> list[str]:
    """What is not as it must be."""
    grown = [f"{name} grew by {by} MB" for name, by in result["grown_mb"].items() if by > GROWTH_MB]
    leaked = [f"{name}: {by:+g}" for name, by in result["leaked"].items()]
    return grown + leaked + [f"{count} x {problem}" for problem, count in result["problems"].items()]


def main() -> None:
    """Soak a server of its own and print what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--world-size", type=int, default=2, choices=(1, 2, 4, 8))
    parser.add_argument("--clients", type=int, default=24)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(pathlib.Path(folder) / "tiny")
        parallel = {"world_size": arguments.world_size, "device": "cpu"}
        with Server({"model": {"path": str(checkpoint)}, "parallel": parallel, "engine": ENGINE}) as server:
            result = run(server, arguments.minutes * 60, arguments.clients)
    for name, value in result.items():
        print(f"{name:18} {value}")
    print(json.dumps(result | {"world_size": arguments.world_size, "failures": failures(result)}))
    if failures(result):
        raise SystemExit("\n".join(failures(result)))


if __name__ == "__main__":
    main()
