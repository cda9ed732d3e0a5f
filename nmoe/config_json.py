"""A checkpoint's Hugging Face config.json, read and checked.

Keys and defaults follow transformers' configuration_deepseek_v3.py. A checkpoint that transformers loads with
semantics other than ours (attention bias, another activation, another router, another rope) is refused by name instead
of being served incorrectly. To support a family member with its own keys, add an entry to `_READERS`.
"""

import errno
import json
import math
import os
import pathlib
import re
import stat
from collections.abc import Callable
from typing import Any, cast

import msgspec

from nmoe.architecture import DTYPE_BYTES, Architecture, Dtype, Rope, Yarn
from nmoe.errors import CheckpointError

# Far above any model's: a typing error must not list tensors for minutes, or make tables that no memory holds.
_MOST_LAYERS, _MOST_EXPERTS, _MOST_IN_ALL = 1000, 4096, 1 << 18  # experts, of a layer and of all layers
_MOST_POSITIONS = 1 << 24
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half a character, if it is not beside the other half


class _Keys:
    """config.json's keys, with type checks. An absent key takes its default; a default of `...` makes it required."""

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

    def size(self, key: str, default: Any = ..., least: int = 1, most: int | None = None) -> int:
        value: int = self.get(key, int, default)
        if value < least:
            raise self.fail(f"{key} = {value}: must be at least {least}")
        if most is not None and value > most:
            raise self.fail(f"{key} = {value}: must be at most {most}; take config.json from the model's original")
        return value

    def finite(self, key: str, default: float) -> float:
        value: float = self.get(key, float, default)
        if not 0 <= value < math.inf:
            raise self.fail(f"{key} = {value}: must be a number of at least 0")
        return value

    def size_or_none(self, key: str, default: int) -> int | None:
        """The size, or None where the key's value is null."""
        return None if self.document.get(key, default) is None else self.size(key, default)

    def only(self, key: str, supported: Any, what: str) -> None:
        """Refuse every value of `key` except the supported one, which is also what an absent key means."""
        if (value := self.document.get(key, supported)) != supported:
            raise self.fail(f"{key} = {value!r}: {what}; only {supported!r} is supported")


def _rope(keys: _Keys) -> Rope:
    """Both spellings: `rope_scaling` beside `rope_theta`, and transformers 5's `rope_parameters`, which holds both."""
    parameters = keys.get("rope_scaling", dict | None, None) or keys.get("rope_parameters", dict | None, None) or {}
    inner = _Keys(f"{keys.source}: rope_parameters", parameters)
    theta = inner.get("rope_theta", float | None, None) or keys.get("rope_theta", float | None, None) or 10000.0
    interleave = keys.get("rope_interleave", bool | None, True) or False
    if not 0 < theta < math.inf:
        raise inner.fail(f"rope_theta = {theta}: must be a number above 0")
    kind = inner.get("rope_type", str | None, None) or inner.get("type", str | None, None) or "default"
    if parameters.get("partial_rotary_factor", 1.0) != 1.0 or keys.document.get("partial_rotary_factor", 1.0) != 1.0:
        raise inner.fail("partial_rotary_factor is not supported for this model")
    if kind == "default":
        return Rope(theta, interleave)
    if kind != "yarn":
        raise inner.fail(f"rope type {kind!r} is not supported; supported are 'default' and 'yarn'")
    key = "original_max_position_embeddings"
    # The outer one first: transformers, modeling_rope_utils.py, `standardize_rope_params`.
    positions = keys.get(key, int | None, None) or inner.get(key, int | None, None)
    yarn = Yarn(
        factor=inner.get("factor", float),
        original_max_position_embeddings=positions or keys.size("max_position_embeddings", 4096),
        beta_fast=inner.get("beta_fast", float | None, None) or 32.0,
        beta_slow=inner.get("beta_slow", float | None, None) or 1.0,
        mscale=inner.get("mscale", float | None, None) or 0.0,
        mscale_all_dim=inner.get("mscale_all_dim", float | None, None) or 0.0,
        attention_factor=inner.get("attention_factor", float | None, None),
        truncate=inner.get("truncate", bool, True),
    )
    _check_yarn(inner, theta, yarn)
    return Rope(theta, interleave, yarn)


def _check_yarn(keys: _Keys, theta: float, yarn: Yarn) -> None:
    """Check the values that logarithms are taken of and the divisors."""
    if theta <= 1:
        raise keys.fail(f"rope_theta = {theta}: must be above 1 with YaRN")
    for key in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
        if not 0 < (value := getattr(yarn, key)) < math.inf:
            raise keys.fail(f"{key} = {value}: must be a number above 0")


def _quant_block(keys: _Keys) -> tuple[int, int] | None:
    quantization = keys.get("quantization_config", dict | None, None)
    if not quantization:
        return None
    inner = _Keys(f"{keys.source}: quantization_config", quantization)
    method = inner.get("quant_method", str)
    if method != "fp8":
        raise inner.fail(f"quant_method {method!r} is not supported; supported is 'fp8' with block scales")
    if quantization.get("weight_block_size") is None:
        raise inner.fail(
            "key 'weight_block_size' is missing: FP8 is supported with block scales only; take config.json from the"
            " model's original repository if it has them there, or quantise the weights in blocks"
        )
    rows, columns = inner.get("weight_block_size", tuple[int, int])
    if rows < 1 or columns < 1:
        raise inner.fail(f"weight_block_size = {[rows, columns]}: must be positive")
    return rows, columns


