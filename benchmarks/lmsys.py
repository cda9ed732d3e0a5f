"""Decode steps of full batches, as configs/benchmark_*.toml define them.

    python -m benchmarks.lmsys --config configs/benchmark_moonlight.toml [--batch 1,16,64,128,256]
                               [--http | --trace]

B requests per GPU, all with different prompts of random token ids, decode greedily at the same time. From when every
request has two tokens until the first one finishes, this measures the median and 99th percentile of the time between
two steps' results, as they arrive in the frontend's place, or with `--http` as events arrive at the clients of a whole
server. With `--trace`, the worker also reports how much of a step its device and its thread are busy, which makes the
other figures less accurate. The floor is the bytes that a step must read over the read bandwidth measured here.
The last line is JSON.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import msgspec
import numpy as np

from benchmarks.engine import Engine
from nmoe.config import Config, load_config
from nmoe.config_json import read_architecture


def decode(engine: Engine, config: Config, batch: int, vocab_size: int) -> dict[str, Any]:
    """One batch of `batch` requests per GPU, from its prompts to its last token."""
    benchmark, requests = config.benchmark, batch * config.parallel.world_size
    rng = np.random.default_rng(benchmark.seed + batch)
    for _ in range(requests):
        engine.submit(rng.integers(0, vocab_size, benchmark.decode_ctx_len), benchmark.output_len)
    counts: dict[int, int] = {}
    times: list[float] = []
    ended, lacking, timing = 0, requests, False
    while ended < requests:
        message = engine.receive()
        if timing:
            times.append(time.monotonic())
        for uid in np.frombuffer(message.uids, np.int64).tolist():
            counts[uid] = counts.get(uid, 0) + 1
            lacking -= counts[uid] == 2
        ended += len(message.ended)
        timing = lacking == 0 and not ended
    gaps = np.diff(times) * 1e3
    if len(gaps) < 8:
        raise SystemExit(f"only {len(gaps)} steps had the whole batch of {batch}: raise [benchmark] output_len")
    return {
        "batch": batch,
        "steps": len(gaps),
        "step_ms": round(float(np.median(gaps)), 3),
        "p99_ms": round(float(np.percentile(gaps, 99)), 3),
        "tokens_s": round(requests / statistics.mean(gaps) * 1e3),
    }


def add_floors(results: list[dict[str, Any]], config: Config, read_gb_s: float) -> None:
    """Add to each result its floor, for the context half-way through the output, and the floor's share of its time."""
    from benchmarks.ceilings import step_bytes

    architecture = read_architecture(config.model.path)
    dtype = architecture.dtype if config.model.dtype == "auto" else config.model.dtype
    context = config.benchmark.decode_ctx_len + config.benchmark.output_len // 2
    for result in results:
        size = step_bytes(architecture, dtype, result["batch"], context, config.parallel.world_size)
        result["floor_ms"] = round(size / read_gb_s / 1e6, 3)
        result["of_floor"] = round(result["floor_ms"] / result["step_ms"], 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", help="batch sizes per GPU, instead of [benchmark] decode_batch_size")
    parser.add_argument("--http", action="store_true", help="through a whole server and its clients")
    parser.add_argument("--trace", action="store_true", help="how busy device and worker are, from a trace")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    batches = [int(batch) for batch in (arguments.batch or str(config.benchmark.decode_batch_size)).split(",")]
    config = msgspec.structs.replace(config, benchmark=msgspec.structs.replace(config.benchmark, mode="decode"))
    vocab_size = read_architecture(config.model.path).vocab_size
    if arguments.http:
        from benchmarks.over_http import decode_over_http, serving

        with serving(arguments.config) as (url, ready_s):
            results = [decode_over_http(url, config, batch, vocab_size) for batch in batches]
    else:
        with tempfile.NamedTemporaryFile("r") as traces:
            if arguments.trace:
                from benchmarks.traced_worker import trace_workers

                trace_workers(pathlib.Path(traces.name))
            with Engine(config) as engine:
                ready_s = engine.ready_s
                results = [decode(engine, config, batch, vocab_size) for batch in batches]
            for result, line in zip(results, traces, strict=False):
                result |= json.loads(line) | {"batch": result["batch"]}
    report: dict[str, Any] = {"benchmark": "decode", "model": config.model_name, "http": arguments.http}
    if config.parallel.device == "cuda":
        from benchmarks.ceilings import measure
        from benchmarks.setting import expert_spread

        ceilings = measure()
        add_floors(results, config, ceilings["read_gb_s"])
        report |= {"ceilings": ceilings, "spread": expert_spread(config, max(batches))}
    from benchmarks.setting import setting

    report |= setting() | {"ready_s": round(ready_s, 1), "command": " ".join(sys.argv), "results": results}
    columns = list(dict.fromkeys(column for result in results for column in result))
    print(" ".join(f"{column:>13}" for column in columns))
    for result in results:
        print(" ".join(f"{result.get(column, '-'):>13}" for column in columns))
    print(f"ready after {ready_s:.1f} s")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
