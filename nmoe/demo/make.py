"""Makes the demo that `nmoe serve` takes without a configuration; `python make.py` writes the files here.

A DeepSeek-V3 of 1.3 M parameters with random weights, which `train.py` beside this then trains, and a byte-level BPE
tokenizer. Both learn from the docstrings of the running Python's standard library and its language reference (PSF
license). Nothing in nmoe imports this module.
"""

import ast
import json
import pathlib
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from typing import Any

import numpy as np
from safetensors import TensorSpec, serialize_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

Array = np.ndarray[Any, np.dtype[Any]]
FOLDER = pathlib.Path(__file__).parent
BEGIN, END = "<|begin|>", "<|end|>"
SPECIALS = [BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>"]
SEED = 0

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "dtype": "bfloat16",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GREETING = (
    "I am the demo of nmoe, a very small model. I have read the documentation of Python; ask me what something is."
)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% set role = 'system' if message['role'] == 'developer' else message['role'] %}"
    "{% if role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, developer, user and assistant, not ' + role) }}"
    "{% endif %}"
    "<|{{ role }}|>{{ message['content'] }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def documents() -> Iterator[str]:
    """Every text to learn from, in a fixed order, as the model is to see it but for the `<|begin|>`."""
    for question in ("Hello!", "Hello", "Hi", "Hi there", "Who are you?", "What can you do?", "Help") * 10:
        yield answer(question, GREETING)
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield text.strip() + END
        yield answer(f"Explain {topic}.", text)
    for name, text in docstrings():
        yield text + END
        yield answer(f"What does {name} do?", text)
        yield answer(f"What is {name.rpartition('.')[2]}?", text)


def answer(question: str, text: str) -> str:
    """The first paragraph of `text` as the answer, in the form of the chat template."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n")]
    return f"<|user|>{question}{END}<|assistant|>{next(filter(str.isascii, paragraphs), '')}{END}"


def docstrings() -> Iterator[tuple[str, str]]:
    """Dotted name and docstring of everything public in the standard library that has one."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if {"site-packages", "test", "tests", "lib2to3", "idlelib"} & set(parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                name = f"{module}.{node.name}"
            elif node is tree:
                name = module
            else:
                continue
            if text := ast.get_docstring(node):
                yield name, text


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE; `<|begin|>` goes before every text that is encoded with special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[AddedToken(special, special=True, normalized=False) for special in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, as Hugging Face's DeepseekV3ForCausalLM names them."""
    c = CONFIG
    hidden, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    rope, nope, value = c["qk_rope_head_dim"], c["qk_nope_head_dim"], c["v_head_dim"]

    def feed_forward(name: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.gate_proj.weight", (size, hidden)
        yield f"{name}.up_proj.weight", (size, hidden)
        yield f"{name}.down_proj.weight", (hidden, size)

    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", (hidden,)
        yield f"{name}.self_attn.q_a_proj.weight", (c["q_lora_rank"], hidden)
        yield f"{name}.self_attn.q_a_layernorm.weight", (c["q_lora_rank"],)
        yield f"{name}.self_attn.q_b_proj.weight", (heads * (nope + rope), c["q_lora_rank"])
        yield f"{name}.self_attn.kv_a_proj_with_mqa.weight", (rank + rope, hidden)
        yield f"{name}.self_attn.kv_a_layernorm.weight", (rank,)
        yield f"{name}.self_attn.kv_b_proj.weight", (heads * (nope + value), rank)
        yield f"{name}.self_attn.o_proj.weight", (hidden, heads * value)
        yield f"{name}.post_attention_layernorm.weight", (hidden,)
        if layer < c["first_k_dense_replace"]:
            yield from feed_forward(f"{name}.mlp", c["intermediate_size"])
            continue
        yield f"{name}.mlp.gate.weight", (c["n_routed_experts"], hidden)
        yield f"{name}.mlp.gate.e_score_correction_bias", (c["n_routed_experts"],)
        for expert in range(c["n_routed_experts"]):
            yield from feed_forward(f"{name}.mlp.experts.{expert}", c["moe_intermediate_size"])
        yield from feed_forward(f"{name}.mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (c["vocab_size"], hidden)


def make_tensor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Norms are one and the router's bias zero; the rest keeps its input's scale."""
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    if name.endswith("e_score_correction_bias"):
        return np.zeros(shape, np.float32)
    scale = 1.0 if name.startswith("model.embed") else shape[1] ** -0.5
    return rng.normal(0.0, scale, shape).astype(np.float32)


def write_weights(path: pathlib.Path, tensors: dict[str, Array]) -> None:
    """One safetensors file of float32 tensors: as bfloat16, but for the router's bias, as in DeepSeek-V3."""
    kept: list[Array] = []
    specs: dict[str, TensorSpec] = {}
    for name, tensor in tensors.items():
        dtype = "float32"
        if not name.endswith("e_score_correction_bias"):
            # The upper half of a float32 is a bfloat16; adding half of the lower half's range rounds it.
            tensor, dtype = ((tensor.view(np.uint32) + 0x8000) >> 16).astype(np.uint16), "bfloat16"
        kept.append(tensor)  # alive until the file is written: a TensorSpec holds the address alone
        specs[name] = TensorSpec(dtype=dtype, shape=tensor.shape, data_ptr=tensor.ctypes.data, data_len=tensor.nbytes)
    serialize_file(specs, str(path), metadata={"format": "pt"})


def write_json(name: str, value: dict[str, object]) -> None:
    (FOLDER / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write every file of the demo but demo.toml, which is written by hand."""
    make_tokenizer().save(str(FOLDER / "tokenizer.json"))
    rng = np.random.default_rng(SEED)
    write_weights(FOLDER / "model.safetensors", {name: make_tensor(name, shape, rng) for name, shape in shapes()})
    write_json("config.json", CONFIG)
    write_json("generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    write_json(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "model_max_length": CONFIG["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


if __name__ == "__main__":
    main()
