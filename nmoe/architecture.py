"""What a model is: the sizes and switches of its Hugging Face config.json, checked, and the tensors that follow.

Keys and defaults are those of transformers' configuration_deepseek_v3.py; a checkpoint that transformers loads with
other semantics than ours (attention bias, another activation, another router, another rope) is refused by name instead
of being served wrongly. A family member with its own keys is one more entry of `_READERS`.
"""

import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import msgspec

from nmoe.errors import CheckpointError

Dtype = Literal["bfloat16", "float32", "float16"]
DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}


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
        """What the cosine and sine tables are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)

    def softmax_scale(self) -> float:
        """What the attention's 1 / sqrt(qk_head_dim) is multiplied by."""
        mscale = yarn_mscale(self.factor, self.mscale_all_dim) if self.mscale_all_dim else 1.0
        return mscale * mscale


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1 * mscale * ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


class Rope(msgspec.Struct, frozen=True):
    """Rotary embedding. `interleave`: on disk, the pairs that rotate together are neighbours (else: the two halves)."""

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
    dtype: Dtype
    quant_block: tuple[int, int] | None  # rows and columns of an FP8 weight that share a scale; None: no FP8
    num_mtp_layers: int  # that a checkpoint may have behind the last layer
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
        """What attention scores are multiplied by, YaRN's temperature included."""
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
        """Of a routed expert's id where routing is kept."""
        return 1 if self.num_experts <= 256 else 2

    def cache_bytes_per_token(self, dtype: str) -> int:
        """What a token takes in the cache: its row in every layer, and which experts it chose."""
        routing = self.num_expert_layers * self.num_experts_per_tok * self.expert_id_bytes
        return self.kv_bytes_per_token(dtype) + routing

    def num_params(self, world_size: int = 1) -> int:
        """Parameters that one of `world_size` ranks holds: its share of the routed experts and all of the rest."""
        return sum(
            math.prod(shape) // (world_size if ".experts." in name else 1) for name, shape in expected_tensors(self)
        )

    def weight_bytes(self, dtype: str, world_size: int = 1) -> int:
        """Bytes of one rank's weights at the compute dtype (FP8 weights are expanded to it)."""
        return self.num_params(world_size) * DTYPE_BYTES[dtype]


