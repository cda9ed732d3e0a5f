"""Throughput of the five profiles, each against production_generate, through a whole server.

    python -m benchmarks.profiles [--config configs/benchmark_moonlight.toml]
                                  [--prompt 64] [--output 32] [--concurrency 16] [--requests 64] [--rounds 3]

Without --config the embedded demo is served, on the CPU. One server serves all: `--concurrency` clients send request
after request to /v1/generate, each with its own prompt of random token ids, so that no prefix is cached. Two workloads:

    generate  --prompt tokens in, --output tokens out, with what the profile returns by default: production_generate
              only tokens, eval_exact also the prompt's log-probabilities; greedy, except rl_sample (temperature 1)
    score     the prompt alone (max_tokens 0) and its log-probabilities, with the top-k in profiles that have one

Every profile is warmed up first, since exact steps are captured on first use. Then the profiles take turns, with one
measurement each per round. Printed are the best round's requests/s and tokens/s (prompt plus output), since other work
on the machine only slows rounds down, and the ratio to production_generate's; `worst_requests_s` shows how far apart
the rounds are. A request that is refused, or an answer that lacks a token or a position, ends the run with an error.
The last line is JSON.
"""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.latency import endpoint
from benchmarks.over_http import serving
from nmoe.client import Array, AsyncClient
from nmoe.config_json import read_architecture
from nmoe.native import Answer
from nmoe.profiles import PROFILES, Profile
from nmoe.serve import configuration

WORKLOADS = ("generate", "score")
BASE = "production_generate"
READ_TIMEOUT_S = 300.0  # the first requests may have to wait for kernels to be compiled


@contextlib.contextmanager
def server(config: str | None) -> Iterator[str]:
    """The address of a server with this configuration, or the embedded demo's."""
    if config is None:
        with endpoint(None) as url:
            yield url
    else:
        with serving(config) as (url, _):
            yield url


def request_fields(workload: str, profile: Profile, output: int) -> dict[str, Any]:
    """A request's fields except its prompt and seed."""
    fields = {"profile": profile.name, "temperature": float(profile.name == "rl_sample"), "ignore_eos": True}
    return fields | ({"max_tokens": output} if workload == "generate" else {"max_tokens": 0, "prompt_logprobs": 0})


def expected_shapes(workload: str, profile: Profile, prompt: int, output: int) -> dict[str, tuple[int, ...]]:
    """The tensors that an answer must have, with their shapes; it must have no others."""
    scoring = workload == "score"
    shapes: dict[str, tuple[int, ...]] = {"prompt_token_ids": (prompt,), "token_ids": (0 if scoring else output,)}
    told = []  # (prefix, positions)
    if profile.scores or scoring:
        told.append(("", 0 if scoring else output))
        shapes["drawn_logprobs"] = shapes["token_ids"]
    if profile.scores_prompt or scoring:
        told.append(("prompt_", prompt - 1))
    for prefix, count in told:
        shapes |= {f"{prefix}logprobs": (count,), f"{prefix}ranks": (count,)}
        if profile.top_k:
            shapes |= {f"{prefix}top_k_{name}": (count, profile.top_k) for name in ("ids", "logprobs")}
    return shapes


def check(answer: Answer[Array], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises SystemExit if an answer is incomplete or invalid, or if part of its prompt came from the prefix cache."""
    (choice,) = answer.choices
    tensors = {name: getattr(choice, name) for name in choice.__struct_fields__}
    tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, np.ndarray)}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != shapes or choice.finish_reason != "length":
        raise SystemExit(f"an answer ended by {choice.finish_reason!r} with {found} instead of {shapes}")
    if cached := answer.usage["prompt_tokens_details"]["cached_tokens"]:
        raise SystemExit(f"{cached} tokens of a prompt that nobody sent before came from the prefix cache")
    for name, tensor in tensors.items():
        if name.endswith("logprobs") and not (tensor <= 0).all():
            raise SystemExit(f"{name} are no log-probabilities: {tensor}")


async def closed_loop(
    url: str, prompts: list[Array], fields: dict[str, Any], concurrency: int
) -> tuple[float, list[Answer[Array]]]:
    """The seconds that all prompts took, `concurrency` at a time, and their answers."""
    waiting = iter(enumerate(prompts))
    answers: list[Answer[Array]] = []

    async def one_client() -> None:
        for number, prompt in waiting:
            answers.append(await client.generate(prompt, seed=number, **fields))

    async with AsyncClient(url, timeout=READ_TIMEOUT_S) as client:
        began = time.monotonic()
        await asyncio.gather(*(one_client() for _ in range(concurrency)))
        return time.monotonic() - began, answers


class Bench:
    """A server under test."""

    def __init__(self, url: str, vocab_size: int, arguments: argparse.Namespace) -> None:
        self._url, self._arguments = url, arguments
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(arguments.seed)

    def rate(self, workload: str, profile: Profile, requests: int) -> float:
        """Requests per second."""
        prompt, output = self._arguments.prompt, self._arguments.output
        prompts = list(self._rng.integers(0, self._vocab_size, (requests, prompt)))
        fields = request_fields(workload, profile, output)
        seconds, answers = asyncio.run(closed_loop(self._url, prompts, fields, self._arguments.concurrency))
        if len(answers) != requests:
            raise SystemExit(f"{len(answers)} answers to {requests} requests")
        shapes = expected_shapes(workload, profile, prompt, output)
        for answer in answers:
            check(answer, shapes)
        return requests / seconds

    def round(self, workload: str, requests: int) -> dict[str, float]:
        """Requests per second of every profile, one after the other."""
        return {name: self.rate(workload, profile, requests) for name, profile in PROFILES.items()}


def summary(workload: str, profile: Profile, rounds: list[dict[str, float]], tokens: int) -> dict[str, Any]:
    """One row of the table; `tokens` are those of one request."""
    rates, base = [each[profile.name] for each in rounds], max(each[BASE] for each in rounds)
    return {
        "workload": workload,
        "profile": profile.name,
        "numerics": profile.numerics.name.lower(),
        "top_k": profile.top_k,
        "requests_s": round(max(rates), 2),
        "worst_requests_s": round(min(rates), 2),
        "tokens_s": round(max(rates) * tokens),
        "relative": round(max(rates) / base, 3),
    }


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="X.toml", help="without it the embedded demo is served")
    parser.add_argument("--prompt", type=int, default=64, help="tokens, at least 2")
    parser.add_argument("--output", type=int, default=32, help="tokens")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time")
    parser.add_argument("--requests", type=int, default=64, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each profile and workload")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = configuration(arguments.config)
    rows: list[dict[str, Any]] = []
    with server(arguments.config) as url:
        bench = Bench(url, read_architecture(config.model.path).vocab_size, arguments)
        for workload in WORKLOADS:
            bench.round(workload, arguments.concurrency)
            rounds = [bench.round(workload, arguments.requests) for _ in range(arguments.rounds)]
            tokens = arguments.prompt + (arguments.output if workload == "generate" else 0)
            rows += [summary(workload, profile, rounds, tokens) for profile in PROFILES.values()]
    print(" ".join(f"{column:>19}" for column in rows[0]))
    for row in rows:
        print(" ".join(f"{value:>19}" for value in row.values()))
    from benchmarks.setting import setting

    load = {name: value for name, value in vars(arguments).items() if name != "config"}
    report = {"benchmark": "profiles", "model": config.model_name, "world_size": config.parallel.world_size}
    report |= setting() | {"cores": os.cpu_count(), **load, "command": " ".join(sys.argv), "results": rows}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
