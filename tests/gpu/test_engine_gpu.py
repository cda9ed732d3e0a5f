"""The engine on the GPU: greedy tokens against transformers on the same GPU, graphs against eager steps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from nmoe.checkpoint import open_checkpoint
from nmoe.config import Config, Engine, Model, Parallel
from nmoe.errors import LaunchError
from nmoe.messages import Sampling
from nmoe.profiles import Numerics
from nmoe.worker.batch import Batch
from nmoe.worker.cache import make_cache
from nmoe.worker.kernels.fp8 import dequantise_blocks, quantise_rows
from nmoe.worker.model import load_model
from nmoe.worker.runner import Runner
from tests.checkpoints import make_checkpoint, save_shards
from tests.gpu.stepper import Requests

GPU = torch.device("cuda", 0)
PAGE = 32
SHAPE = {
    "hidden_size": 256,
    "num_attention_heads": 16,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "initializer_range": 0.08,
    "dtype": torch.bfloat16,
}
VARIANTS = {
    "plain": {"q_lora_rank": 96},
    "no query rank, two shared experts, one group": {
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
    },
}
LENGTHS = (5, 64, 33, 130, 1, 200, 97, 31)
OUTPUT = 24


@pytest.fixture(scope="module", params=list(VARIANTS))
def folder(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("gpu") / "tiny", **SHAPE, **VARIANTS[request.param])


def open_config(folder, page_size=PAGE):
    config = Config(
        Model(path=str(folder), dtype="bfloat16"),
        Parallel(1, "cuda"),
        Engine(num_pages=200, page_size=page_size, max_batch_size=16),
    )
    return config, open_checkpoint(config)


def make_runner(folder, page_size=PAGE):
    config, checkpoint = open_config(folder, page_size)
    model = load_model(checkpoint, config, 0, GPU, lambda *_: None)
    cache = make_cache(config, checkpoint, GPU)
    return Runner(model, cache, num_slots=16, max_seq_len=checkpoint.max_seq_len)


def engine_logits(folder, ids):
    """Of one prefill, at every position, float64."""
    config, checkpoint = open_config(folder)
    model, cache = load_model(checkpoint, config, 0, GPU, lambda *_: None), make_cache(config, checkpoint, GPU)
    tokens = len(ids)
    pages = torch.arange(-(-tokens // PAGE), device=GPU)
    batch = Batch(
        ids_T=ids,
        positions_T=torch.arange(tokens, device=GPU),
        write_T=torch.arange(tokens, device=GPU),
        starts=[0, tokens],
        contexts=[tokens],
        pages_RP=pages[None],
        num_decodes=0,
    )
    return model.logits(model.forward(batch, cache, Numerics.FAST), Numerics.FAST).double()


def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(6, 512, length) for length in LENGTHS]


def generate(runner, chunk, sampling=None):
    runner.reset()
    requests = Requests(runner, prompts(), OUTPUT, page_size=PAGE, num_pages=200, sampling=sampling)
    return requests.generate(OUTPUT, chunk)


def agreement(outputs, others):
    """How many tokens agree before the first difference of each request, out of all."""
    same = 0
    for one, other in zip(outputs, others, strict=True):
        same += next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
    return same / sum(map(len, outputs))


@pytest.mark.parametrize("chunk", [1000, 48, 37])
def test_greedy_tokens_are_transformers(folder, chunk):
    """Teacher-forced: a token is the largest of transformers' float32 logits, or as good as, save where bfloat16 made a
    router choose another expert. In chunks or whole: how the products of as many tokens round differs, and with it
    which of two tokens that are as good as each other comes."""
    from transformers import DeepseekV3ForCausalLM

    runner = make_runner(folder)
    runner.capture(16, 1024)
    outputs = generate(runner, chunk)
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(GPU).eval()
    behind = []
    for prompt, output in zip(prompts(), outputs, strict=True):
        ids = torch.tensor([[*prompt.tolist(), *output[:-1]]], device=GPU)
        with torch.inference_mode():
            logits = model(ids).logits[0, len(prompt) - 1 :].float()
        chosen = logits[torch.arange(len(output)), output]
        behind.append((logits.amax(-1) - chosen) / logits.std(-1))
    behind = torch.cat(behind)
    assert (behind == 0).double().mean() > 0.9
    assert (behind < 0.25).double().mean() > 0.97


def test_logits_are_as_good_as_transformers(folder):
    """Against float32, the engine's bfloat16 is no further off than transformers' bfloat16, on the same GPU."""
    from transformers import DeepseekV3ForCausalLM

    ids = torch.from_numpy(np.concatenate(prompts())).to(GPU)
    exact, rounded = (
        DeepseekV3ForCausalLM.from_pretrained(folder, dtype=dtype).to(GPU).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    with torch.inference_mode():
        exact, rounded = (model(ids[None]).logits[0].double() for model in (exact, rounded))
    logits = engine_logits(folder, ids)
    assert (logits - exact).norm() < 1.25 * (rounded - exact).norm()


def rounded_activations(x):
    """What the products' inputs stand for after their quantisation."""
    values, scales = quantise_rows(x.flatten(0, -2))
    return (values.float().unflatten(-1, (-1, 128)) * scales[..., None]).flatten(-2).view(x.shape)


