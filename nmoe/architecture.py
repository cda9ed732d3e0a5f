"""A model's architecture: its sizes, its options and the resulting tensors. Read by nmoe/config_json.py."""

import math
import re
from collections.abc import Iterator
from typing import Literal

import msgspec

Dtype = Literal["bfloat16", "float32", "float16"]
DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
_QUANTISED = re.compile(r".*\.(q|q_a|q_b|o|gate|up|down)_proj\.weight|.*\.kv_a_proj_with_mqa\.weight")


class Yarn(msgspec.Struct, frozen=True):
    """YaRN scaling (arXiv 2309.00071) with the parameters of transformers' modeling_rope_utils.py."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0  # 0: absent
    mscale_all_dim: float = 0.0  # 0: absent
    attention_factor: float | None = None  # None: inferred from the mscales
    truncate: bool = True

    def cos_sin_scale(self) -> float:
        """The factor applied to the cosine and sine tables."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)

    def softmax_scale(self) -> float:
        """The factor applied to the attention's 1 / sqrt(qk_head_dim)."""
        mscale = yarn_mscale(self.factor, self.mscale_all_dim) if self.mscale_all_dim else 1.0
        return mscale * mscale


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1 * mscale * ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


class Rope(msgspec.Struct, frozen=True):
    """Rotary embedding. `interleave`: on disk, pairs that rotate together are adjacent; otherwise, one per half."""

    theta: float = 10000.0
    interleave: bool = True
    yarn: Yarn | None = None


class Architecture(msgspec.Struct, frozen=True):
    """A DeepSeek-V3-family model as its config.json describes it; names follow config.json where it has one."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int  # without the MTP layers
    num_heads: int
    q_lora_rank: int | None  # None: one full query projection
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int  # of the dense layers
    moe_intermediate_size: int  # of one expert
    num_experts: int  # routed
    num_experts_per_tok: int
    num_shared_experts: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_k_dense: int  # layers before this one have a dense MLP
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: Dtype | None  # None: config.json does not say
    quant_block: tuple[int, int] | None  # rows and columns of an FP8 weight that share a scale; None: no FP8
    eos_token_ids: tuple[int, ...]

    @property
    def qk_head_dim(self) -> int:
        """Query and key dimensions of a head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_dim(self) -> int:
        """Elements of a token's cache row in one layer: the latent and the roped key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_dense(self, layer: int) -> bool:
        """Whether `layer` has a dense MLP instead of experts."""
        return layer < self.first_k_dense

    def softmax_scale(self) -> float:
        """The factor applied to attention scores, YaRN's temperature included."""
        yarn = self.rope.yarn
        return float(self.qk_head_dim**-0.5) * (yarn.softmax_scale() if yarn else 1.0)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Cache bytes of one token over all layers, at the compute dtype."""
        return self.num_layers * self.cache_dim * DTYPE_BYTES[dtype]

    @property
    def num_expert_layers(self) -> int:
        """Layers with routed experts."""
        return sum(not self.is_dense(layer) for layer in range(self.num_layers))

    @property
    def expert_id_bytes(self) -> int:
        """Size of a routed expert's id where routing is stored."""
        return 1 if self.num_experts <= 256 else 2

    def cache_bytes_per_token(self, dtype: str) -> int:
        """Cache bytes of one token: its row in every layer, and the experts it chose."""
        routing = self.num_expert_layers * self.num_experts_per_tok * self.expert_id_bytes
        return self.kv_bytes_per_token(dtype) + routing

    def num_params(self, world_size: int = 1) -> int:
        """Parameters held by one of `world_size` ranks: its share of the routed experts, and everything else."""
        return sum(size for _, size in self._sizes(world_size))

    def weight_bytes(self, dtype: str, world_size: int = 1, *, quantised: bool = False) -> int:
        """Bytes of one rank's weights at the compute dtype. FP8 weights are expanded to it, unless they stay
        `quantised`: then each is one byte; the scales, 1/4096 of that, are left out."""
        full = DTYPE_BYTES[dtype]
        return sum(size * (1 if quantised and is_quantised(name) else full) for name, size in self._sizes(world_size))

    def _sizes(self, world_size: int) -> Iterator[tuple[str, int]]:
        for name, shape in expected_tensors(self):
            yield name, math.prod(shape) // (world_size if ".experts." in name else 1)


def is_quantised(name: str) -> bool:
    """Whether this weight is quantised in an FP8 checkpoint; on a GPU it stays so."""
    return _QUANTISED.fullmatch(name) is not None


def expected_tensors(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight in a checkpoint, in layer order, except MTP layers and FP8 scales."""
    a = architecture
    yield "model.embed_tokens.weight", (a.vocab_size, a.hidden_size)
    for layer in range(a.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (a.hidden_size,)
        yield from _attention_tensors(a, f"{prefix}.self_attn")
        yield f"{prefix}.post_attention_layernorm.weight", (a.hidden_size,)
        if a.is_dense(layer):
            yield from _mlp_tensors(f"{prefix}.mlp", a.hidden_size, a.intermediate_size)
        else:
            yield from _moe_tensors(a, f"{prefix}.mlp")
    yield "model.norm.weight", (a.hidden_size,)
    if not a.tie_word_embeddings:
        yield "lm_head.weight", (a.vocab_size, a.hidden_size)


def _attention_tensors(a: Architecture, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    if a.q_lora_rank is None:
        yield f"{prefix}.q_proj.weight", (a.num_heads * a.qk_head_dim, a.hidden_size)
    else:
        yield f"{prefix}.q_a_proj.weight", (a.q_lora_rank, a.hidden_size)
        yield f"{prefix}.q_a_layernorm.weight", (a.q_lora_rank,)
        yield f"{prefix}.q_b_proj.weight", (a.num_heads * a.qk_head_dim, a.q_lora_rank)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (a.cache_dim, a.hidden_size)
    yield f"{prefix}.kv_a_layernorm.weight", (a.kv_lora_rank,)
    yield f"{prefix}.kv_b_proj.weight", (a.num_heads * (a.qk_nope_head_dim + a.v_head_dim), a.kv_lora_rank)
    yield f"{prefix}.o_proj.weight", (a.hidden_size, a.num_heads * a.v_head_dim)


def _mlp_tensors(prefix: str, hidden: int, intermediate: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (intermediate, hidden)
    yield f"{prefix}.up_proj.weight", (intermediate, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, intermediate)


def _moe_tensors(a: Architecture, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate.weight", (a.num_experts, a.hidden_size)
    yield f"{prefix}.gate.e_score_correction_bias", (a.num_experts,)
    for expert in range(a.num_experts):
        yield from _mlp_tensors(f"{prefix}.experts.{expert}", a.hidden_size, a.moe_intermediate_size)
    if shared := a.moe_intermediate_size * a.num_shared_experts:
        yield from _mlp_tensors(f"{prefix}.shared_experts", a.hidden_size, shared)
