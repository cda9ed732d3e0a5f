"""A whole server on the GPU: greedy tokens through HTTP under the load of test_generation_multi.py."""

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.gpu.test_engine_gpu import GPU, SHAPE
from tests.serving import Server
from tests.test_generation_multi import NUM_PROMPTS, _generate, _prompts

ENGINE = {"num_pages": 12, "page_size": 32, "max_batch_size": 16, "max_prefill_tokens": 64}


async def serve(folder, world_size, prompts, engine):
    """The prompts' outputs through a whole server, and its metrics."""
    parallel = {"world_size": world_size, "device": "cuda"}
    with Server({"model": {"path": str(folder)}, "parallel": parallel, "engine": engine}, start_s=100.0) as server:
        return await _generate(server, prompts), server.metrics()


def check_tokens(folder, prompts, outputs):
    """Tokens are transformers' largest, or as good as, save where bfloat16 made a router choose another expert."""
    from transformers import DeepseekV3ForCausalLM

    exact = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(GPU).eval()
    behind = []
    for (prompt, max_tokens), output in zip(prompts, outputs, strict=True):
        assert len(output) == max_tokens
        with torch.inference_mode():
            logits = exact(torch.tensor([prompt + output[:-1]], device=GPU)).logits[0, len(prompt) - 1 :]
        behind.append((logits.amax(-1) - logits[torch.arange(len(output)), output]) / logits.std(-1))
    behind = torch.cat(behind)
    assert (behind == 0).double().mean() > 0.9
    assert (behind < 0.25).double().mean() > 0.97


async def test_chunks_hits_evictions_and_preemptions_beside_graphs(tmp_path):
    folder, prompts = make_checkpoint(tmp_path / "tiny", **SHAPE, q_lora_rank=96), _prompts(seed=5)
    outputs, metrics = await serve(folder, 1, prompts, ENGINE)
    check_tokens(folder, prompts, outputs)
    assert metrics["nmoe:num_preemptions_total"] > 0
    assert metrics["nmoe:prefix_cache_hits_total"] > 0
    assert metrics["nmoe:prefix_cache_evictions_total"] > 0
    assert metrics['nmoe:request_success_total{finished_reason="length"}'] == NUM_PROMPTS


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU for each of two workers")
async def test_two_gpus_give_the_tokens_of_one(tmp_path):
    folder, prompts = make_checkpoint(tmp_path / "tiny", **SHAPE, q_lora_rank=96), _prompts(seed=5)
    outputs, metrics = await serve(folder, 2, prompts, {**ENGINE, "max_prefill_tokens": 128})
    check_tokens(folder, prompts, outputs)
    assert metrics['nmoe:request_success_total{finished_reason="length"}'] == NUM_PROMPTS
