"""How long a worker's thread takes to launch a step; steps with chunks both as CUDA graphs and kernel by kernel.

    python -m benchmarks.launch --config configs/benchmark_moonlight.toml [--batch 1,16,64,128,256] [--chunks 512,2048]

One rank runs in this process, with two steps in flight as in a worker. Timed are decode steps whose rows stay the same
(greedy, sampled at temperature 0.8, and sampled with top-p 0.95), and steps of decode rows and a chunk of one prompt,
whose rows are new in every step. Decode rows have a context of [benchmark] decode_ctx_len random cache rows. Times are
medians, except `p95_us`. The last line is JSON.
"""

import argparse
import collections
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.setting import setting
from nmoe.checkpoint import open_checkpoint
from nmoe.config import Config, load_config
from nmoe.messages import CHANNEL_DECODE, CHANNEL_PREFILL, ROW_HAS_IDS, ROW_SAMPLES, Admit, Sampling, Step
from nmoe.profiles import Numerics
from nmoe.worker.cache import make_cache
from nmoe.worker.model import load_model
from nmoe.worker.runner import Launched, Runner

GREEDY = Sampling(temperature=0.0)
SAMPLINGS = {
    "greedy": GREEDY,
    "drawn": Sampling(temperature=0.8, seed=1),
    "top-p": Sampling(temperature=0.8, top_p=0.95, seed=1),
}