def expected_tensors(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight of a checkpoint, in the order of the layers; MTP layers and FP8 scales apart."""
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
    yield from _mlp_tensors(f"{prefix}.shared_experts", a.hidden_size, a.moe_intermediate_size * a.num_shared_experts)


# ------------------------------------------------------------------------------------------------- reading config.json


class _Keys:
    """config.json's keys with their types checked; an absent key takes its default, and has none if that is `...`."""

    def __init__(self, source: str, document: dict[str, Any]) -> None:
        self.source = source
        self.document = document

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {message}")

    def get(self, key: str, kind: Any, default: Any = ...) -> Any:
        if key not in self.document:
            if default is ...:
                raise self.fail(f"key {key!r} is missing; take config.json from the model's original repository")
            return default
        try:
            return msgspec.convert(self.document[key], kind)
        except msgspec.ValidationError as error:
            raise self.fail(f"{key} = {self.document[key]!r}: {str(error)[0].lower()}{str(error)[1:]}") from None

    def size(self, key: str, default: Any = ...) -> int:
        value: int = self.get(key, int, default)
        if value < 1:
            raise self.fail(f"{key} = {value}: must be at least 1")
        return value

    def only(self, key: str, supported: Any, what: str) -> None:
        """Refuse every value of `key` but the supported one, which is also what an absent key means."""
        if (value := self.document.get(key, supported)) != supported:
            raise self.fail(f"{key} = {value!r}: {what}; only {supported!r} is supported")


def _rope(keys: _Keys) -> Rope:
    """Both spellings: `rope_scaling` beside `rope_theta`, and transformers 5's `rope_parameters`, which holds both."""
    parameters = keys.get("rope_scaling", dict | None, None) or keys.get("rope_parameters", dict | None, None) or {}
    inner = _Keys(f"{keys.source}: rope_parameters", parameters)
    theta = inner.get("rope_theta", float | None, None) or keys.get("rope_theta", float | None, None) or 10000.0
    interleave = keys.get("rope_interleave", bool | None, True) or False
    kind = inner.get("rope_type", str | None, None) or inner.get("type", str | None, None) or "default"
    if parameters.get("partial_rotary_factor", 1.0) != 1.0 or keys.document.get("partial_rotary_factor", 1.0) != 1.0:
        raise inner.fail("partial_rotary_factor is not supported for this model")
    if kind == "default":
        return Rope(theta, interleave)
    if kind != "yarn":
        raise inner.fail(f"rope type {kind!r} is not supported; supported are 'default' and 'yarn'")
    positions = keys.size("max_position_embeddings", 4096)
    yarn = Yarn(
        factor=inner.get("factor", float),
        original_max_position_embeddings=inner.get("original_max_position_embeddings", int | None, None) or positions,
        beta_fast=inner.get("beta_fast", float | None, None) or 32.0,
        beta_slow=inner.get("beta_slow", float | None, None) or 1.0,
        mscale=inner.get("mscale", float | None, None) or 0.0,
        mscale_all_dim=inner.get("mscale_all_dim", float | None, None) or 0.0,
        attention_factor=inner.get("attention_factor", float | None, None),
        truncate=inner.get("truncate", bool, True),
    )
    return Rope(theta, interleave, yarn)


def _quant_block(keys: _Keys) -> tuple[int, int] | None:
    quantization = keys.get("quantization_config", dict | None, None)
    if not quantization:
        return None
    inner = _Keys(f"{keys.source}: quantization_config", quantization)
    method = inner.get("quant_method", str)
    if method != "fp8":
        raise inner.fail(f"quant_method {method!r} is not supported; supported is 'fp8' with block scales")
    rows, columns = inner.get("weight_block_size", tuple[int, int])
    if rows < 1 or columns < 1:
        raise inner.fail(f"weight_block_size = {[rows, columns]}: must be positive")
    return rows, columns


def _dtype(keys: _Keys) -> Dtype:
    dtype: Dtype | None = keys.get("dtype", Dtype | None, None) or keys.get("torch_dtype", Dtype | None, None)
    return dtype or "float32"


def _eos(keys: _Keys, default: int | None) -> tuple[int, ...]:
    value = keys.get("eos_token_id", int | list[int] | None, default)
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _refuse_other_semantics(keys: _Keys) -> None:
    keys.only("hidden_act", "silu", "another activation function")
    keys.only("scoring_func", "sigmoid", "another router")
    keys.only("topk_method", "noaux_tc", "another router")
    keys.only("attention_bias", False, "biases in the attention")
    keys.only("moe_layer_freq", 1, "dense layers between expert layers")
    heads = keys.document.get("num_key_value_heads")
    if heads not in (None, keys.document.get("num_attention_heads")):
        raise keys.fail(f"num_key_value_heads = {heads}: latent attention has as many as num_attention_heads")


def _check_routing(keys: _Keys, a: Architecture) -> None:
    per_group = a.num_experts // a.n_group
    if a.num_experts % a.n_group or (a.n_group > 1 and per_group < 2):
        raise keys.fail(
            f"n_routed_experts = {a.num_experts}: must be n_group = {a.n_group} groups of at least 2 experts"
        )
    if a.topk_group > a.n_group:
        raise keys.fail(f"topk_group = {a.topk_group}: more than n_group = {a.n_group}")
    if a.num_experts_per_tok > a.topk_group * per_group:
        raise keys.fail(
            f"num_experts_per_tok = {a.num_experts_per_tok}: more than the {a.topk_group * per_group} experts"
            f" of topk_group = {a.topk_group} groups"
        )
    if a.qk_rope_head_dim % 2:
        raise keys.fail(f"qk_rope_head_dim = {a.qk_rope_head_dim}: must be even")


def _deepseek_v3(keys: _Keys) -> Architecture:
    _refuse_other_semantics(keys)
    dtype = keys.get("dtype", str | None, None) or keys.get("torch_dtype", str | None, None) or "float32"
    if dtype not in DTYPE_BYTES:
        raise keys.fail(f"dtype = {dtype!r}: supported are " + ", ".join(map(repr, DTYPE_BYTES)))
    architecture = Architecture(
        model_type=keys.get("model_type", str),
        vocab_size=keys.size("vocab_size"),
        hidden_size=keys.size("hidden_size"),
        num_layers=keys.size("num_hidden_layers"),
        num_heads=keys.size("num_attention_heads"),
        q_lora_rank=keys.size("q_lora_rank", 1536) if keys.document.get("q_lora_rank", 1536) is not None else None,
        kv_lora_rank=keys.size("kv_lora_rank", 512),
        qk_nope_head_dim=keys.size("qk_nope_head_dim", 128),
        qk_rope_head_dim=keys.size("qk_rope_head_dim", 64),
        v_head_dim=keys.size("v_head_dim", 128),
        intermediate_size=keys.size("intermediate_size", 18432),
        moe_intermediate_size=keys.size("moe_intermediate_size", 2048),
        num_experts=keys.size("n_routed_experts", 256),
        num_experts_per_tok=keys.size("num_experts_per_tok", 8),
        num_shared_experts=keys.size("n_shared_experts", 1),
        n_group=keys.size("n_group", 8),
        topk_group=keys.size("topk_group", 4),
        norm_topk_prob=keys.get("norm_topk_prob", bool | None, True) or False,
        routed_scaling_factor=keys.get("routed_scaling_factor", float, 2.5),
        first_k_dense=keys.get("first_k_dense_replace", int, 3),
        rms_norm_eps=keys.get("rms_norm_eps", float, 1e-6),
        rope=_rope(keys),
        tie_word_embeddings=keys.get("tie_word_embeddings", bool, False),
        max_position_embeddings=keys.size("max_position_embeddings", 4096),
        dtype=_dtype(keys),
        quant_block=_quant_block(keys),
        num_mtp_layers=keys.get("num_nextn_predict_layers", int, 1),
        eos_token_ids=_eos(keys, 1),
    )
    _check_routing(keys, architecture)
    return architecture


_READERS: dict[str, Callable[[_Keys], Architecture]] = {"deepseek_v3": _deepseek_v3}
_NOT_YET = {"deepseek_v32": "its sparse attention (attention_type = 'dsa') does not exist yet"}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; CheckpointError names the file and what is wrong with it."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; check [model] path") from None
    except ValueError as error:
        remedy = "run `git lfs pull` in its folder" if is_lfs_pointer(path) else "copy it again from the original"
        raise CheckpointError(f"{path}: is not valid JSON ({error}); {remedy}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(document).__name__}, not an object; copy it again")
    return document


def is_lfs_pointer(path: pathlib.Path) -> bool:
    """Whether the file is the placeholder that `git clone` leaves without git-lfs."""
    with path.open("rb") as file:
        return file.read(24) == b"version https://git-lfs."


def config_file(path: str | pathlib.Path) -> pathlib.Path:
    """The config.json of a checkpoint folder, or `path` itself where it names a JSON file."""
    path = pathlib.Path(path)
    if path.is_file() and path.suffix == ".json":
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; set [model] path to the checkpoint's folder")
    return path / "config.json"


def read_architecture(path: str | pathlib.Path) -> Architecture:
    """The architecture of a checkpoint folder, or of a config.json alone. Raises CheckpointError."""
    file = config_file(path)
    document = read_json(file)
    keys = _Keys(str(file), document)
    model_type = keys.get("model_type", str)
    if model_type in _NOT_YET:
        raise keys.fail(f"model_type {model_type!r} is not supported: {_NOT_YET[model_type]}")
    if model_type not in _READERS:
        raise keys.fail(f"model_type {model_type!r} is not supported; supported: " + ", ".join(sorted(_READERS)))
    return _READERS[model_type](keys)
