"""Replays a recorded trace against an OpenAI-compatible endpoint: the same prompts, lengths and arrival times.

    python -m benchmarks.replay trace.jsonl --url http://HOST:PORT [--speed 1.0]

The trace is the file that `[trace] record` wrote. Every answer gets as many tokens as were recorded. `--speed 2` sends
the requests in half the time. Printed: time to the first token and to the end, as recorded and as measured now, and the
gaps between events now. The last line is JSON.
"""

import argparse
import asyncio
import json
import pathlib
import time
from typing import Any

import aiohttp
import msgspec
import numpy as np

from benchmarks.openai_client import Outcome, complete, first_model
from nmoe.trace import Record


def read_trace(path: str) -> list[Record]:
    """The records, in order of arrival."""
    decode = msgspec.json.Decoder(Record).decode
    with pathlib.Path(path).open("rb") as lines:
        return sorted((decode(line) for line in lines if line.strip()), key=lambda record: record.arrived)


async def replay(records: list[Record], url: str, speed: float) -> list[Outcome]:
    """Send every request at its recorded time, and wait until all have ended."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        model = await first_model(session, url)
        began = time.monotonic()
        requests = []
        for record in records:
            at = began + (record.arrived - records[0].arrived) / speed
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            body = {"model": model, "prompt": record.prompt_token_ids, **record.sampling, "ignore_eos": True}
            body |= {"max_tokens": max(1, record.output_tokens)}
            body["min_tokens"] = min(body.get("min_tokens", 0), body["max_tokens"])
            requests.append(asyncio.create_task(complete(session, url, body)))
        return await asyncio.gather(*requests)


def summary(records: list[Record], outcomes: list[Outcome]) -> dict[str, Any]:
    """Percentiles 50, 90, 99 and 100 in seconds, as recorded and as measured now."""
    good = [outcome for outcome in outcomes if not outcome.problem and outcome.arrivals]
    result: dict[str, Any] = {"requests": len(outcomes), "failed": len(outcomes) - len(good)}
    for name, values in (
        ("ttft_recorded_s", [record.ttft for record in records if record.ttft is not None]),
        ("ttft_s", [outcome.ttft for outcome in good]),
        ("e2e_recorded_s", [record.e2e for record in records]),
        ("e2e_s", [outcome.arrivals[-1] for outcome in good]),
        ("gaps_s", [gap for outcome in good for gap in outcome.gaps]),
    ):
        if values:
            result[name] = [round(float(value), 4) for value in np.percentile(values, (50, 90, 99, 100))]
    return result


def main() -> None:
    """Replay and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--url", required=True)
    parser.add_argument("--speed", type=float, default=1.0)
    arguments = parser.parse_args()
    records = read_trace(arguments.trace)
    if not records:
        raise SystemExit(f"{arguments.trace}: no request is recorded there")
    outcomes = asyncio.run(replay(records, arguments.url.rstrip("/"), arguments.speed))
    result = summary(records, outcomes)
    for name, value in result.items():
        print(f"{name:18} {value}")
    for problem in sorted({outcome.problem for outcome in outcomes if outcome.problem})[:5]:
        print(f"failed: {problem}")
    print(json.dumps({"benchmark": "replay", "speed": arguments.speed, **result}))


if __name__ == "__main__":
    main()
