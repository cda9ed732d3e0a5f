"""A whole server on the GPU: greedy tokens through HTTP under the load of test_generation_multi.py."""

import torch

from tests.checkpoints import make_checkpoint
from tests.gpu.test_engine_gpu import GPU, SHAPE
from tests.serving import Server
from tests.test_generation_multi import NUM_PROMPTS, _generate, _prompts

ENGINE = {"num_pages": 12, "page_size": 32, "max_batch_size": 16, "max_prefill_tokens": 64}


async def test_chunks_hits_evictions_and_preemptions_beside_graphs(tmp_path):
    """Tokens are transformers' largest, or as good as, save where bfloat16 made a router choose another expert."""
    from transformers import DeepseekV3ForCausalLM

    folder = make_checkpoint(tmp_path / "tiny", **SHAPE, q_lora_rank=96)
    prompts = _prompts(seed=5)
    parallel = {"world_size": 1, "device": "cuda"}
    server = Server({"model": {"path": str(folder)}, "parallel": parallel, "engine": ENGINE})
    server.start(timeout=100)
    try:
        outputs = await _generate(server, prompts)
        metrics = server.metrics()
    finally:
        server.__exit__()
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
    assert metrics["nmoe:num_preemptions_total"] > 0
    assert metrics["nmoe:prefix_cache_hits_total"] > 0
    assert metrics["nmoe:prefix_cache_evictions_total"] > 0
    assert metrics['nmoe:request_success_total{finished_reason="length"}'] == NUM_PROMPTS
