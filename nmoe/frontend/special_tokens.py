"""The special tokens that a checkpoint names beside its tokenizer.json, and which of them begins every text."""

import pathlib
from typing import Any

import msgspec

from nmoe.config_json import is_there, read_json
from nmoe.errors import CheckpointError

CONFIG = "tokenizer_config.json"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OBEY_ADD_BOS = ("LlamaTokenizer", "LlamaTokenizerFast")


class AddedToken(msgspec.Struct, frozen=True):
    """A token written as an object; the fields are the tokenizers library's."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None  # None: unless it is special
    special: bool = False


def read_tokenizer_config(folder: pathlib.Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none. Raises CheckpointError."""
    file = folder / CONFIG
    return read_json(file) if is_there(file) else {}


def special_tokens(folder: pathlib.Path, config: dict[str, Any]) -> dict[str, str]:
    """bos_token and the like, written as a string or as an added token's fields; older checkpoints have them in a file
    of their own. A model's own ones have names that end in `_token`, or are listed in `extra_special_tokens`."""
    map_file = folder / "special_tokens_map.json"
    older = read_json(map_file) if is_there(map_file) else {}
    extra = config.get("extra_special_tokens")
    extra = extra if isinstance(extra, dict) else {}
    given = older | {name: token for name, token in config.items() if token is not None} | extra
    own = [name for name, token in given.items() if name.endswith("_token") and isinstance(token, str)]
    names = dict.fromkeys((*_NAMES, *own, *extra))
    try:
        found = {name: msgspec.convert(given.get(name), str | AddedToken | None) for name in names}
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{folder}: a special token of tokenizer_config.json or special_tokens_map.json is neither a text nor an"
            f" object with its content ({error}); copy both again from the original"
        ) from None
    return {
        name: token.content if isinstance(token, AddedToken) else token
        for name, token in found.items()
        if token is not None
    }


def added_tokens(folder: pathlib.Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """The tokens that tokenizer_config.json adds to tokenizer.json's, by id; most checkpoints have the same in both.
    Raises CheckpointError."""
    given = config.get("added_tokens_decoder")
    try:
        found = msgspec.convert(given or {}, dict[int, AddedToken], strict=False)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{folder / CONFIG}: added_tokens_decoder does not map ids to tokens ({error}); copy it again from the"
            " original"
        ) from None
    return dict(sorted(found.items()))


def added_bos(folder: pathlib.Path, config: dict[str, Any]) -> str | None:
    """The token that tokenizer_config.json wants before every text, whatever tokenizer.json says; None: it wants none.

    DeepSeek-V3 is published so: its tokenizer.json adds no BOS, and `add_bos_token` does. Only the classes that obeyed
    the flag in transformers 4 count; transformers 5 drops it beside a tokenizer.json. Raises CheckpointError.
    """
    if config.get("tokenizer_class") not in _OBEY_ADD_BOS or config.get("add_bos_token") is not True:
        return None
    return special_tokens(folder, config).get("bos_token")
