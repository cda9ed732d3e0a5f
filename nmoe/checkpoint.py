"""A checkpoint folder, checked without reading its weights and without torch.

`open_checkpoint` compares what config.json describes with what the safetensors headers contain, so a model that cannot
be served is refused within seconds, with the file or tensor at fault and the remedy. The header format (an 8-byte
little-endian length, then JSON) is that of https://github.com/huggingface/safetensors.
"""

import dataclasses
import logging
import math
import pathlib
import re
import struct
from typing import Annotated, Any

import msgspec

from nmoe.architecture import Architecture, expected_tensors, is_quantised
from nmoe.config import Config
from nmoe.config_json import config_file, is_lfs_pointer, is_there, read_architecture, read_json
from nmoe.errors import CheckpointError

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
_FP8 = "F8_E4M3"
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, _FP8: 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
_WEIGHT_DTYPES = ("F32", "BF16", "F16", _FP8)
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_SCALE_DTYPES = ("F32", "BF16", "F16")
_MAX_HEADER_BYTES = 100_000_000
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_HARMLESS = re.compile(r".*\.rotary_emb\.inv_freq")
_MTP_PROJECTION = re.compile(r"model\.layers\.(\d+)\.eh_proj\.weight")  # only MTP layers have it
_FUSED_EXPERTS = ".mlp.experts.gate_up_proj"
_FEWEST_TOKENS = 2  # prompt and answer together
_SHOWN = 3  # how many names of a list an error message spells out
_MOST_SHOWN = 200  # characters of each


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's file, dtype and shape; `dtype` as safetensors spells it."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that passed every check. `tensors` is empty if the weights are random."""

    path: pathlib.Path
    architecture: Architecture
    tensors: dict[str, TensorInfo]
    dtype: str  # compute dtype: "bfloat16" or "float32"
    max_seq_len: int  # prompt and output together


def open_checkpoint(config: Config) -> Checkpoint:
    """Read and check the checkpoint that `config` names. Raises CheckpointError with the first problem found."""
    path = pathlib.Path(config.model.path)
    if config.model.attention_type == "dsa":
        raise CheckpointError(
            "[model] attention_type = 'dsa': sparse attention does not exist yet; set it to 'auto' or 'mla'"
        )
    architecture = read_architecture(path)
    if architecture.num_experts % config.parallel.world_size:
        raise CheckpointError(
            f"{config_file(path)}: n_routed_experts = {architecture.num_experts} cannot be divided evenly among"
            f" [parallel] world_size = {config.parallel.world_size} workers; choose a world_size that divides it"
        )
    eos_ids(path, architecture)
    tensors: dict[str, TensorInfo] = {}
    if config.model.weights == "checkpoint":
        tensors, architecture = _checked_tensors(path, architecture)
        if config.parallel.device == "cuda" and architecture.quant_block:
            _check_all_quantised(tensors)
    dtype = _compute_dtype(config, architecture, tensors)
    return Checkpoint(path, architecture, tensors, dtype, _max_seq_len(config, architecture))


def _compute_dtype(config: Config, architecture: Architecture, tensors: dict[str, TensorInfo]) -> str:
    dtype: str = config.model.dtype
    if dtype == "auto":
        dtype = architecture.dtype or _stored_dtype(tensors)
    if dtype == "float16":
        raise CheckpointError(
            f"{config_file(config.model.path)}: the model is float16, which is not computed in;"
            " set [model] dtype = 'bfloat16'"
        )
    return dtype


def _stored_dtype(tensors: dict[str, TensorInfo]) -> str:
    """The dtype of the weights, for a config.json that names none: that of the embedding, which is never quantised."""
    embedding = tensors.get(_EMBEDDING)
    return _DTYPES.get(embedding.dtype, "float32") if embedding else "float32"


def _max_seq_len(config: Config, architecture: Architecture) -> int:
    wanted, limit = config.model.max_seq_len, architecture.max_position_embeddings
    if wanted > limit:
        raise CheckpointError(
            f"[model] max_seq_len = {wanted}: the model knows max_position_embeddings = {limit} positions; lower it"
        )
    if (wanted or limit) < _FEWEST_TOKENS:
        raise CheckpointError(
            f"[model] max_seq_len = {wanted or limit}: a prompt and an answer need {_FEWEST_TOKENS} tokens at least;"
            " raise it"
        )
    return wanted or limit


