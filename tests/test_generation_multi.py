"""Greedy tokens through HTTP equal transformers', under the load that breaks schedulers.

64 prompts at once, prefilled in chunks, many with shared prefixes, on a page pool so small that cached pages are
evicted and running requests preempted; the metrics say that all of it happened. transformers is asked once per prompt:
if each token is the argmax of its logits given all tokens before, then its own greedy decoding would have given the
same ones.
"""

import asyncio
import random

import aiohttp
import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.serving import Server

SHAPES = {
    "q_lora, grouped routing": {},
    "no q_lora, two dense layers, two shared experts": {
        "q_lora_rank": None,
        "first_k_dense_replace": 2,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
    },
    "YaRN with mscale, tied embeddings, odd dimensions": {
        "tie_word_embeddings": True,
        "qk_nope_head_dim": 20,
        "v_head_dim": 28,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
        },
    },
}
ENGINE = {"num_pages": 48, "page_size": 8, "max_batch_size": 16, "max_prefill_tokens": 48}
NUM_PROMPTS = 64
CASES = [
    *((shape, 1) for shape in SHAPES),
    ("q_lora, grouped routing", 2),
    ("no q_lora, two dense layers, two shared experts", 4),
    ("q_lora, grouped routing", 8),
]


def _prompts(seed: int) -> list[tuple[list[int], int]]:
    """Prompts of random length, half of them beginning with one of three prefixes, and how much to generate."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(256) for _ in range(n)] for n in (16, 40, 80)]
    prompts = []
    for _ in range(NUM_PROMPTS):
        prefix = rng.choice(prefixes) if rng.random() < 0.5 else []
        tail = [rng.randrange(256) for _ in range(rng.randint(1, 80))]
        prompts.append((prefix + tail, rng.randint(16, 80)))
    prompts[1] = prompts[0]  # identical prompts in flight
    return prompts


async def _generate(server: Server, prompts: list[tuple[list[int], int]]) -> list[list[int]]:
    async def one(session: aiohttp.ClientSession, prompt: list[int], max_tokens: int) -> list[int]:
        body = {
            "model": server.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        async with session.post(f"{server.url}/v1/completions", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["choices"][0]["prompt_token_ids"] == prompt
        assert answer["usage"]["completion_tokens"] == max_tokens
        return answer["choices"][0]["token_ids"]

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        return await asyncio.gather(*(one(session, *prompt) for prompt in prompts))


def _assert_greedy(model: torch.nn.Module, prompt: list[int], output: list[int]) -> None:
    with torch.inference_mode():
        logits_TV = model(torch.tensor([prompt + output[:-1]])).logits[0, len(prompt) - 1 :]
    assert output == logits_TV.argmax(-1).tolist()


@pytest.mark.parametrize(("shape", "world_size"), CASES)
async def test_greedy_tokens_equal_transformers(shape: str, world_size: int, tmp_path) -> None:
    from transformers import DeepseekV3ForCausalLM

    checkpoint = make_checkpoint(tmp_path / "checkpoint", seed=len(shape), **SHAPES[shape])
    oracle = DeepseekV3ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    prompts = _prompts(seed=len(shape))
    # The same load on more ranks: each has fewer pages, but enough for the longest request.
    engine = ENGINE if world_size == 1 else ENGINE | {"num_pages": 32, "max_prefill_tokens": 24 * world_size}
    parallel = {"world_size": world_size, "device": "cpu"}
    with Server({"model": {"path": str(checkpoint)}, "parallel": parallel, "engine": engine}) as server:
        outputs = await _generate(server, prompts)
        metrics = server.metrics()
    for (prompt, max_tokens), output in zip(prompts, outputs, strict=True):
        assert len(output) == max_tokens
        _assert_greedy(oracle, prompt, output)
    assert metrics["nmoe:num_preemptions_total"] > 0
    assert metrics["nmoe:prefix_cache_evictions_total"] > 0
    assert metrics["nmoe:prefix_cache_hits_total"] > 0
    assert metrics["nmoe:num_requests_running"] == metrics["nmoe:num_requests_waiting"] == 0
    assert metrics['nmoe:request_success_total{finished_reason="length"}'] == NUM_PROMPTS
