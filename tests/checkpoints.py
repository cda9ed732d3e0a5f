"""Small random DeepSeek-V3 checkpoints on disk, as transformers writes them, for every test that needs a model."""

import json
import math
import pathlib

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def make_checkpoint(
    folder: pathlib.Path, *, seed=0, shards=1, fp8=False, mtp=False, dtype=torch.float32, **hf_config_overrides
) -> pathlib.Path:
    """Write a random checkpoint with its tokenizer into `folder` and return it.

    `hf_config_overrides` are keyword arguments of transformers' DeepseekV3Config. `fp8` block-quantises the projections
    (quantization_config in config.json, 128x128 unless `fp8` is another block size); `mtp` adds the tensors of a
    multi-token-prediction layer. Weights are wide enough that greedy tokens are well separated.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {**TINY, **hf_config_overrides}
    options.setdefault("num_key_value_heads", options["num_attention_heads"])
    config = DeepseekV3Config(**options)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DeepseekV3ForCausalLM(config).to(dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("e_score_correction_bias"):
            tensor.data.normal_(0, 0.2, generator=generator)
        elif name.endswith("norm.weight"):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    rewrite(folder, shards=shards, fp8=(128, 128) if fp8 is True else fp8, mtp=mtp, layers=options["num_hidden_layers"])
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: pathlib.Path) -> None:
    """A byte-level tokenizer of 256 bytes and the special tokens, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def rewrite(folder: pathlib.Path, *, shards=1, fp8=None, mtp=False, layers=0) -> None:
    """Change the weights on disk: split them into `shards`, quantise them in blocks of `fp8`, add an MTP layer."""
    if shards == 1 and not fp8 and not mtp:
        return
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if mtp:
        prefix, last = f"model.layers.{layers}", f"model.layers.{layers - 1}."
        tensors |= {f"{prefix}.{name.removeprefix(last)}": t.clone() for name, t in tensors.items() if last in name}
        tensors[f"{prefix}.eh_proj.weight"] = torch.randn(4, 8)
        tensors[f"{prefix}.enorm.weight"] = torch.ones(4)
    if fp8:
        tensors = quantised(tensors, fp8)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(fp8),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    file.unlink()
    save_shards(folder, tensors, shards)


def save_shards(folder: pathlib.Path, tensors, shards) -> None:
    """Write `tensors` as model.safetensors, or as `shards` files and their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        held = {name: tensors[name] for name in names[shard::shards]}
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def quantised(tensors, block):
    """The projections as FP8 E4M3 with one float32 scale per block of rows x columns, as DeepSeek-V3 is published."""
    result = {}
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight") and "kv_a_proj" not in name:
            result[name] = weight
            continue
        rows, columns = (math.ceil(size / span) for size, span in zip(weight.shape, block, strict=True))
        padded = torch.zeros(rows * block[0], columns * block[1])
        padded[: weight.shape[0], : weight.shape[1]] = weight
        blocks = padded.view(rows, block[0], columns, block[1])
        scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448.0
        stored = (blocks / scale[:, None, :, None]).reshape(padded.shape)[: weight.shape[0], : weight.shape[1]]
        result[name] = stored.to(torch.float8_e4m3fn).contiguous()
        result[name + "_scale_inv"] = scale
    return result


def load_tensors(folder):
    """All tensors of a checkpoint, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
