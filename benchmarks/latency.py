"""Latencies under a mixed load, and the highest request rate that keeps them within bounds.

    python -m benchmarks.latency [--url URL] [--rate 8 | --sweep] [--arrivals poisson|bursty] [--plot X.png]

Works against any OpenAI-compatible endpoint; without --url it starts `nmoe serve` with the embedded demo. Requests
arrive in a Poisson process of `--rate` per second, or in bursts of 8 at the same mean rate, whether or not earlier ones
are done. One in `--long-every` has a long prompt. Printed: percentiles of the time to first token, between tokens and
to the end, and the worst stall of any running stream. --sweep doubles the rate until the SLO fails (TTFT p99 2 s, time
between tokens p99 100 ms, no failed request), then bisects until the lowest rate that fails is at most `--precision`
times the highest that passes. --plot needs matplotlib (`pip install nmoe[bench]`). The last line is JSON.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import random
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import numpy as np

import nmoe
from benchmarks.openai_client import Outcome, complete, first_model
from benchmarks.over_http import serving

TTFT_P99_S, ITL_P99_S = 2.0, 0.1  # the SLO
BURST = 8
PERCENTILES = (50, 90, 99, 100)
LEAST_RATE = 0.05  # requests per second; below this, a sweep gives up


def arrivals(rate: float, seconds: float, kind: str, rng: random.Random) -> Iterator[float]:
    """When requests are sent, in seconds from the start."""
    size = BURST if kind == "bursty" else 1
    at = rng.expovariate(rate / size)
    while at < seconds:
        yield from [at] * size
        at += rng.expovariate(rate / size)


async def offer(url: str, rate: float, arguments: argparse.Namespace) -> list[Outcome]:
    """Send requests at `rate` per second, then wait until all have ended."""
    rng = random.Random(arguments.seed)
    timeout = aiohttp.ClientTimeout(total=arguments.seconds + 60)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        model = await first_model(session, url)
        began = time.monotonic()
        requests = []
        for number, at in enumerate(arrivals(rate, arguments.seconds, arguments.arrivals, rng)):
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            is_long = number % arguments.long_every == arguments.long_every - 1
            length = arguments.long_prompt if is_long else rng.randint(arguments.prompt // 2, arguments.prompt * 2)
            body = {
                "model": model,
                "prompt": [rng.randrange(260, 1000) for _ in range(length)],
                "max_tokens": max(1, round(rng.uniform(0.5, 1.5) * arguments.output)),
                "ignore_eos": True,
            }
            requests.append(asyncio.create_task(complete(session, url, body)))
        return await asyncio.gather(*requests)


def summary(rate: float, outcomes: list[Outcome]) -> dict[str, Any]:
    """One row of the table; times are in seconds, except `itl_ms`."""
    good = [outcome for outcome in outcomes if not outcome.problem and outcome.arrivals]
    gaps = [gap for outcome in good for gap in outcome.gaps]
    row: dict[str, Any] = {"rate": round(rate, 3), "requests": len(outcomes), "failed": len(outcomes) - len(good)}
    if not good or not gaps:
        return row | {"meets_slo": False}
    ended = max(outcome.began + outcome.arrivals[-1] for outcome in good)
    took = ended - min(outcome.began for outcome in good)
    for name, values, unit in (
        ("ttft_s", [outcome.ttft for outcome in good], 1),
        ("itl_ms", gaps, 1e3),
        ("e2e_s", [outcome.arrivals[-1] for outcome in good], 1),
    ):
        row[name] = [round(float(value) * unit, 3) for value in np.percentile(values, PERCENTILES)]
    row["tokens_s"] = round(sum(len(outcome.arrivals) for outcome in good) / took, 1)
    row["worst_stall_s"] = round(max(gaps), 3)
    row["meets_slo"] = not row["failed"] and row["ttft_s"][2] <= TTFT_P99_S and row["itl_ms"][2] <= ITL_P99_S * 1e3
    return row


def sweep(url: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows at rates that double, then bisect (geometrically) between the highest that passes and the lowest to fail."""
    best, fails, rate = 0.0, 0.0, arguments.rate
    while not fails or not best or fails / best > arguments.precision:
        row = summary(rate, asyncio.run(offer(url, rate, arguments)))
        yield row
        if row["meets_slo"]:
            best = rate
        else:
            fails = rate
        rate = (fails * best) ** 0.5 if fails and best else rate / 2 if fails else rate * 2
        if rate < LEAST_RATE:
            return


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Plot latency against request rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted((row for row in rows if "itl_ms" in row), key=lambda row: row["rate"])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, name, bound, label in (
        (left, "ttft_s", TTFT_P99_S, "time to first token, s"),
        (right, "itl_ms", ITL_P99_S * 1e3, "between tokens, ms"),
    ):
        for place, percentile in enumerate(PERCENTILES):
            title = f"p{percentile}" if percentile < 100 else "worst"
            axes.plot([row["rate"] for row in rows], [row[name][place] for row in rows], marker="o", label=title)
        axes.axhline(bound, color="black", linestyle=":", label="SLO, p99")
        axes.set(xlabel="requests per second", ylabel=label, yscale="log")
        axes.legend()
    figure.savefig(path, dpi=120)


@contextlib.contextmanager
def endpoint(url: str | None) -> Iterator[str]:
    """The URL of the endpoint under test; without one, the embedded demo is served."""
    if url:
        yield url.rstrip("/")
        return
    demo = pathlib.Path(nmoe.__file__).parent / "demo"
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder) / "demo.toml"
        text = (demo / "demo.toml").read_text().replace('path = "."', f'path = "{demo}"')
        config.write_text(text.replace("[server]", "[server]\nport = 0"))
        with serving(str(config)) as (served, _):
            yield served


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second; of a sweep the first")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--precision", type=float, default=1.04, help="of a sweep: a ratio of two rates")
    parser.add_argument("--arrivals", choices=("poisson", "bursty"), default="poisson")
    parser.add_argument("--seconds", type=float, default=15.0, help="of arrivals, per rate")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a short prompt: half to twice as many")
    parser.add_argument("--long-prompt", type=int, default=1500, help="tokens")
    parser.add_argument("--long-every", type=int, default=10)
    parser.add_argument("--output", type=int, default=64, help="tokens: half as many to one and a half times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", metavar="X.png")
    arguments = parser.parse_args()
    rows = []
    with endpoint(arguments.url) as url:
        measured = (
            sweep(url, arguments)
            if arguments.sweep
            else (summary(rate, asyncio.run(offer(url, rate, arguments))) for rate in (arguments.rate,))
        )
        for row in measured:
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if arguments.plot:
        plot(rows, arguments.plot)
    best = max((row["rate"] for row in rows if row["meets_slo"]), default=None)
    print(f"highest rate that meets the SLO: {best} requests/s (percentiles are {PERCENTILES})")
    load = {name: value for name, value in vars(arguments).items() if name not in ("url", "plot")}
    print(json.dumps({"benchmark": "latency", "cores": os.cpu_count(), **load, "best_rate": best, "rows": rows}))


if __name__ == "__main__":
    main()
