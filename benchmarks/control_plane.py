"""The CPU time that the frontends and the scheduler take, and the delay that they add to steps, with simulated GPUs.

    python -m benchmarks.control_plane [--cases streams,steps,...] [--seconds 6]

The server's real processes run with 8 simulated ranks of 256 rows, which answer every Step after a given time
(benchmarks/simulated_ranks.py). The load comes from a client whose CPU time is not counted (benchmarks/sse_client.py):
prompts of 32 ids, 128 output tokens, one SSE event per token. The cases:
    streams     1, 16, 64, 256 streams at a 5 ms step: streamed tokens/s, tokens per CPU-second of the frontend, and of
                frontend and scheduler together
    steps       256 streams at steps of 2, 5, 15 and 30 ms
    frontends   2,048 streams at a 15 ms step, by 1, 2 and 4 frontend processes
    requests    64 clients that each ask for one token, without streaming
    round_trip  one stream, one step in flight, 1 rank and 8: from a rank's StepDone to the arrival of its next Step
    floor       only the writes, of one event to each of 256 connections that another process reads: CPU microseconds
                per event, median over rounds; no server that sends an event per token costs less on this machine
    planning    the scheduler's policy alone, with 2,048 rows (benchmarks/planning.py), in CPU microseconds
`wait_us` is how long a step waited for the scheduler after the previous step was done, averaged over steps and ranks;
`late_us` is the median over the steps that did wait, and `late` their share. CPU times come from the kernel, in ticks
of 10 ms.
The last line is JSON.
"""

import argparse
import contextlib
import json
import os
import pathlib
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import psutil

from benchmarks import planning, simulated_ranks
from nmoe import children, launch
from nmoe.config import Config, Engine, Model, Parallel, Server
from nmoe.outputs import Returns

DEMO = pathlib.Path(launch.__file__).parent / "demo"
CASES = ("floor", "streams", "steps", "frontends", "requests", "round_trip", "planning")
COLUMNS = ("case", "streams", "step_ms", "frontends", "tokens_s", "requests_s", "per_frontend_cpu_s", "per_cpu_s")
MORE = ("frontend_cpu", "scheduler_cpu", "wait_us", "late", "late_us", "step_bytes", "done_bytes", "gap_ms", "ttft_ms")


@contextlib.contextmanager
def serving(step_ms: float, frontends: int, overlap: bool, ranks: int = 8) -> Iterator[tuple[int, list[int], int]]:
    """Run the server's processes; yields the port, the frontends' process ids and the scheduler's."""
    simulated_ranks.step_seconds = step_ms / 1e3
    config = Config(
        model=Model(path=str(DEMO), name="simulated"),
        parallel=Parallel(world_size=ranks, device="cpu"),
        engine=Engine(num_pages=simulated_ranks.num_pages, max_batch_size=256, enable_overlap=overlap),
        server=Server(processes=frontends, port=0),
    )
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener, tempfile.TemporaryDirectory() as run_dir:
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            _launch(config, listener, pathlib.Path(run_dir), told)
        try:
            os.close(told)
            with os.fdopen(ready, "rb") as pipe:
                if b"ready" not in pipe.readline():
                    raise SystemExit("the server did not start")
                pids: dict[str, list[int]] = {}
                for child in psutil.Process(pid).children():
                    pids.setdefault(child.name().split()[1], []).append(child.pid)
                yield listener.getsockname()[1], pids["frontend"], pids["scheduler"][0]
        finally:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)


def _launch(config: Config, listener: socket.socket, run_dir: pathlib.Path, told: int) -> None:
    """In a child: the launcher, with simulated ranks instead of workers."""
    children._ENTRY["worker"] = "benchmarks.simulated_ranks"
    launch.slabs_for = lambda _: None
    server = launch._Server(config, listener, run_dir)
    try:
        server.run(partial(_tell, told))
    finally:
        server.children.stop(5.0)
        os._exit(0)


def _tell(told: int) -> None:
    os.write(told, b"ready\n")


