"""Where a step's time goes: every kernel of a layer, timed alone and compared with what it must read or compute.

    python -m benchmarks.kernels --config configs/benchmark_moonlight.toml [--batch 1,16,64,128,256] [--prompts 4]

Each operation runs in a CUDA graph, for all layers in turn, so that its weights come from memory and not from a cache;
times are per layer. The floor is the larger of two times: its bytes at the read bandwidth, and its multiply-adds at the
rate of a matmul, both measured here (FP8 is assumed to be twice as fast). Decode rows have [benchmark] decode_ctx_len
tokens of context; the prefill is --prompts prompts of [benchmark] prompt_len tokens at once. The last line is JSON.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.ceilings import measure, median_ms
from benchmarks.setting import setting
from nmoe.checkpoint import open_checkpoint
from nmoe.config import load_config
from nmoe.profiles import Numerics
from nmoe.worker.batch import Batch, KVCache
from nmoe.worker.inputs import Layout
from nmoe.worker.kernels import ops_for
from nmoe.worker.kernels.fp8 import Activations, BlockFP8, unquantised
from nmoe.worker.kernels.fp8_triton import quantise
from nmoe.worker.kernels.mla_decode_triton import absorbed_decode
from nmoe.worker.kernels.mla_prefill_triton import expanded_chunks
from nmoe.worker.kernels.sampling_triton import PARAMETERS, sample_rows
from nmoe.worker.model import load_model
from nmoe.worker.model.mla_gpu import GPUPlan

GPU = torch.device("cuda", 0)
# Name, the operation on layer i, bytes, multiply-adds, and whether these are in FP8.
Operation = tuple[str, Callable[[int], object], float, float, bool]


class Bench:
    """A model, and steps for it."""

    def __init__(self, path: str) -> None:
        self.config = load_config(path)
        checkpoint = open_checkpoint(self.config)
        self.a = checkpoint.architecture
        self.model: Any = load_model(checkpoint, self.config, 0, GPU, lambda *_: None)
        self.layers = [layer for layer in self.model._layers if hasattr(layer.mlp, "_gate")]
        self.fp8 = self.a.quant_block is not None
        self.ops = ops_for(GPU, Numerics.FAST, fp8=self.fp8)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=GPU, dtype=torch.bfloat16)

    def batch(self, rows: int, tokens: int, context: int) -> tuple[Batch, KVCache]:
        """Rows with `tokens` tokens each, the last ones of their `context`; a one-layer cache that all layers use."""
        size = self.config.engine.page_size
        per_row = -(-context // size)
        pages = torch.randperm(rows * per_row, device=GPU, dtype=torch.int32).view(rows, per_row)
        row, position = torch.arange(rows * tokens, device=GPU) // tokens, torch.arange(rows * tokens, device=GPU)
        position = (context - tokens + position % tokens).int()
        places = pages[row, position // size] * size + position % size
        ids = torch.randint(0, self.a.vocab_size, (rows * tokens,), device=GPU)
        starts = list(range(0, rows * tokens + 1, tokens))
        decodes = rows if tokens == 1 else 0
        cache = KVCache(self.random(1, rows * per_row + 1, size, self.a.cache_dim))
        return Batch(ids, position, places, starts, [context] * rows, pages, decodes), cache

    def step(self, rows: int, tokens: int, context: int) -> Iterator[Operation]:
        """The operations of one layer."""
        a, ops, layers = self.a, self.ops, self.layers
        batch, cache = self.batch(rows, tokens, context)
        plan = GPUPlan.of(batch, cache, self.model._rope_M2P, a)
        total, heads, eps = rows * tokens, a.num_heads, a.rms_norm_eps
        x, delta, kv = self.random(total, a.hidden_size), self.random(total, a.hidden_size), cache.rows_LNSC[0]
        cached = kv.flatten(0, 1)
        q, kv_in = self.random(total, heads, a.qk_head_dim), self.random(total, a.cache_dim)
        row = total * a.hidden_size * 2.0

        def attention(i: int) -> Any:
            return layers[i].attention

        yield "add and norm", lambda i: ops.add_rms_norm(x, delta, layers[i].mlp_norm_D, eps), 4 * row, 0, False
        yield self.product("in-projection", self.normed(x), lambda i: attention(i)._w_in_ID)
        if attention(0)._w_q_b is not None:
            low = self.random(total, a.q_lora_rank or 0)
            yield self.product("query projection", self.normed(low), lambda i: attention(i)._w_q_b)
        absorbed = self.random(heads, batch.num_decodes, a.kv_lora_rank).transpose(0, 1)
        absorbing = float(absorbed.numel() * a.qk_nope_head_dim)
        entered = 2.0 * total * (2 * a.cache_dim + 2 * heads * a.qk_rope_head_dim)
        if batch.num_decodes:
            entered += 2.0 * (heads * a.qk_nope_head_dim * a.kv_lora_rank + absorbed.numel())
        enter = lambda i: plan.enter(q, kv_in, attention(i)._kv_norm_L, cached, attention(i)._up, absorbed)  # noqa: E731
        yield "rope, cache row, absorb", enter, entered, absorbing, False
        pairs = total * context - rows * tokens * (tokens - 1) / 2
        up_size = float(heads * (a.qk_nope_head_dim + a.v_head_dim) * a.kv_lora_rank)
        if tokens == 1:
            yield from self.decode_attention(plan, batch, q, cached, context)
        else:
            expanding = rows * context * up_size
            macs = expanding + pairs * heads * (a.qk_head_dim + a.v_head_dim)
            moved = 2 * (rows * context * a.cache_dim + up_size + 2 * q.numel())
            yield "expand and attend", self.expanded(plan, batch, q, cached), moved, macs, False
        values = self.random(total, heads * a.v_head_dim)
        yield self.product("out-projection", values, lambda i: attention(i)._w_o, ops.linear_to_add)
        gate = float(layers[0].mlp._gate.nbytes)  # random weights need all three bfloat16 terms of the router
        route = lambda i: ops.route(x, layers[i].mlp._gate, layers[i].mlp._bias_E, a, listed=True)  # noqa: E731
        yield "router", route, gate + row, total * a.num_experts * a.hidden_size, False
        width = 1 if self.fp8 else 2
        shared = 3.0 * a.num_shared_experts * a.moe_intermediate_size * a.hidden_size
        given = self.normed(x)
        mlp = lambda i: layers[i].mlp._shared.forward(given, ops)  # noqa: E731
        yield "shared experts", mlp, shared * width + 2 * row, total * shared, self.fp8
        routing = [route(i) for i in range(len(layers))]
        used = sum(float(len(routes.ids_TK.unique())) for routes in routing) / len(routing)
        expert = 3.0 * a.moe_intermediate_size * a.hidden_size

        def experts(i: int) -> object:
            routing[i].lists.renew()  # two fills, some microseconds
            return ops.grouped_mlp(given, routing[i], layers[i].mlp._w_gate_up, layers[i].mlp._w_down)

        moved = used * expert * width + row * (1 + a.num_experts_per_tok)
        macs = total * a.num_experts_per_tok * expert
        yield "experts", experts, moved, macs, self.fp8
        if ops.takes_shared(total, a):
            both = self.one_kernel(routing, given)
            yield "experts with shared", both, moved + shared * width, macs + total * shared, self.fp8

    def one_kernel(self, routing: list[Any], given: Activations) -> Callable[[int], object]:
        """Routed and shared experts in the one kernel that computes both in a decode step."""
        mlps = [layer.mlp for layer in self.layers]

        def experts(i: int) -> object:
            routing[i].lists.renew()
            shared = mlps[i]._shared.weights
            return self.ops.mlp_with_shared(given, routing[i], mlps[i]._w_gate_up, mlps[i]._w_down, shared)

        return experts

    def normed(self, x: torch.Tensor) -> Activations:
        """`x` as a norm outputs it: quantised in an FP8 model."""
        return quantise(x) if self.fp8 else x

    def expanded(self, plan: GPUPlan, batch: Batch, q: torch.Tensor, cached: torch.Tensor) -> Callable[[int], object]:
        """Attention of whole prompts."""
        (chunks,), size = plan.chunks, self.config.engine.page_size
        out = self.random(*q.shape[:2], self.a.v_head_dim)
        w = [layer.attention._up.w_HXL for layer in self.layers]
        return lambda i: expanded_chunks(q, cached, batch.pages_RP, w[i], chunks, size, 0.07, out)

    def decode_attention(
        self, plan: GPUPlan, batch: Batch, q: torch.Tensor, cached: torch.Tensor, context: int
    ) -> Iterator[Operation]:
        """Attention of decode rows over their pages, including the projection to values."""
        a, rows, heads = self.a, len(q), self.a.num_heads
        latent, out = self.random(heads, rows, a.kv_lora_rank), self.random(rows, heads, a.v_head_dim)
        value, size = a.v_head_dim, self.config.engine.page_size
        w = [layer.attention._up.w_uv_HVL for layer in self.layers]
        assert plan.contexts_R is not None and plan.prefix is not None
        where = batch.pages_RP, plan.contexts_R, plan.prefix, size, 0.07
        macs = rows * heads * (context * (a.cache_dim + a.kv_lora_rank) + value * a.kv_lora_rank)
        moved = rows * context * a.cache_dim + q.numel() + latent.numel() + heads * value * a.kv_lora_rank + out.numel()
        attend = lambda i: absorbed_decode(latent, q, cached, *where, w[i], out)  # noqa: E731
        yield "attend, values", attend, 2.0 * moved, macs, False

    def product(
        self, name: str, x: Activations, weight: Callable[[int], Any], linear: Callable[..., Any] | None = None
    ) -> Operation:
        """The product of every token's vector with a layer's weight, by `linear` instead of the plain product."""
        linear = linear or self.ops.linear
        one = weight(0)
        quantised = isinstance(one, BlockFP8)
        outputs, inputs = (one.values if quantised else one).shape
        tokens = len(unquantised(x))
        moved = outputs * inputs * (1 if quantised else 2) + 2 * tokens * (inputs + outputs)
        return name, lambda i: linear(x, weight(i)), float(moved), float(tokens * outputs * inputs), quantised

    def end(self, rows: int) -> Iterator[Operation]:
        """What a step does once: the output head (a product with the vocabulary matrix), and sampling."""
        vocab, hidden = self.model._head_VD.shape
        x, logits = self.random(rows, hidden), self.random(rows, vocab)
        parts = Layout(rows, rows)
        words = parts.parts(torch.zeros(parts.size, dtype=torch.int32, device=GPU))
        table, last = torch.zeros(1, PARAMETERS, dtype=torch.int64, device=GPU), words.ids
        into = lambda i: self.model.logits_into(x, logits, Numerics.FAST)  # noqa: E731
        yield "head", into, 2.0 * (vocab * hidden + rows * vocab), rows * vocab * hidden, False
        slots, ends = words.sampling_slots, words.sampling_ends
        take = lambda i: sample_rows(logits, slots, ends, table, last, filtered=False)  # noqa: E731
        yield "largest logit", take, 2.0 * rows * vocab, 0, False


@torch.inference_mode()
def captured_us(function: Callable[[int], object], count: int) -> float:
    """Microseconds per call, of `count` calls captured in one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for i in range(count):
            function(i)
        graph.capture_end()
    return median_ms(graph.replay, repeats=8) / count * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", default="1,16,64,128,256")
    parser.add_argument("--prompts", type=int, default=4)
    arguments = parser.parse_args()
    bench, ceilings = Bench(arguments.config), measure()
    benchmark, results = bench.config.benchmark, []
    layers = len(bench.layers)

    def table(kind: str, size: int, operations: Iterator[Operation], count: int) -> None:
        for name, function, moved, macs, quantised in operations:
            bytes_us = moved / ceilings["read_gb_s"] / 1e3
            product_us = 2 * macs / ceilings["product_tflop_s"] / 1e6 / (2 if quantised else 1)
            took, floor = captured_us(function, count), max(bytes_us, product_us)
            result = {"step": kind, "size": size, "kernel": name, "megabytes": round(moved / 1e6, 2)}
            result |= {"gflop": round(2 * macs / 1e9, 2), "us": round(took, 2), "floor_us": round(floor, 2)}
            results.append(result | {"of_floor": round(floor / took, 3)})
            print(" ".join(f"{value:>18}" for value in results[-1].values()), flush=True)

    with torch.inference_mode():
        for rows in map(int, arguments.batch.split(",")):
            table("decode", rows, bench.step(rows, 1, benchmark.decode_ctx_len), layers)
            table("decode, once", rows, bench.end(rows), 8)
        prompt = benchmark.prompt_len
        table("prefill", arguments.prompts * prompt, bench.step(arguments.prompts, prompt, prompt), layers)
    report = {"benchmark": "kernels", "model": bench.config.model_name, "ceilings": ceilings}
    report |= {"command": " ".join(sys.argv), "results": results}
    print(json.dumps(report | setting()))


if __name__ == "__main__":
    main()
