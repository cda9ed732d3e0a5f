"""What one RDEP exchange costs between GPUs, in a CUDA graph: dispatch, return, both, and both with the experts.
The dispatch is timed with a return of flags alone, without which ranks would drift apart; the return's time is what its
rows add to that.

    python -m benchmarks.rdep [--shapes moonlight v3] [--tokens 1 8 32 128 256 1024 4096] [--world-size N]

With two GPUs or more, there is a process per GPU, and every result includes NCCL's all-to-all of as many bytes, also in
a CUDA graph. With one GPU, the ranks (two by default) are streams of one process: this shows what the kernels and the
protocol cost, but the ranks share one GPU's bandwidth and there is no link between them; the output says so.
An exchange ends when the owners' sums are back: the norm that follows adds them up, as it adds up a single GPU's own
terms. Routing is uniform. The floor is the bytes that a rank sends to the others and gets back (on one GPU: all bytes
of all ranks, also those to themselves), over the bandwidth of a copy measured in the same run. Times are medians over
replays of a graph of 16 exchanges; JSON on the last line.
"""

import argparse
import dataclasses
import json
import mmap
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from benchmarks.setting import setting
from nmoe import envs
from nmoe.architecture import Architecture
from nmoe.config import Config, Engine, Parallel
from nmoe.config_json import read_architecture
from nmoe.messages import CHANNEL_DECODE
from nmoe.slab import ControlLayout, SlabLayout
from nmoe.worker.kernels.lists import Routes

SHAPES = {"moonlight": "configs/models/moonlight.json", "v3": "configs/models/deepseek-v3.json"}
LAYERS, REPLAYS = 16, 12
BF16 = torch.bfloat16


@dataclasses.dataclass
class Rank:
    """One rank's end of the exchange, its stream, tokens and experts; `parts_SKD` replaces the experts' results."""

    link: Any  # BetweenGPUs
    stream: torch.cuda.Stream
    tokens: tuple[torch.Tensor, Routes]
    parts_SKD: torch.Tensor
    mlp: Callable[..., torch.Tensor]


def layout_of(architecture: Architecture, world_size: int, tokens: int) -> SlabLayout:
    """A layout with slots for exactly `tokens` tokens per rank."""
    engine = Engine(max_batch_size=tokens, max_prefill_tokens=world_size)
    parallel = Parallel(world_size=world_size, device="cuda")
    return SlabLayout.of(architecture, "bfloat16", Config(parallel=parallel, engine=engine))


def make_mlp(a: Architecture, num_experts: int, device: torch.device) -> Callable[..., torch.Tensor]:
    """One rank's experts with random weights."""
    from nmoe.worker.kernels import experts_fp8_gluon, experts_gluon
    from nmoe.worker.kernels.expert_weights import empty_experts
    from nmoe.worker.kernels.fp8 import BlockFP8

    shapes = (2 * a.moe_intermediate_size, a.hidden_size), (a.hidden_size, a.moe_intermediate_size)
    like, fp8 = torch.empty(0, device=device, dtype=BF16), a.quant_block is not None
    weights = [empty_experts(like, num_experts, *shape, fp8=fp8) for shape in shapes]
    for weight in weights:
        if isinstance(weight, BlockFP8):
            weight.values.view(torch.uint8).random_(0, 120)
            weight.scales.fill_(1e-4)
        else:
            weight.normal_(0.0, 0.02)
    grouped_mlp = experts_fp8_gluon.grouped_mlp if fp8 else experts_gluon.grouped_mlp
    return lambda x, routes: grouped_mlp(x, routes, *weights)


def make_rank(
    a: Architecture,
    layout: SlabLayout,
    slab: torch.Tensor,
    bases: list[int],
    control: Any,
    rank: int,
    tokens: int,
    mlp: Callable[..., torch.Tensor],
) -> Rank:
    """Rank `rank` with `tokens` random tokens."""
    from nmoe.worker.rdep.between_gpus import BetweenGPUs

    link = BetweenGPUs(layout, slab, bases, control, rank, BF16, expected_rows=layout.world_size * tokens)
    generator = torch.Generator(slab.device).manual_seed(rank)
    x_TD = torch.randn(tokens, a.hidden_size, device=slab.device, generator=generator).to(BF16)
    scores_TE = torch.rand(tokens, a.num_experts, device=slab.device, generator=generator)
    ids_TK = scores_TE.topk(a.num_experts_per_tok).indices.int()
    weights_TK = torch.rand(ids_TK.shape, device=slab.device, generator=generator)
    rows = min(link._tile_rows, layout.world_size * tokens)
    parts_SKD = torch.zeros(rows, layout.top_k, a.hidden_size, device=slab.device, dtype=BF16)
    return Rank(link, torch.cuda.Stream(slab.device), (x_TD, Routes(ids_TK, weights_TK)), parts_SKD, mlp)


