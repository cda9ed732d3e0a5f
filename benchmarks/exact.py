"""What the exact numerics class costs: forward passes of both classes, on one GPU.

    python -m benchmarks.exact --config configs/benchmark_moonlight.toml [--batches 1,64,256]

Timed are a decode step of each batch size with [benchmark] decode_ctx_len tokens of context, as a CUDA graph, and a
prefill of four prompts of prompt_len tokens; both include the logits. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable

import torch

from nmoe.checkpoint import open_checkpoint
from nmoe.config import load_config
from nmoe.profiles import Numerics
from nmoe.worker.batch import Batch, KVCache
from nmoe.worker.model import load_model

PROMPTS = 4


def decode_batch(rows: int, context: int, page_size: int, vocab: int, device: torch.device) -> Batch:
    """One token per row; every row has a context of `context` tokens and pages of its own."""
    pages = -(-context // page_size)
    table = torch.randperm(rows * pages, device=device).view(rows, pages)
    position = context - 1
    return Batch(
        ids_T=torch.randint(0, vocab, (rows,), device=device),
        positions_T=torch.full((rows,), position, device=device),
        write_T=table[:, position // page_size] * page_size + position % page_size,
        starts=[],
        contexts=[],
        pages_RP=table,
        num_decodes=rows,
    )


def prefill_batch(rows: int, length: int, page_size: int, vocab: int, device: torch.device) -> Batch:
    """`rows` whole prompts of `length` tokens."""
    pages = -(-length // page_size)
    table = torch.randperm(rows * pages, device=device).view(rows, pages)
    positions = torch.arange(length, device=device)
    return Batch(
        ids_T=torch.randint(0, vocab, (rows * length,), device=device),
        positions_T=positions.repeat(rows),
        write_T=(table[:, positions // page_size] * page_size + positions % page_size).flatten(),
        starts=[row * length for row in range(rows + 1)],
        contexts=[length] * rows,
        pages_RP=table,
        num_decodes=0,
    )


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Median device time of one call."""
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batches", default="1,64,256")
    arguments = parser.parse_args()
    config, device = load_config(arguments.config), torch.device("cuda", 0)
    checkpoint, size = open_checkpoint(config), config.engine.page_size
    model = load_model(checkpoint, config, 0, device, lambda *_: None)
    a, context, length = checkpoint.architecture, config.benchmark.decode_ctx_len, config.benchmark.prompt_len
    batches = [int(batch) for batch in arguments.batches.split(",")]
    pages = max(max(batches) * -(-context // size), PROMPTS * -(-length // size))
    cache = KVCache(torch.zeros(a.num_layers, pages + 1, size, a.cache_dim, dtype=model.dtype, device=device))
    cache.rows_LNSC.normal_()
    result: dict[str, dict[str, float]] = {}
    for rows in batches:
        batch = decode_batch(rows, context, size, a.vocab_size, device)
        out_SV = torch.empty(rows, a.vocab_size, dtype=model.dtype, device=device)
        case = result[f"decode ms, batch {rows}"] = {}
        for numerics in Numerics:
            graph = torch.cuda.CUDAGraph()
            for capturing in (False, True):
                with torch.cuda.graph(graph) if capturing else torch.inference_mode():
                    model.logits_into(model.forward(batch, cache, numerics), out_SV, numerics)
            case[numerics.name.lower()] = milliseconds(graph.replay, 30)
    batch = prefill_batch(PROMPTS, length, size, a.vocab_size, device)
    case = result[f"prefill us per token, {PROMPTS} x {length}"] = {}
    for numerics in Numerics:

        def prefill(numerics: Numerics = numerics) -> None:
            model.logits(model.forward(batch, cache, numerics)[:PROMPTS], numerics)

        prefill()
        case[numerics.name.lower()] = milliseconds(prefill, 5) * 1e3 / (PROMPTS * length)
    for name, case in result.items():
        case["ratio"] = case["exact"] / case["fast"]
        print(f"{name:36}" + "".join(f" {key} {value:8.3f}" for key, value in case.items()))
    from benchmarks.setting import setting

    report = {"benchmark": "exact", "model": config.model_name, "results": result, "command": " ".join(sys.argv)}
    print(json.dumps(report | setting()))


if __name__ == "__main__":
    main()