class Driver:
    """A runner whose slots 0, 1, ... decode; slots beyond the largest batch take chunks in turn."""

    def __init__(self, config: Config) -> None:
        self.config, self.size = config, config.engine.page_size
        device = torch.device("cuda", 0)
        checkpoint = open_checkpoint(config)
        started = time.monotonic()
        self.model = load_model(checkpoint, config, 0, device, lambda *_: None)
        self.loaded_s = time.monotonic() - started
        self.cache = make_cache(config, checkpoint, device)
        for layer in self.cache.rows_LNSC:
            layer.normal_()
        self.runner = Runner(self.model, self.cache, num_slots=config.num_slots, max_seq_len=checkpoint.max_seq_len)
        self.rng = np.random.default_rng(0)
        self.vocab_size = checkpoint.architecture.vocab_size
        self.step_id = 0

    def step(self, channel: int, tokens: int, rows: list[Any] | None, **fields: Any) -> Step:
        self.step_id += 1
        given = None if rows is None else np.array(rows, np.int32).reshape(-1, 4).tobytes()
        return Step(1, self.step_id, Numerics.FAST, channel, tokens, given, **fields)

    def pages(self, slot: int, tokens: int, have: int = 0) -> list[tuple[int, int]]:
        """The pages that a slot with `have` pages needs for `tokens` tokens; slots may share pages, as contents do not
        matter."""
        per_slot = -(-self.config.model.max_seq_len // self.size)
        first = slot * per_slot
        return [(slot, (first + page) % self.cache.num_pages) for page in range(have, -(-tokens // self.size))]

    def begin(self, batch: int, sampling: Sampling) -> None:
        """Start over, with `batch` slots that decode from the end of their context on."""
        self.runner.reset()
        context = self.at = self.config.benchmark.decode_ctx_len
        rows = [(slot, context, 1, ROW_SAMPLES | ROW_HAS_IDS) for slot in range(batch)]
        pages = [pair for slot in range(batch) for pair in self.pages(slot, context + 1)]
        admits = tuple(Admit(slot, context, sampling) for slot in range(batch))
        ids = self.rng.integers(0, self.vocab_size, batch).astype(np.int32).tobytes()
        pages_bytes = np.array(pages, np.int32).tobytes()
        self.runner.launch(self.step(CHANNEL_PREFILL, batch, rows, ids=ids, pages=pages_bytes, admits=admits)).tokens()
        self.at += 1

    def decodes(self, batch: int, count: int) -> Iterator[Step]:
        """Decode steps of the same rows; each row gets another page when it needs one."""
        for nth in range(count):
            rows = [(slot, self.at, 1, ROW_SAMPLES) for slot in range(batch)] if nth == 0 else None
            new = [(slot, 0) for slot in range(batch)] if self.at % self.size == 0 else []
            yield self.step(CHANNEL_DECODE, batch, rows, pages=np.array(new, np.int32).tobytes())
            self.at += 1

    def mixed(self, decodes: int, chunk: int, count: int) -> Iterator[Step]:
        """Steps of `decodes` decode rows and the first `chunk` tokens of a new prompt."""
        for nth in range(count):
            slot = self.config.engine.max_batch_size + nth % 4
            rows = [(decode, self.at, 1, ROW_SAMPLES) for decode in range(decodes)]
            rows.append((slot, 0, chunk, ROW_HAS_IDS))
            pages = self.pages(slot, chunk)
            pages += [(decode, 0) for decode in range(decodes)] if self.at % self.size == 0 else []
            yield self.step(
                CHANNEL_PREFILL,
                decodes + chunk,
                rows,
                ids=self.rng.integers(0, self.vocab_size, chunk).astype(np.int32).tobytes(),
                pages=np.array(pages, np.int32).tobytes(),
                admits=(Admit(slot, 0, GREEDY),),
            )
            self.at += 1

    def run(self, steps: Iterable[Step]) -> dict[str, float]:
        """Microseconds of a launch, median and 95th percentile, and median milliseconds from one result to the next."""
        in_flight: collections.deque[Launched] = collections.deque()
        launches, ends = [], []
        for step in steps:
            if len(in_flight) == self.config.steps_in_flight:
                in_flight.popleft().tokens()
                ends.append(time.perf_counter())
            begin = time.perf_counter()
            in_flight.append(self.runner.launch(step))
            launches.append(time.perf_counter() - begin)
        for launched in in_flight:
            launched.tokens()
        return {
            "launch_us": round(statistics.median(launches[3:]) * 1e6, 1),
            "p95_us": round(float(np.percentile(launches[3:], 95)) * 1e6, 1),
            "step_ms": round(float(np.median(np.diff(ends)[2:])) * 1e3, 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", default="1,16,64,128,256")
    parser.add_argument("--decodes", default="0,64,256", help="decode rows beside a chunk")
    parser.add_argument("--chunks", default="64,512,2048", help="tokens of a chunk")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    driver, results = Driver(config), []

    def measure(kind: str, decodes: int, chunk: int, steps: Iterable[Step]) -> None:
        results.append({"step": kind, "decodes": decodes, "chunk": chunk, **driver.run(steps)})
        print(" ".join(f"{value:>14}" for value in results[-1].values()), flush=True)

    beside = [min(int(d), config.engine.max_batch_size - 1) for d in arguments.decodes.split(",")]
    mixed = [(decodes, int(chunk)) for decodes in beside for chunk in arguments.chunks.split(",")]

    def measure_mixed(kind: str) -> None:
        for decodes, chunk in mixed:
            driver.begin(max(1, decodes), GREEDY)
            measure(kind, decodes, chunk, driver.mixed(decodes, chunk, 16))

    measure_mixed("eager")
    torch.cuda.synchronize()
    before, began = torch.cuda.mem_get_info()[0], time.monotonic()
    share = config.engine.max_prefill_tokens // config.parallel.world_size
    driver.runner.capture(config.engine.max_batch_size, min(share, 4096))
    torch.cuda.synchronize()
    captured_s, captured_gb = time.monotonic() - began, (before - torch.cuda.mem_get_info()[0]) / 1e9
    print(f"loaded in {driver.loaded_s:.1f} s; captured in {captured_s:.2f} s, {captured_gb:.2f} GB")
    measure_mixed("captured")
    for batch in map(int, arguments.batch.split(",")):
        for name, sampling in SAMPLINGS.items():
            driver.begin(batch, sampling)
            measure(name, batch, 0, driver.decodes(batch, arguments.steps))
    report = {"benchmark": "launch", "model": config.model_name, "captured_s": round(captured_s, 2)}
    report |= {"captured_gb": round(captured_gb, 2), "command": " ".join(sys.argv), "results": results}
    print(json.dumps(report | setting()))


if __name__ == "__main__":
    main()