def run(rank: Rank, what: str) -> None:
    """One exchange, or the part of it that `what` names."""

    def nothing(x: Any, routes: Routes) -> torch.Tensor:
        return rank.parts_SKD[: len(routes.ids_TK)]

    if what == "dispatch":
        lists = rank.link._empty_lists()
        rank.link._push(*rank.tokens, lists)
        rank.link._arrive(lists)
        rank.link._num_rows.zero_()
        rank.link._serve(nothing, lists)
    elif what == "both":
        rank.link.dispatch(nothing, *rank.tokens)()
    else:
        rank.link.dispatch(rank.mlp, *rank.tokens)()


def capture(rank: Rank, what: str) -> torch.cuda.CUDAGraph:
    """A graph of LAYERS exchanges."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=rank.stream):
        for _ in range(LAYERS):
            run(rank, what)
    return graph


def time_graphs(pairs: list[tuple[Rank, torch.cuda.CUDAGraph]], barrier: Callable[[], None]) -> float:
    """Median microseconds per exchange of a graph, from this process's first rank's start to its last one's end."""
    times = []
    for _ in range(REPLAYS):
        torch.cuda.synchronize()
        barrier()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(pairs[0][0].stream)
        for rank, graph in pairs:
            with torch.cuda.stream(rank.stream):
                graph.replay()
        for rank, _ in pairs[1:]:
            pairs[0][0].stream.wait_stream(rank.stream)
        end.record(pairs[0][0].stream)
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAYERS)
    return statistics.median(times[2:])


def pushed_bytes(a: Architecture, layout: SlabLayout, rank: Rank, own: bool) -> tuple[int, int]:
    """Bytes that this rank pushes for a dispatch, and bytes pushed back to it; with or without its `own` share."""
    owners_TN = (rank.tokens[1].ids_TK // layout.num_experts)[..., None] == torch.arange(
        layout.world_size, device="cuda"
    )
    wanted_N = owners_TN.any(1).sum(0)
    rows = int(wanted_N.sum()) - (0 if own else int(wanted_N[rank.link._rank]))
    row = a.hidden_size * (1 + 1 / 32) if layout.quantised else layout.row_bytes
    return int(rows * (row + 8 * layout.top_k + 4)), rows * layout.row_bytes


