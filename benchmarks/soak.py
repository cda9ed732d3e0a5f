"""Random load for minutes, then a check for anything left behind: pages, requests, descriptors, threads, memory.

    python -m benchmarks.soak [--minutes 20] [--world-size 2] [--clients 24]

Each client sends one random request after another, in every profile that the server offers: prompts of 1 to 800
tokens, answers of 1 to 200, greedy or sampled, one choice or two, some with stop strings; a quarter of the requests are
abandoned early. Afterwards the server must be as it was before: no request running or waiting, no page held, as many
descriptors, threads and tasks, no process restarted (a scheduler whose idle ranks hold a page or a slot exits), and
none grown by more than GROWTH_MB since the first quarter of the time. Printed: the requests' problems, the growth of
each process, a histogram of the gaps between events of streams and the longest gap, how late the clients' own timers
were, and the frontends' own histogram of gaps. The last line is JSON.
"""

import argparse
import asyncio
import collections
import gc
import json
import pathlib
import random
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np

from benchmarks.openai_client import Outcome, answer, complete
from nmoe.profiles import PROFILES
from tests.checkpoints import make_checkpoint
from tests.serving import Server

GROWTH_MB = 24  # allocators keep what they needed at the busiest moment; a leak of 1 kB per request shows after minutes
STALLS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
ENGINE = {"num_pages": 512, "page_size": 16, "max_batch_size": 12, "max_prefill_tokens": 256}
LONGEST = 800  # tokens of a prompt: with 200 of output it fits the context of tests/checkpoints.py, 1,024
POOL_THREADS = 5  # of a frontend, which starts them when it first needs them
WARM = 0.25  # the share of the time after which growth counts


def random_body(rng: random.Random, model: str, profiles: Sequence[str]) -> dict[str, Any]:
    """A random request that fits; half of them are in the first of `profiles`, the others in a random one."""
    length = rng.randint(100, LONGEST) if rng.random() < 0.15 else rng.randint(1, 60)
    body: dict[str, Any] = {
        "model": model,
        "prompt": [rng.randrange(5, 90) for _ in range(length)],
        "max_tokens": rng.randint(1, 200) if rng.random() < 0.3 else rng.randint(1, 40),
        "temperature": rng.choice((0, 0.7, 1.0)),
        "ignore_eos": rng.random() < 0.5,
        "n": rng.choice((1, 1, 1, 2)),
        "profile": profiles[0] if rng.random() < 0.5 else rng.choice(profiles),
    }
    if rng.random() < 0.3:
        body["prompt"] = [7] * length  # shares pages with other prompts like this
    if rng.random() < 0.2:
        body["stop"] = rng.choice(("a", "th", "e"))
    if rng.random() < 0.2:
        body |= {"frequency_penalty": 0.5, "logit_bias": {"7": 1}}
    return body


async def offered(server: Server) -> list[str]:
    """The profiles that the server offers, first those that can stream."""
    names = sorted(PROFILES, key=lambda name: not PROFILES[name].streams)
    async with aiohttp.ClientSession() as session:
        bodies = [{"model": server.model, "prompt": [7], "max_tokens": 1, "profile": name} for name in names]
        found = [await answer(session, server.url, body) for body in bodies]
    return [name for name, outcome in zip(names, found, strict=True) if not outcome.problem]


async def client(server: Server, seed: int, until: float, profiles: Sequence[str], outcomes: list[Outcome]) -> None:
    """Send one request after the other."""
    rng = random.Random(seed)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        while time.monotonic() < until:
            leaves = rng.random() < 0.25
            body = random_body(rng, server.model, profiles)
            if PROFILES[body["profile"]].streams:
                outcome = await complete(session, server.url, body, rng.randint(0, 30) if leaves else None)
            else:
                outcome = await answer(session, server.url, body, rng.uniform(0, 0.5) if leaves else None)
            outcomes.append(outcome)


async def lateness(until: float) -> float:
    """The longest delay of a timer in this process, in seconds: the clients may be starved of CPU as well as the
    server."""
    longest = 0.0
    while (now := time.monotonic()) < until:
        await asyncio.sleep(0.01)
        longest = max(longest, time.monotonic() - now - 0.01)
    return longest