# -------------------------------------------------------------------------------------------------------- the tensors


def _checked_tensors(folder: pathlib.Path, architecture: Architecture) -> tuple[dict[str, TensorInfo], Architecture]:
    """The tensors, and the architecture adjusted to them."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: is a single file, which holds no weights; set [model] path to the checkpoint's folder,"
            " or weights = 'random'"
        )
    found = _read_tensors(folder)
    if architecture.tie_word_embeddings and _HEAD in found:
        # As in transformers 5 (`tie_weights`), the checkpoint's tensor wins, whether or not it equals the embedding.
        log.info("%s: has %s, which is used although config.json says tie_word_embeddings = true", folder, _HEAD)
        architecture = msgspec.structs.replace(architecture, tie_word_embeddings=False)
    wanted = dict(expected_tensors(architecture))
    tensors = _drop_unused(folder, architecture, found)
    if architecture.quant_block and not any(info.dtype == _FP8 for info in tensors.values()):
        log.info("%s: no weight is FP8, although config.json has a quantization_config, which is ignored", folder)
        architecture = msgspec.structs.replace(architecture, quant_block=None)
    missing = [name for name in wanted if name not in tensors]
    if missing:
        _refuse_fused_experts(folder, found)
        raise CheckpointError(
            f"{folder}: {_listed(missing)} not in the checkpoint, though config.json asks for it;"
            " config.json and the shards must come from the same model"
        )
    for name, shape in wanted.items():
        _check_tensor(name, shape, tensors, architecture)
    unknown = [name for name in tensors if name not in wanted and not _is_scale(name, wanted)]
    if unknown:
        raise CheckpointError(
            f"{folder}: {_listed(unknown)} in the checkpoint, but not part of the model that config.json describes;"
            " config.json and the shards must come from the same model"
        )
    return tensors, architecture


def _refuse_fused_experts(folder: pathlib.Path, found: dict[str, TensorInfo]) -> None:
    for name in found:
        if name.endswith(_FUSED_EXPERTS):
            raise CheckpointError(
                f"{folder}: {name} holds the experts of a whole layer, but each expert's own tensors are needed; load"
                " the model with transformers and save it by save_pretrained with save_original_format = True"
            )


def _listed(names: list[str]) -> str:
    more = (
        f" and {len(names) - _SHOWN} more tensors are" if len(names) > _SHOWN else " is" if len(names) == 1 else " are"
    )
    return ", ".join(names[:_SHOWN]) + more


def _is_scale(name: str, wanted: dict[str, tuple[int, ...]]) -> bool:
    return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in wanted


def _drop_unused(folder: pathlib.Path, a: Architecture, found: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors, without MTP layers and without those that transformers also ignores."""
    mtp = tuple(f"model.layers.{layer}." for layer in sorted(_mtp_layers(a, found)))
    skipped = [name for name in found if name.startswith(mtp)] if mtp else []
    if skipped:
        log.info(
            "%s: skipping the multi-token-prediction layer (model.layers.%d, %d tensors)",
            folder,
            a.num_layers,
            len(skipped),
        )
    ignored = {*skipped, *(name for name in found if _HARMLESS.fullmatch(name))}
    if not a.num_shared_experts:  # transformers writes them, without elements
        ignored |= {name for name, info in found.items() if ".mlp.shared_experts." in name and 0 in info.shape}
    return {name: info for name, info in found.items() if name not in ignored}


def _mtp_layers(a: Architecture, found: dict[str, TensorInfo]) -> set[int]:
    """The MTP layers after the last layer, by the projection that only they have. How many config.json counts says
    nothing: some count none so that other engines skip them, and one is the default, also where there is none."""
    shown = {int(match[1]) for match in map(_MTP_PROJECTION.fullmatch, found) if match}
    return {layer for layer in shown if layer >= a.num_layers}