def copy_gb_s(device: torch.device, peer: torch.device) -> float:
    """Bandwidth of a large copy in GB/s, counting only the bytes that arrive."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=place) for place in (device, peer))
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return source.numel() / min(times) / 1e9


def figures(ranks: list[Rank], barrier: Callable[[], None], sent: tuple[int, int], gb_s: float) -> dict[str, float]:
    """Microseconds of each part of an exchange, and of its floor."""
    micros = {}
    for what in ("dispatch", "both", "with experts"):
        pairs = [(rank, capture(rank, what)) for rank in ranks]
        micros[what] = time_graphs(pairs, barrier)
    floor = sum(sent) / gb_s / 1e3
    return {
        "dispatch_us": micros["dispatch"],
        "return_us": micros["both"] - micros["dispatch"],
        "both_us": micros["both"],
        "floor_us": floor,
        "with_experts_us": micros["with experts"],
    }


def in_one_process(shapes: list[str], counts: list[int], world_size: int) -> list[dict[str, Any]]:
    """All ranks on the one GPU."""
    from nmoe.worker.rdep.control import Control

    device, results, pages = torch.device("cuda", 0), [], []
    gb_s = copy_gb_s(device, device)
    for shape in shapes:
        a = read_architecture(SHAPES[shape])
        mlp = make_mlp(a, a.num_experts // world_size, device)  # one for all ranks, since only time matters
        for tokens in counts:
            layout = layout_of(a, world_size, tokens)
            pages.append(ControlLayout(world_size).make())
            control = Control(ControlLayout(world_size), pages[-1])
            slabs = [torch.zeros(layout.slab_bytes, dtype=torch.uint8, device=device) for _ in range(world_size)]
            bases = [slab.data_ptr() for slab in slabs]
            ranks = [make_rank(a, layout, slabs[i], bases, control, i, tokens, mlp) for i in range(world_size)]
            start_life(ranks, 1)
            ranks[0].link.leave()  # so that no rank waits for others while kernels are compiled
            for rank in ranks:
                with torch.cuda.stream(rank.stream):
                    rank.link.begin(CHANNEL_DECODE, tokens)
                    for what in ("dispatch", "both", "with experts"):
                        run(rank, what)
            start_life(ranks, 2)
            sent = [pushed_bytes(a, layout, rank, own=True) for rank in ranks]
            total = sum(there for there, _ in sent), sum(back for _, back in sent)
            results.append({"shape": shape, "tokens": tokens, **figures(ranks, lambda: None, total, gb_s)})
            show(results[-1])
            assert all(rank.link.check() for rank in ranks)
    print("all ranks share one GPU: its bandwidth is divided among them, and nothing crosses a link")
    return results


def start_life(ranks: list[Rank], life: int) -> None:
    """Let ranks of one process `meet`: each but the last finds that others are missing, and does not wait for them."""
    torch.cuda.synchronize()
    for rank in ranks:
        rank.link.meet(life, lambda: True, bounded=False)


def in_processes(rank: int, world_size: int, shapes: list[str], counts: list[int], page: mmap.mmap, folder: str) -> Any:
    """Measure as one rank, on its own GPU. Returns the results, which rank 0 also prints."""
    from nmoe.worker.rdep.control import Control
    from nmoe.worker.rdep.symmetric import PeerSlabs

    device, results = torch.device("cuda", rank), []
    torch.cuda.set_device(device)
    control = Control(ControlLayout(world_size), page)
    gb_s = copy_gb_s(device, torch.device("cuda", (rank + 1) % world_size))
    cases = [(shape, tokens, read_architecture(SHAPES[shape])) for shape in shapes for tokens in counts]
    layouts = [layout_of(a, world_size, tokens) for _, tokens, a in cases]
    peers = PeerSlabs(
        max(layout.slab_bytes for layout in layouts), rank, world_size, device, pathlib.Path(folder, "meeting")
    )
    store = dist.FileStore(str(pathlib.Path(folder, "nccl")), world_size)  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world_size, device_id=device)
    mlps = {shape: make_mlp(a, a.num_experts // world_size, device) for shape, _, a in cases}
    sizes = []
    for life, ((shape, tokens, a), layout) in enumerate(zip(cases, layouts, strict=True), 1):
        slab = peers.slab[: layout.slab_bytes]
        mine = make_rank(a, layout, slab, peers.bases, control, rank, tokens, mlps[shape])
        mine.link.meet(life, lambda: False, bounded=False)
        mine.link.begin(CHANNEL_DECODE, tokens)
        with torch.cuda.stream(mine.stream):
            for what in ("dispatch", "both", "with experts"):
                run(mine, what)
        sizes.append(pushed_bytes(a, layout, mine, own=False))
        results.append({"shape": shape, "tokens": tokens, **figures([mine], dist.barrier, sizes[-1], gb_s)})
        if rank == 0:
            show(results[-1])
        assert mine.link.check()
        dist.barrier()
    for row, sent in zip(results, sizes, strict=True):
        row["nccl_us"] = nccl_us(mine, sent, world_size)
        if rank == 0:
            show(row)
    dist.destroy_process_group()
    return results


def nccl_us(rank: Rank, sent: tuple[int, int], world_size: int) -> float:
    """Microseconds of NCCL's all-to-all of as many bytes, both ways, in a graph; an all-to-all needs the same number of
    bytes from every rank, so all send as many as the largest does."""
    pairs = []
    most = torch.tensor(sent, device=rank.parts_SKD.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    for size in most.tolist():
        each = max(1, size // (world_size - 1)) * world_size
        pairs.append(tuple(torch.zeros(each, dtype=torch.uint8, device=rank.parts_SKD.device) for _ in range(2)))

    def move() -> None:
        for target, source in pairs:
            dist.all_to_all_single(target, source)

    with torch.cuda.stream(rank.stream):
        move()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=rank.stream):
        for _ in range(LAYERS):
            move()
    micros = time_graphs([(rank, graph)], dist.barrier)
    del graph  # destroying the process group while the graph lives would hang
    return micros


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    numbers = "  ".join(f"{name} {value:8.1f}" for name, value in row.items() if name.endswith("_us"))
    print(f"{row['shape']:>9} {row['tokens']:>5}  {numbers}  both/floor {row['both_us'] / row['floor_us']:.2f}")
    sys.stdout.flush()


def fork_ranks(world_size: int, shapes: list[str], counts: list[int]) -> list[dict[str, Any]]:
    """Fork a process per GPU. Returns rank 0's results."""
    page = ControlLayout(world_size).make()
    with tempfile.TemporaryDirectory(prefix="nmoe-rdep-") as folder:
        pids = []
        for rank in range(world_size):
            if pid := os.fork():
                pids.append(pid)
                continue
            results = in_processes(rank, world_size, shapes, counts, page, folder)
            if rank == 0:
                pathlib.Path(folder, "results").write_bytes(msgspec.json.encode(results))
            os._exit(0)
        ends = [os.waitpid(pid, 0)[1] for pid in pids]
        if any(ends):
            sys.exit(f"ranks ended with {ends}")
        return msgspec.json.decode(pathlib.Path(folder, "results").read_bytes(), type=list[dict[str, Any]])


def main() -> None:
    """Print a table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128, 256, 1024, 4096], help="per rank")
    parser.add_argument("--world-size", type=int, help="default: all GPUs, or two ranks on the only one")
    args = parser.parse_args()
    gpus = torch.cuda.device_count()  # through NVML: no CUDA context before the fork
    world_size = args.world_size or (gpus if gpus > 1 else 2)
    envs.set_for_children(Config(parallel=Parallel(world_size=world_size, device="cuda")))
    os.environ["NCCL_GRAPH_REGISTER"] = "0"  # it hangs with torch's expandable segments
    if apart := gpus >= world_size > 1:
        results = fork_ranks(world_size, args.shapes, args.tokens)
    else:
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # a queue for every stream, since ranks wait for each other
        results = in_one_process(args.shapes, args.tokens, world_size)
    where = "a GPU per rank" if apart else "all ranks on one GPU"
    report = {"benchmark": "rdep", "world_size": world_size, "where": where}
    print(json.dumps(report | setting() | {"command": " ".join(sys.argv), "results": results}))


if __name__ == "__main__":
    main()