async def load(server: Server, seconds: float, clients: int) -> tuple[list[Outcome], dict[str, int], float]:
    """Run all clients at once. Returns their outcomes, the memory of each process after the first quarter in bytes, and
    how late the clients were in seconds."""
    outcomes: list[Outcome] = []
    profiles = await offered(server)
    until = time.monotonic() + seconds
    running = [asyncio.create_task(client(server, seed, until, profiles, outcomes)) for seed in range(clients)]
    late = asyncio.create_task(lateness(until))
    await asyncio.sleep(seconds * WARM)
    warm = await asyncio.to_thread(memory, server)
    await asyncio.gather(*running)
    return outcomes, warm, await late


def memory(server: Server) -> dict[str, int]:
    """Resident bytes by process."""
    return {process.name(): process.memory_info().rss for process in server.family()}


def held(server: Server) -> dict[str, float]:
    """What an idle server holds; waits a little until abandoned requests are gone."""
    names = ("nmoe:num_requests_running", "nmoe:num_requests_waiting", "nmoe:kv_cache_usage_perc")
    deadline = time.monotonic() + 10
    while True:
        metrics = server.metrics()
        found = {name: next((v for k, v in metrics.items() if k.split("{")[0] == name), -1.0) for name in names}
        if not any(found.values()) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    time.sleep(1.2)  # until abandoned connections are closed and the scheduler has had a heartbeat
    family = server.family()
    return found | {
        "descriptors": sum(process.num_fds() for process in family),
        "threads": sum(process.num_threads() for process in family),
        "processes": len(family),
        "tasks": sum(value for key, value in server.metrics().items() if key.split("{")[0] == "nmoe:num_tasks"),
    }


def gaps_by_server(server: Server) -> dict[str, float]:
    """How many gaps between tokens the frontends have seen, by upper bound in seconds; cumulative, as in Prometheus."""
    bucket = "nmoe:inter_token_latency_seconds_bucket{"
    return {key.split('"')[1]: count for key, count in server.metrics().items() if key.startswith(bucket)}


def run(server: Server, seconds: float, clients: int) -> dict[str, Any]:
    """The whole soak against a running server."""
    gc.freeze()  # collecting garbage among all that the tests import would stall the clients for most of a second
    asyncio.run(load(server, 1.0, clients))  # until every pool and descriptor cache has reached its size
    before, family = held(server), {process.pid for process in server.family()}
    earlier = gaps_by_server(server)
    outcomes, warm, late = asyncio.run(load(server, seconds, clients))
    gc.unfreeze()
    after = held(server)
    grown = {name: round((now - warm[name]) / 2**20, 1) for name, now in memory(server).items()}
    restarted = [process.name() for process in server.family() if process.pid not in family]
    gaps = [gap for outcome in outcomes for gap in outcome.gaps]
    counts = np.histogram(gaps, (0.0, *STALLS_S, np.inf))[0].tolist()
    problems = collections.Counter(outcome.problem for outcome in outcomes if outcome.problem)
    return {
        "benchmark": "soak",
        "seconds": seconds,
        "clients": clients,
        "requests": len(outcomes),
        "profiles": dict(collections.Counter(outcome.profile for outcome in outcomes).most_common()),
        "problems": dict(problems.most_common(5)),
        "restarted": restarted,
        "leaked": {name: after[name] - before[name] for name in before if _differ(name, before[name], after[name])},
        "grown_mb": grown,
        "growth_bound_mb": GROWTH_MB,
        "stalls": dict(zip([*(f"<= {bound:g} s" for bound in STALLS_S), "longer"], counts, strict=True)),
        "longest_stall_s": round(max(gaps, default=0.0), 3),
        "clients_late_s": round(late, 3),
        "stalls_by_server": {le: count - earlier[le] for le, count in gaps_by_server(server).items()},
    }


def _differ(name: str, before: float, after: float) -> bool:
    return after - before > POOL_THREADS if name == "threads" else after != before


def failures(result: dict[str, Any]) -> list[str]:
    """What is not as it must be, in words."""
    grown = [f"{name} grew by {by} MB" for name, by in result["grown_mb"].items() if by > GROWTH_MB]
    leaked = [f"{name}: {by:+g}" for name, by in result["leaked"].items()]
    restarted = [f"{name} was restarted" for name in result["restarted"]]
    return grown + leaked + restarted + [f"{count} x {problem}" for problem, count in result["problems"].items()]


def main() -> None:
    """Start a server, soak it, and print what is left behind."""
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
