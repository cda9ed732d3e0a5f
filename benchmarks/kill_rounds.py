"""Kills processes of a loaded server, round after round: how soon clients notice, when it serves again, what leaks.

    python -m benchmarks.kill_rounds [--rounds 50] [--world-size 2] [--device cuda]

Each round opens 32 SSE streams and kills (SIGKILL) a worker, the scheduler or the frontend in turn. Printed per victim:
seconds from the kill to the end of the last open stream and to the first new answer (median, maximum), and how the
streams ended; at the end, the growth of processes, file descriptors, shared memory and held pages over all rounds.
JSON on the last line.
"""

import argparse
import asyncio
import collections
import json
import pathlib
import signal
import statistics
import tempfile
from typing import Any

from tests.checkpoints import make_checkpoint
from tests.killing import kill
from tests.serving import Server

_GPU_START_S = 200.0  # at most; also for workers that restart
SETTLE_S = 0.6  # a death sooner after the last one would count as a group that keeps dying right after its restart


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--world-size", type=int, default=2, choices=(1, 2, 4, 8))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    parallel = {"world_size": arguments.world_size, "device": arguments.device}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "tiny"
        if arguments.device == "cuda":
            from tests.gpu.test_engine_gpu import SHAPE

            checkpoint, start_s = make_checkpoint(path, **SHAPE), _GPU_START_S
            engine = {"num_pages": 256, "page_size": 32, "max_batch_size": 32, "max_prefill_tokens": 256}
        else:
            checkpoint, start_s, engine = make_checkpoint(path), 30.0, {}
        sections = {"model": {"path": str(checkpoint)}, "parallel": parallel, "engine": engine}
        with Server(sections, start_s=start_s) as server:
            result = asyncio.run(_rounds(server, arguments.rounds, arguments.world_size, start_s))
    for victim, row in result["victims"].items():
        print(f"{victim:12} {row}")
    print({key: value for key, value in result.items() if key != "victims"})
    print(json.dumps(result))


async def _rounds(server: Server, rounds: int, world_size: int, back_s: float) -> dict[str, Any]:
    victims = [f"worker {world_size - 1}", "scheduler", "frontend 0"]
    ended: dict[str, list[float]] = collections.defaultdict(list)
    back: dict[str, list[float]] = collections.defaultdict(list)
    ends: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    before = _held(server)
    for number in range(rounds):
        victim = victims[number % len(victims)]
        how, last_end, first_answer = await kill(server, victim, signal.SIGKILL, back_s)
        ends[victim].update(how)
        ended[victim].append(last_end)
        back[victim].append(first_answer)
        await asyncio.sleep(SETTLE_S)
    table = {
        victim: {
            "rounds": len(ended[victim]),
            "streams": dict(ends[victim]),
            "last error s": _median_and_max(ended[victim]),
            "first answer s": _median_and_max(back[victim]),
        }
        for victim in victims
    }
    after = _held(server)
    return {"rounds": rounds, "victims": table, "growth": {key: after[key] - before[key] for key in before}}


def _median_and_max(values: list[float]) -> list[float]:
    return [round(statistics.median(values), 3), round(max(values), 3)]


def _held(server: Server) -> dict[str, float]:
    family = server.family()
    return {
        "processes": len(family),
        "descriptors": sum(process.num_fds() for process in family),
        "shared memory files": len(list(pathlib.Path("/dev/shm").iterdir())),
        "pages": server.metrics()["nmoe:kv_cache_usage_perc"],
    }


if __name__ == "__main__":
    main()
