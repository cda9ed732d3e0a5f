"""What one RDEP exchange costs between CPU workers, without experts and router.

    python -m benchmarks.rdep_cpu [--hidden 2048] [--tokens 0 1 8 64] [--world-sizes 2 4 8] [--exchanges 300]

Every rank pushes its tokens, sends back the rows it received, unchanged (in place of the experts' results), and adds up
what returns, as an MoE layer does in a decode step. Uniform routing, top-8 of 64 experts, float32. Reported per world
size and number of tokens per rank: the median time of an exchange over all ranks, its 99th percentile, and the CPU time
per rank and exchange. With more ranks than cores, an exchange cannot be faster than the ranks' CPU time divided by the
number of cores. JSON on the last line.
"""

import argparse
import json
import os
import statistics
import struct
import sys
import time

import torch

from nmoe.messages import CHANNEL_DECODE
from nmoe.slab import Channel, SlabLayout, make_slabs
from nmoe.worker.kernels.lists import Routes
from nmoe.worker.rdep.shared_memory import SharedMemory

EXPERTS, TOP_K = 64, 8
WARM_UP = 20


def layout_of(world_size: int, hidden: int, tokens: int) -> SlabLayout:
    """A layout with slots for exactly `tokens` tokens per rank."""
    slots, row_bytes = world_size * max(1, tokens), 4 * hidden
    offsets, end = [], 1 << 14
    for row in (4, 8 * TOP_K, row_bytes, row_bytes):
        offsets.append(end)
        end += -(-slots * row // 4096) * 4096
    channel = Channel(max(1, tokens), *offsets)
    return SlabLayout(world_size, EXPERTS // world_size, TOP_K, row_bytes, (channel, channel), end)


def rows_as_they_are(x_SD: torch.Tensor, routes: Routes) -> torch.Tensor:
    """Stands in for the experts."""
    return x_SD


@torch.inference_mode()
def run_rank(link: SharedMemory, rank: int, hidden: int, tokens: int, exchanges: int) -> tuple[list[float], float]:
    """Seconds of each exchange, and CPU seconds of all together."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(tokens, hidden, generator=generator)
    ids_TK = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    weights_TK = torch.rand(tokens, TOP_K, generator=generator)
    link.meet(1, lambda: False, bounded=False)
    link.begin(CHANNEL_DECODE, tokens)
    times, cpu = [], 0.0
    for number in range(WARM_UP + exchanges):
        if number == WARM_UP:
            cpu = time.process_time()
        started = time.perf_counter()
        link.dispatch(rows_as_they_are, x_TD, Routes(ids_TK, weights_TK))()
        times.append(time.perf_counter() - started)
    link.check()
    return times[WARM_UP:], time.process_time() - cpu


def measure(world_size: int, hidden: int, tokens: int, exchanges: int) -> dict[str, float]:
    """One run: fork the ranks, gather their times."""
    layout = layout_of(world_size, hidden, tokens)
    memory = make_slabs(layout)
    assert memory is not None
    readers = []
    for rank in range(world_size):
        reader, writer = os.pipe()
        if os.fork() == 0:
            link = SharedMemory(layout, memory, rank, torch.float32)
            times, cpu = run_rank(link, rank, hidden, tokens, exchanges)
            os.write(writer, struct.pack(f"<{exchanges + 1}d", cpu, *times))
            os._exit(0)
        os.close(writer)
        readers.append(reader)
    times, cpus = [], []
    for reader in readers:
        with os.fdopen(reader, "rb") as file:
            cpu, *its_times = struct.unpack(f"<{exchanges + 1}d", file.read())
        times += its_times
        cpus.append(cpu / exchanges)
        os.wait()
    return {
        "median_us": statistics.median(times) * 1e6,
        "p99_us": statistics.quantiles(times, n=100)[-1] * 1e6,
        "cpu_us_per_rank": statistics.mean(cpus) * 1e6,
    }


def main() -> None:
    """Print a table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs="+", default=[0, 1, 8, 64], help="per rank")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--exchanges", type=int, default=300)
    args = parser.parse_args()
    results = []
    print(f"{'world':>5} {'tokens':>6} {'median us':>10} {'p99 us':>10} {'cpu us/rank':>12}")
    for world_size in args.world_sizes:
        for tokens in args.tokens:
            row = measure(world_size, args.hidden, tokens, args.exchanges)
            results.append({"world_size": world_size, "tokens": tokens, **row})
            numbers = row["median_us"], row["p99_us"], row["cpu_us_per_rank"]
            print(f"{world_size:>5} {tokens:>6} {numbers[0]:>10.0f} {numbers[1]:>10.0f} {numbers[2]:>12.0f}")
            sys.stdout.flush()
    cores = len(os.sched_getaffinity(0))
    print(json.dumps({"benchmark": "rdep_cpu", "hidden": args.hidden, "cores": cores, "results": results}))


if __name__ == "__main__":
    main()
