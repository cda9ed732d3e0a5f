"""What a decode step costs in CPU time besides the model, in a whole server: frontend, scheduler and worker separately.

    python benchmarks/step_cost.py [--streams 32] [--tokens 300] [--config X.toml]

Starts `nmoe serve` (the embedded demo by default), runs greedy SSE streams, and divides each process's CPU time by the
number of steps. The worker's CPU time includes the model; the rest of its work is timed in this process, with the same
batch on one rank: all of `Runner.launch` minus the model's forward and logits. The last line is JSON.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec
import numpy as np
import psutil
import torch

from nmoe.checkpoint import open_checkpoint
from nmoe.config import Parallel
from nmoe.messages import CHANNEL_DECODE, CHANNEL_PREFILL, ROW_HAS_IDS, ROW_SAMPLES, Admit, Sampling, Step
from nmoe.profiles import Numerics
from nmoe.serve import configuration
from nmoe.worker.cache import make_cache
from nmoe.worker.model import load_model
from nmoe.worker.runner import Runner

READY = "nmoe ready on "


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--config", help="the configuration; the embedded demo's by default")
    arguments = parser.parse_args()
    result = serve_and_measure(arguments.config, arguments.streams, arguments.tokens)
    result |= measure_worker(arguments.config, arguments.streams)
    for name, value in result.items():
        print(f"{name:32} {value:10.1f}")
    print(json.dumps({"streams": arguments.streams, "tokens": arguments.tokens, **result}))


def serve_and_measure(config: str | None, streams: int, tokens: int) -> dict[str, float]:
    """CPU microseconds per step of each process of a server with `streams` streams."""
    command = [sys.executable, "-m", "nmoe.serve", *(["--config", config] if config else [])]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as p:
        assert p.stdout is not None
        url = p.stdout.readline().strip().removeprefix(READY)
        try:
            return asyncio.run(_load(url, psutil.Process(p.pid), streams, tokens))
        finally:
            p.terminate()


async def _load(url: str, launcher: psutil.Process, streams: int, tokens: int) -> dict[str, float]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(_stream(session, url, 2) for _ in range(streams)))  # warm
        steps, cpu = await _steps(session, url), _cpu(launcher)
        await asyncio.gather(*(_stream(session, url, tokens) for _ in range(streams)))
        made = await _steps(session, url) - steps
        used = {name: (after - cpu[name]) * 1e6 / made for name, after in _cpu(launcher).items()}
    return {"steps": made, **{f"{name} us/step": value for name, value in used.items()}}


async def _stream(session: aiohttp.ClientSession, url: str, tokens: int) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        async for _ in response.content.iter_any():
            pass


async def _steps(session: aiohttp.ClientSession, url: str) -> float:
    async with session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("nmoe:steps_total{"))


def _cpu(launcher: psutil.Process) -> dict[str, float]:
    times = {child.name().removeprefix("nmoe "): child.cpu_times() for child in launcher.children()}
    return {name: each.user + each.system for name, each in times.items()}


def measure_worker(path: str | None, rows: int, steps: int = 200) -> dict[str, float]:
    """Median microseconds of a decode step of `rows` unchanged greedy rows: in all, in the model, and outside it."""
    torch.set_num_threads(1)
    # One rank, because there are no peers here to exchange tokens with.
    config = msgspec.structs.replace(configuration(path), parallel=Parallel(world_size=1, device="cpu"))
    checkpoint = open_checkpoint(config)
    device = torch.device("cpu")
    model = load_model(checkpoint, config, 0, device, lambda *_: None)
    spans: list[float] = []
    for name in ("forward", "logits"):
        setattr(model, name, _timed(getattr(model, name), spans))
    cache = make_cache(config, checkpoint, device)
    runner = Runner(model, cache, num_slots=config.num_slots, max_seq_len=checkpoint.max_seq_len)
    for step in _prefill(rows, steps, cache.page_size):
        runner.launch(step).tokens()
    whole, inside = [], []
    decode = np.array([[slot, 1, 1, ROW_SAMPLES] for slot in range(rows)], np.int32).tobytes()
    for step_id in range(1, steps):
        spans.clear()
        begin = time.perf_counter()
        step = Step(1, step_id, Numerics.FAST, CHANNEL_DECODE, rows, decode if step_id == 1 else None)
        runner.launch(step).tokens()
        whole.append(time.perf_counter() - begin)
        inside.append(sum(spans))
    rest = np.array(whole) - np.array(inside)
    medians = {"whole": whole, "model": inside, "rest": rest}
    return {f"worker step, {name} us": float(np.median(values)) * 1e6 for name, values in medians.items()}


def _timed(function: Callable[..., Any], spans: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        begin = time.perf_counter()
        result = function(*arguments)
        spans.append(time.perf_counter() - begin)
        return result

    return timed


def _prefill(rows: int, steps: int, page_size: int) -> list[Step]:
    pages = -(-(steps + 2) // page_size)
    return [
        Step(
            1,
            0,
            Numerics.FAST,
            CHANNEL_PREFILL,
            1,
            np.array([slot, 0, 1, ROW_SAMPLES | ROW_HAS_IDS], np.int32).tobytes(),
            np.array([5], np.int32).tobytes(),
            np.array([(slot, slot * pages + page) for page in range(pages)], np.int32).tobytes(),
            (Admit(slot, 0, Sampling(temperature=0.0)),),
        )
        for slot in range(rows)
    ]


if __name__ == "__main__":
    main()