def _dtype(keys: _Keys) -> Dtype | None:
    dtype = keys.get("dtype", str | None, None) or keys.get("torch_dtype", str | None, None)
    if dtype is not None and dtype not in DTYPE_BYTES:
        raise keys.fail(f"dtype = {dtype!r}: supported are " + ", ".join(map(repr, DTYPE_BYTES)))
    return cast(Dtype | None, dtype)


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
    if a.num_layers * a.num_experts > _MOST_IN_ALL:
        raise keys.fail(
            f"num_hidden_layers = {a.num_layers}, n_routed_experts = {a.num_experts}: more than {_MOST_IN_ALL} experts"
            " in all; take config.json from the model's original"
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
    architecture = Architecture(
        model_type=keys.get("model_type", str),
        vocab_size=keys.size("vocab_size"),
        hidden_size=keys.size("hidden_size"),
        num_layers=keys.size("num_hidden_layers", most=_MOST_LAYERS),
        num_heads=keys.size("num_attention_heads"),
        q_lora_rank=keys.size_or_none("q_lora_rank", 1536),
        kv_lora_rank=keys.size("kv_lora_rank", 512),
        qk_nope_head_dim=keys.size("qk_nope_head_dim", 128),
        qk_rope_head_dim=keys.size("qk_rope_head_dim", 64),
        v_head_dim=keys.size("v_head_dim", 128),
        intermediate_size=keys.size("intermediate_size", 18432),
        moe_intermediate_size=keys.size("moe_intermediate_size", 2048),
        num_experts=keys.size("n_routed_experts", 256, most=_MOST_EXPERTS),
        num_experts_per_tok=keys.size("num_experts_per_tok", 8),
        num_shared_experts=keys.size("n_shared_experts", 1, least=0),
        n_group=keys.size("n_group", 8),
        topk_group=keys.size("topk_group", 4),
        norm_topk_prob=keys.get("norm_topk_prob", bool | None, True) or False,
        routed_scaling_factor=keys.finite("routed_scaling_factor", 2.5),
        first_k_dense=keys.get("first_k_dense_replace", int, 3),
        rms_norm_eps=keys.finite("rms_norm_eps", 1e-6),
        rope=_rope(keys),
        tie_word_embeddings=keys.get("tie_word_embeddings", bool, False),
        max_position_embeddings=keys.size("max_position_embeddings", 4096, most=_MOST_POSITIONS),
        dtype=_dtype(keys),
        quant_block=_quant_block(keys),
        eos_token_ids=_eos(keys, 1),
    )
    _check_routing(keys, architecture)
    return architecture


_READERS: dict[str, Callable[[_Keys], Architecture]] = {"deepseek_v3": _deepseek_v3}
_NOT_YET = {"deepseek_v32": "its sparse attention (attention_type = 'dsa') does not exist yet"}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object from a checkpoint file. Raises CheckpointError naming the file and what is wrong with it."""
    is_there(path)  # which refuses what is no regular file
    try:
        data = path.read_bytes()
        document = json.loads(data)
        if _SURROGATE.search(data):  # of a half alone Python makes a string that nothing can be done with
            json.dumps(document, ensure_ascii=False).encode()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; check [model] path and the file's permissions"
        ) from None
    except (ValueError, RecursionError) as error:
        remedy = "run `git lfs pull` in its folder" if is_lfs_pointer(path) else "copy it again from the original"
        raise CheckpointError(f"{path}: is not valid JSON ({error}); {remedy}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(document).__name__}, not an object; copy it again")
    return document


def is_lfs_pointer(path: pathlib.Path) -> bool:
    """Whether the file is the placeholder that `git clone` leaves without git-lfs."""
    with path.open("rb") as file:
        return file.read(24) == b"version https://git-lfs."


def is_there(path: pathlib.Path) -> bool:
    """Whether there is such a file. Raises CheckpointError if nobody may know: its folder cannot be searched, or it is
    a link to nothing, as in a copy of a folder of links without what they point to. The same if it is no regular file:
    reading a named pipe may never end."""
    mode = _mode(path)
    if stat.S_ISREG(mode):
        return True
    if mode:
        kind = "folder" if stat.S_ISDIR(mode) else "named pipe" if stat.S_ISFIFO(mode) else "device or socket"
        raise CheckpointError(f"{path}: is not a regular file but a {kind}; copy the file itself")
    if os.path.islink(path):
        raise CheckpointError(f"{path}: is a link to {os.readlink(path)}, which is not there; copy the file itself")
    return False


def _mode(path: pathlib.Path) -> int:
    """What is there, links followed: st_mode, 0 for nothing. Raises CheckpointError if nobody may know, or the name is
    too long; pathlib's own questions (is_file, exists) are silent about that from Python 3.14 on."""
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno in _NOWHERE:
            return 0
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; check [model] path and its permissions"
        ) from None


def config_file(path: str | pathlib.Path) -> pathlib.Path:
    """The config.json of a checkpoint folder, or `path` itself if it names a JSON file."""
    path = pathlib.Path(path)
    mode = _mode(path)
    if stat.S_ISREG(mode) and path.suffix == ".json":
        return path
    if not stat.S_ISDIR(mode):
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