def _check_tensor(
    name: str, shape: tuple[int, ...], tensors: dict[str, TensorInfo], architecture: Architecture
) -> None:
    info = tensors[name]
    if info.shape != shape:
        raise CheckpointError(
            f"{info.file}: {name} has shape {list(info.shape)}, but config.json asks for {list(shape)};"
            " config.json and the shards must come from the same model"
        )
    _check_dtype(name, info, _WEIGHT_DTYPES)
    if info.dtype != _FP8:
        return
    if architecture.quant_block is None:
        raise CheckpointError(
            f"{info.file}: {name} is FP8, but config.json has no quantization_config with its weight_block_size;"
            " take config.json from the model's original repository"
        )
    scale = tensors.get(name + SCALE_SUFFIX)
    if scale is None:
        raise CheckpointError(f"{info.file}: {name} is FP8, but its scales {name + SCALE_SUFFIX} are not there")
    _check_dtype(name + SCALE_SUFFIX, scale, _SCALE_DTYPES)
    blocks = tuple(-(-size // block) for size, block in zip(shape, architecture.quant_block, strict=True))
    if scale.shape != blocks:
        raise CheckpointError(
            f"{scale.file}: {name + SCALE_SUFFIX} has shape {list(scale.shape)}, but blocks of"
            f" {list(architecture.quant_block)} make {list(blocks)}; check weight_block_size in config.json"
        )


def _check_all_quantised(tensors: dict[str, TensorInfo]) -> None:
    for name, info in tensors.items():
        if is_quantised(name) and info.dtype != _FP8:
            raise CheckpointError(
                f"{info.file}: {name} is {info.dtype}, but config.json's quantization_config says FP8, and a GPU takes"
                " all such weights in FP8 or none; quantise this one too, or set [parallel] device = 'cpu'"
            )


def _check_dtype(name: str, info: TensorInfo, supported: tuple[str, ...]) -> None:
    if info.dtype not in supported:
        raise CheckpointError(
            f"{info.file}: {name} is {info.dtype}, which is not supported; convert it to one of {', '.join(supported)}"
        )


# --------------------------------------------------------------------------------------------------- safetensors files


_Size = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct):
    """A tensor's entry in a header; the offsets count from the end of the header."""

    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


def _read_tensors(folder: pathlib.Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint: of the single file, or else of the shards that the index names."""
    has_single = is_there(folder / SINGLE)
    has_index = is_there(folder / INDEX)
    if not has_single and not has_index:
        raise CheckpointError(f"{folder}: {_no_weights(folder)}")
    if not has_index:
        return _read_header(folder / SINGLE)
    weight_map = _weight_map(folder / INDEX)
    shards = sorted(set(weight_map.values()))
    if has_single and SINGLE not in shards:
        log.warning("%s: has both %s and %s; as in transformers, the first is used", folder, SINGLE, INDEX)
        return _read_header(folder / SINGLE)
    absent = [shard for shard in shards if not _exists(folder / shard)]
    if absent:
        shown = [shard if shard.isprintable() else ascii(shard) for shard in absent[:_SHOWN]]
        raise CheckpointError(
            f"{folder}: {len(absent)} of {len(shards)} shards that {INDEX} names are missing:"
            f" {', '.join(name[:_MOST_SHOWN] for name in shown)}{', ...' if len(absent) > _SHOWN else ''};"
            " download them again"
        )
    held = {shard: _read_header(folder / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise CheckpointError(f"{folder / shard}: lacks {name}, which {INDEX} says it holds; download both again")
    return {name: held[shard][name] for name, shard in weight_map.items()}


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """The file of each tensor, by the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: has no 'weight_map' from tensor to file; copy it again")
    return weight_map


def _exists(path: pathlib.Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def _no_weights(folder: pathlib.Path) -> str:
    if any(folder.glob("model-*-of-*.safetensors")):
        return f"has shards but no {INDEX}; copy it from the original"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return "holds PyTorch pickles; convert: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
    return f"has neither {INDEX} nor {SINGLE}; download the weights, or set [model] weights = 'random'"


def _read_header(file: pathlib.Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Raises CheckpointError unless its length matches its header."""
    is_there(file)  # which refuses what is no regular file
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            is_whole = 2 <= length <= min(size - 8, _MAX_HEADER_BYTES)
            header = stream.read(length) if is_whole else b""
        is_pointer = is_lfs_pointer(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}; check the file and its permissions") from None
    if is_pointer:
        raise CheckpointError(f"{file}: is a Git LFS placeholder, not the file; run `git lfs pull` in its folder")
    if not is_whole:
        raise CheckpointError(f"{file}: is truncated or not a safetensors file ({size} bytes); download it again")
    entries = _entries(file, header)
    expected = 8 + length + max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if expected != size:
        raise CheckpointError(
            f"{file}: has {size} bytes, but its header describes {expected}: truncated or damaged; download it again"
        )
    return {name: TensorInfo(file, entry.dtype, entry.shape) for name, entry in entries.items()}


def _entries(file: pathlib.Path, header: bytes) -> dict[str, _Entry]:
    """The tensors in a header. Raises CheckpointError unless each one's size matches its shape."""
    try:
        document = msgspec.json.decode(header, type=dict[str, Any])
        document.pop("__metadata__", None)
        entries = msgspec.convert(document, dict[str, _Entry])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: its header is damaged ({error}); download it again") from None
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        if entry.dtype in _ITEM_BYTES and end - begin != math.prod(entry.shape) * _ITEM_BYTES[entry.dtype]:
            raise CheckpointError(
                f"{file}: its header is damaged ({name} has {end - begin} bytes, too many or too few for {entry.dtype}"
                f" {list(entry.shape)}); download it again"
            )
    return entries


# -------------------------------------------------------------------------------------------------- beside the weights


def eos_ids(path: str | pathlib.Path, architecture: Architecture) -> tuple[int, ...]:
    """The token ids that end an answer, from generation_config.json or else config.json. Raises CheckpointError."""
    source, ids = config_file(path), architecture.eos_token_ids
    file = source.parent / "generation_config.json"
    if is_there(file) and (value := read_json(file).get("eos_token_id")) is not None:
        source, ids = file, tuple(value) if isinstance(value, list) else (value,)
        if not all(type(token) is int for token in ids):
            raise CheckpointError(f"{file}: eos_token_id = {value!r}: must be a token id or a list of them")
    for token in ids:
        if not 0 <= token < architecture.vocab_size:
            raise CheckpointError(
                f"{source}: eos_token_id = {token}: not a token of the model, whose vocab_size is"
                f" {architecture.vocab_size} in config.json; both files must come from the same model"
            )
    return ids


_OTHER_TOKENIZERS = {
    "*.tiktoken": "a tiktoken vocabulary",
    "tiktoken.model": "a tiktoken vocabulary",
    "tokenizer.model": "a sentencepiece model",
    "*.spm": "a sentencepiece model",
    "vocab.json": "a vocabulary without its tokenizer.json",
    "tekken.json": "a Mistral tokenizer",
}


def tokenizer_file(path: str | pathlib.Path) -> pathlib.Path:
    """The checkpoint's tokenizer.json. Raises CheckpointError saying what is there instead and how to convert it."""
    folder = config_file(path).parent
    file = folder / "tokenizer.json"
    if is_there(file):
        if "model" not in read_json(file):
            raise CheckpointError(f"{file}: is not a tokenizer of the tokenizers library (no 'model'); copy it again")
        return file
    for pattern, kind in _OTHER_TOKENIZERS.items():
        if found := sorted(folder.glob(pattern)):
            raise CheckpointError(
                f"{folder}: has {found[0].name} ({kind}), but a tokenizer.json is needed; make one with"
                f' python -c "from transformers import AutoTokenizer as T;'  # no "; ", which precedes a remedy
                f'T.from_pretrained({str(folder)!r}, use_fast=True).save_pretrained({str(folder)!r})"'
            )
    raise CheckpointError(f"{folder}: has no tokenizer.json; copy it from the model's original repository")