def measure(
    case: str,
    streams: int,
    step_ms: float,
    arguments: argparse.Namespace,
    *,
    frontends: int = 1,
    clients: int = 1,
    overlap: bool = True,
    ranks: int = 8,
    **load: Any,
) -> dict[str, Any]:
    """One row of the table."""
    with serving(step_ms, frontends, overlap, ranks) as (port, frontend_pids, scheduler_pid):
        load = {"tokens": 128, "seconds": arguments.seconds, "warm": arguments.warm} | load
        load |= {"streams": streams // clients, "pids": [*frontend_pids, scheduler_pid]}
        simulated_ranks.waits[:] = bytes(len(simulated_ranks.waits))
        before = _rank_totals()
        command = [sys.executable, "-m", "benchmarks.sse_client", "127.0.0.1", str(port)]
        running = [
            subprocess.Popen([*command, json.dumps(load | {"seed": seed})], stdout=subprocess.PIPE)
            for seed in range(clients)
        ]
        outputs = [client.communicate()[0] for client in running]
        ranks = [after - earlier for after, earlier in zip(_rank_totals(), before, strict=True)]
    waits = [wait for wait in memoryview(simulated_ranks.waits).cast("d").tolist() if wait]
    found = [json.loads(output) for output in outputs]
    *of_frontends, of_scheduler = found[0]["cpu"]
    work = sum(one["events_s" if load.get("stream", True) else "requests_s"] for one in found)
    steps = max(1.0, ranks[0])
    row = {
        "case": case,
        "streams": streams,
        "step_ms": step_ms,
        "frontends": frontends,
        "tokens_s": round(work),
        "requests_s": round(sum(one["requests_s"] for one in found)),
        "per_frontend_cpu_s": round(work / max(sum(of_frontends), 0.01)),
        "per_cpu_s": round(work / max(sum(of_frontends) + of_scheduler, 0.01)),
        "frontend_cpu": [round(share, 2) for share in of_frontends],
        "scheduler_cpu": round(of_scheduler, 2),
        "wait_us": round(ranks[1] / steps * 1e6),
        "late": round(ranks[2] / steps, 3),
        "late_us": round(statistics.median(waits) * 1e6) if waits else None,
        "step_bytes": round(ranks[3] / steps),
        "done_bytes": round(ranks[4] / steps),
    }
    return row | {name: found[0][name] for name in ("gap_ms", "ttft_ms") if name in found[0]}


def _rank_totals() -> list[float]:
    """Each of simulated_ranks.FIELDS, summed over the ranks."""
    cells = memoryview(simulated_ranks.totals).cast("d").tolist()
    width = len(simulated_ranks.FIELDS)
    return [sum(cells[field::width]) for field in range(width)]


def write_floor(connections: int = 256, rounds: int = 150) -> float:
    """CPU microseconds for writing one event to a connection, not counting the reader's."""
    event = b"e5\r\ndata: " + bytes(215) + b"\n\n\r\n"
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        pid = os.fork()
        if pid == 0:
            _read_all(listener.getsockname(), connections)
        accepted = [listener.accept()[0] for _ in range(connections)]
    took = []
    for _ in range(rounds):
        began = time.thread_time()
        for connection in accepted:
            connection.send(event)
        took.append((time.thread_time() - began) / connections * 1e6)
        time.sleep(0.005)
    for connection in accepted:
        connection.close()
    os.waitpid(pid, 0)
    return round(statistics.median(took), 2)


def _read_all(address: tuple[str, int], connections: int) -> None:
    """In a child: read until the other end closes."""
    epoll = select.epoll()
    sockets = {sock.fileno(): sock for sock in (socket.create_connection(address) for _ in range(connections))}
    for fd in sockets:
        epoll.register(fd, select.EPOLLIN)
    while True:
        for fd, _ in epoll.poll():
            if not sockets[fd].recv(1 << 16):
                os._exit(0)


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of all cases that were asked for."""
    for case in arguments.cases.split(","):
        match case:
            case "streams":
                for streams in (1, 16, 64, 256):
                    yield measure(case, streams, 5, arguments)
            case "steps":
                for step_ms in (2, 5, 15, 30):
                    yield measure(case, 256, step_ms, arguments)
            case "frontends":
                for frontends in (1, 2, 4):
                    yield measure(case, 2048, 15, arguments, frontends=frontends, clients=2)
            case "requests":
                yield measure(case, 64, 2, arguments, tokens=1, stream=False)
            case "round_trip":
                for ranks in (1, 8):
                    yield measure(f"{case} {ranks}", 1, 15, arguments, overlap=False, ranks=ranks)
            case "floor":
                yield {"case": case, "write_us": write_floor()}
            case "planning":
                load = planning.Load(8, 256, 1, True, range(3900, 3901), Returns())
                yield {"case": case, "microseconds": planning.measure(load, 400, False)}
            case _:
                raise SystemExit(f"{case}: no such case")


def main() -> None:
    """Run the cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seconds", type=float, default=6.0, help="of measuring, per row")
    parser.add_argument("--warm", type=float, default=1.5, help="seconds before it")
    arguments = parser.parse_args()
    results = []
    print(" | ".join((*COLUMNS, *MORE)))
    for row in rows(arguments):
        results.append(row)
        print(" | ".join(str(row.get(name, "")) for name in (*COLUMNS, *MORE)) if "streams" in row else row, flush=True)
    print(json.dumps({"benchmark": "control_plane", "cores": os.cpu_count(), "rows": results}))


if __name__ == "__main__":
    main()
