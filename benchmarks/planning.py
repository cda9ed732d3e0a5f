"""What the scheduler's policy costs per step: 8 ranks with 256 running rows each, no sockets.

    python benchmarks/planning.py [--ranks 8] [--rows 256] [--steps 600] [--frontends 1]

All requests decode in every step; two steps are in flight. The parts of a step are timed separately:
    plan       pages for rows that need another one, and the Step of every rank as a Python object
    encode     those Steps to bytes
    decode     the workers' StepDones from bytes
    complete   the tokens into the slots, ends of requests, and one Tokens message per frontend
    deliver    those messages to bytes
in microseconds of CPU time. In `decode`, rows reach the end of their 64-token pages in different steps, as in a server
that has run for a while; in `aligned`, all do so in the same step. `mixed` adds the cost of arrivals and ends: in every
step, one request in 256 ends and another takes its place. `records` is `decode` with the ten likeliest tokens of every
position sent to the frontends as well. The last line is JSON.
"""

import argparse
import gc
import json
import statistics
import time

import msgspec
import numpy as np

from nmoe.messages import ROW_RETURNS, ROW_SAMPLES, Sampling, Step, StepDone, Submit, WorkerToScheduler, make_uid
from nmoe.outputs import Returns, pack
from nmoe.scheduler.cells import Cells
from nmoe.scheduler.limits import Limits
from nmoe.scheduler.scheduler import Scheduler

_PAGE = 64
_RECORDS = Returns(records=True, top_k=10)
_BLOCK = pack(b"", bytes(_RECORDS.record_bytes), 1, b"", 0)
_PARTS = ("plan", "encode", "decode", "complete", "deliver")


class Workers:
    """Answers Steps in the workers' place, with one token for every row that samples."""

    def __init__(self, ranks: int) -> None:
        self._sampling = [0] * ranks
        self._returning = [0] * ranks
        self._encode = msgspec.msgpack.Encoder().encode

    def answer(self, rank: int, step: Step) -> bytes:
        """The StepDone for one rank's Step."""
        if step.rows is not None:
            rows = np.frombuffer(step.rows, np.int32).reshape(-1, 4)
            self._sampling[rank] = int(np.count_nonzero(rows[:, 3] & ROW_SAMPLES))
            self._returning[rank] = int(np.count_nonzero(rows[:, 3] & ROW_RETURNS))
        blocks = self._returning[rank]
        sizes = np.full(blocks, len(_BLOCK), np.int32).tobytes()
        tokens = bytes(4 * self._sampling[rank])
        return self._encode(StepDone(1, rank, step.step_id, tokens, None, _BLOCK * blocks, sizes))


class Load:
    """A scheduler with all its rows running."""

    def __init__(self, ranks: int, rows: int, frontends: int, spread: bool, lengths: range, returns: Returns) -> None:
        self.ranks = ranks
        self._frontends, self._spread, self._lengths, self._returns = frontends, spread, lengths, returns
        limits = Limits(
            world_size=ranks,
            num_pages=rows * 80,
            page_size=_PAGE,
            max_batch_size=rows,
            num_slots=2 * rows,
            max_prefill_tokens=1 << 20,  # everything begins in the first step
            max_seq_len=4096,
            max_queue=1 << 20,
            cells_per_rank=519,
            vocab_size=129_280,
        )
        self.scheduler = Scheduler(limits, Cells(ranks, limits.cells_per_rank))
        self._workers = Workers(ranks)
        self._rng = np.random.default_rng(0)
        self._submitted = 0
        self._unanswered: list[list[bytes]] = []
        self.ended = 0
        for _ in range(ranks * rows):
            self.submit()

    def submit(self) -> None:
        """Submit one more request."""
        length = int(self._rng.integers(_PAGE, 3 * _PAGE)) if self._spread else 2 * _PAGE
        ids = self._rng.integers(0, 100_000, length, dtype=np.int32)
        count = self._lengths[self._submitted % len(self._lengths)]
        uid = make_uid(self._submitted % self._frontends, 1, self._submitted)
        self._submitted += 1
        submit = Submit(1, uid, ids.tobytes(), count, Sampling(), (1, 2), returns=self._returns)
        self.scheduler.submit(submit, 0.0)

    def step(self, times: dict[str, list[float]]) -> None:
        """Plan one step, and complete the one before it."""
        encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(WorkerToScheduler).decode
        clock = time.thread_time  # so that other work on the machine does not count
        begin = clock()
        steps = self.scheduler.plan(begin)
        planned = clock()
        for step in steps or ():
            encode(step)
        encoded = clock()
        if steps:
            self._unanswered.append([self._workers.answer(rank, step) for rank, step in enumerate(steps)])
        spent = [planned - begin, encoded - planned, 0.0, 0.0, 0.0]
        if len(self._unanswered) == 2:
            answers = self._unanswered.pop(0)
            received = clock()
            done = [decode(answer) for answer in answers]
            decoded = clock()
            for answer in done:
                self.scheduler.complete(answer, decoded)
            messages = self.scheduler.drain()
            completed = clock()
            for _, message in messages:
                encode(message)
            spent[2:] = [decoded - received, completed - decoded, clock() - completed]
            self.ended = sum(len(message.ended) for _, message in messages)
        for part, seconds in zip(_PARTS, spent, strict=True):
            times[part].append(seconds * 1e6)


def measure(load: Load, steps: int, replace: bool) -> dict[str, dict[str, float]]:
    """Median, mean, 99th percentile and maximum of each part, in microseconds."""
    warm: dict[str, list[float]] = {part: [] for part in _PARTS}
    while load.scheduler.num_waiting or load.scheduler.num_running == 0:
        load.step(warm)
    for _ in range(80):
        load.step(warm)
        for _ in range(load.ended if replace else 0):
            load.submit()
    gc.collect()
    gc.freeze()
    gc.disable()
    times: dict[str, list[float]] = {part: [] for part in _PARTS}
    for _ in range(steps):
        load.step(times)
        for _ in range(load.ended if replace else 0):
            load.submit()
    gc.enable()
    totals = [sum(parts) for parts in zip(*times.values(), strict=True)]
    return {part: _summary(values) for part, values in (*times.items(), ("total", totals))}


def _summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 1),
        "mean": round(statistics.fmean(values), 1),
        "p99": round(float(np.percentile(values, 99)), 1),
        "max": round(max(values), 1),
    }


def main() -> None:
    """Run all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rows", type=int, default=256, help="per rank")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--frontends", type=int, default=1)
    arguments = parser.parse_args()
    forever = range(3900, 3901)
    cases = {
        "decode": (True, forever, False, Returns()),
        "aligned": (False, forever, False, Returns()),
        "mixed": (True, range(200, 313), True, Returns()),
        "records": (True, forever, False, _RECORDS),
    }
    results = {}
    for name, (spread, lengths, replace, returns) in cases.items():
        load = Load(arguments.ranks, arguments.rows, arguments.frontends, spread, lengths, returns)
        results[name] = measure(load, arguments.steps, replace)
        for part, numbers in results[name].items():
            print(f"{name:8} {part:9}" + "".join(f"  {key} {value:8.1f}" for key, value in numbers.items()) + "  us")
    print(json.dumps({"benchmark": "planning", **vars(arguments), "microseconds": results}))


if __name__ == "__main__":
    main()