def test_fp8_weights_stay_fp8(tmp_path, monkeypatch):
    """Logits of a quantised checkpoint against transformers' in float32 over the dequantised weights: they are hardly
    further off than those are when nothing but the inputs of the same products is rounded to FP8."""
    from transformers import DeepseekV3ForCausalLM

    shape = {**SHAPE, "q_lora_rank": 128, "qk_rope_head_dim": 64}
    folder, real = make_checkpoint(tmp_path / "fp8", fp8=True, **shape), make_checkpoint(tmp_path / "real", **shape)
    tensors = load_file(folder / "model.safetensors")
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    for name, scale in scales.items():
        weight = name.removesuffix("_scale_inv")
        tensors[weight] = dequantise_blocks(tensors[weight], scale, (128, 128), torch.float32)
    save_shards(real, tensors, 1)
    ids = torch.from_numpy(np.concatenate(prompts())).to(GPU)
    # The eager experts are products of one weight each, as the quantisation sees them.
    model = DeepseekV3ForCausalLM.from_pretrained(real, dtype=torch.float32, experts_implementation="eager").to(GPU)
    real_parts = ("kv_b_proj", ".gate.", "lm_head")
    kept = {each.data_ptr() for name, each in model.named_parameters() if any(part in name for part in real_parts)}
    linear = F.linear

    def rounding(x, weight, bias=None):
        return linear(x if weight.data_ptr() in kept else rounded_activations(x), weight, bias)

    with torch.inference_mode():
        expected = model.eval()(ids[None]).logits[0].double()
        with monkeypatch.context() as patch:
            patch.setattr(F, "linear", rounding)
            rounded = model(ids[None]).logits[0].double()
    logits = engine_logits(folder, ids)

    def error(logits):
        return (logits - expected).norm()

    def agreeing(logits):
        return (logits.argmax(-1) == expected.argmax(-1)).double().mean()

    assert 0 < error(rounded) < 0.3 * expected.norm()
    assert error(logits) < 1.15 * error(rounded)
    assert agreeing(logits) > agreeing(rounded) - 0.05
    runner = make_runner(folder)
    runner.capture(16, 1024)
    assert generate(runner, 1000) == generate(runner, 1000)


@pytest.mark.parametrize("chunk", [1000, 37])
def test_graphs_and_eager_steps_give_the_same_tokens(folder, chunk):
    runner = make_runner(folder)
    eager = generate(runner, chunk)
    runner.capture(16, 1024)
    graphs = generate(runner, chunk)
    # Padding changes the tiles of a product, hence its last bit; a tie may fall the other way, once in a while.
    assert agreement(graphs, eager) > 0.9


def test_sampled_rows_beside_greedy_ones(folder):
    """A captured step with rows that draw: the greedy rows are untouched, a seed repeats, another one does not."""
    runner = make_runner(folder)
    runner.capture(16, 1024)
    greedy = generate(runner, chunk=1000)
    drawn = [Sampling(temperature=1.5, top_k=50 if slot % 4 == 3 else 0, seed=slot) for slot in range(len(LENGTHS))]
    mixed = [drawn[slot] if slot % 2 else Sampling(temperature=0.0) for slot in range(len(LENGTHS))]
    first, second = generate(runner, 1000, mixed), generate(runner, 1000, mixed)
    assert first == second
    assert agreement(first[::2], greedy[::2]) > 0.9
    assert agreement(first[1::2], greedy[1::2]) < 0.5


def test_what_the_kernels_cannot_run_is_refused(folder, tmp_path):
    odd = make_checkpoint(tmp_path / "odd", dtype=torch.bfloat16)  # 20 value dimensions, 4 heads
    with pytest.raises(LaunchError, match="v_head_dim = 20") as refusal:
        make_runner(odd)
    assert "num_attention_heads = 4" in str(refusal.value)
    with pytest.raises(LaunchError, match="page_size"):
        make_runner(folder, page_size=48)
