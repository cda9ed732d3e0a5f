"""The checkpoint's tokenizer.json: text to token ids, and a detokenizer for each stream.

`encode` may be called from several threads (it releases the interpreter lock); the rest belongs to the event loop.
"""

import json
import pathlib
import types
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import processors

from nmoe.errors import CheckpointError
from nmoe.frontend import library
from nmoe.frontend.detokenizer import (
    BYTE_TOKEN,
    ByteLevelDetokenizer,
    BytePieces,
    Detokenizer,
    WindowDetokenizer,
    token_bytes,
)
from nmoe.frontend.special_tokens import AddedToken


class Tokenizer:
    """A tokenizer.json. `eos_ids`: these ids, like special tokens, are never shown. `bos`: begins every text, even if
    the file's post-processor adds none. `added`: tokens that the file may lack.

    Raises CheckpointError if the tokenizers library cannot read the file.
    """

    def __init__(
        self,
        file: pathlib.Path,
        eos_ids: tuple[int, ...] = (),
        bos: str | None = None,
        added: Mapping[int, AddedToken] = types.MappingProxyType({}),
    ) -> None:
        try:
            tokenizer = library.load(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(
                f"{file}: not a tokenizer of the tokenizers library ({error}); save it again with"
                " PreTrainedTokenizerFast.save_pretrained"
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _add_tokens(tokenizer, added, file)
        if bos is not None:
            _begin_with(tokenizer, bos, file)
        self._tokenizer = tokenizer
        special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        self._hidden = frozenset(special | set(eos_ids))
        self._is_byte_level = _is_byte_level(file, tokenizer)
        is_plain = tokenizer.normalizer is None and self._is_byte_level
        self._longest = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=0) if is_plain else 0
        if any(added.lstrip or added.rstrip for added in tokenizer.get_added_tokens_decoder().values()):
            self._longest = 0  # these absorb any amount of surrounding space
        self._pieces = BytePieces(tokenizer, self._hidden) if self._is_byte_level else None
        self._token_bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> tokenizers.Encoding:
        """The encoding of `text`, whose `ids` are made when they are asked for; with `add_special_tokens` also what
        belongs around it (BOS)."""
        return library.encode(self._tokenizer, text, add_special_tokens=add_special_tokens)

    def least_tokens(self, text: str) -> int:
        """What `text` encodes to at least: known at once, because no token stands for more than the longest's bytes."""
        return len(text) // self._longest if self._longest else 0

    def strings(self, ids: list[int]) -> list[str]:
        """Each token as the vocabulary writes it; empty where it has none."""
        return [self._tokenizer.id_to_token(token) or "" for token in ids]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token within a text; a special token yields its name, an unknown id nothing."""
        if token not in self._token_bytes:
            self._token_bytes[token] = self._bytes_of(token)
        return self._token_bytes[token]

    def _bytes_of(self, token: int) -> bytes:
        piece = self._tokenizer.id_to_token(token)
        if piece is None or token in self._hidden:
            return (piece or "").encode()
        if self._is_byte_level:
            return token_bytes(piece)
        if BYTE_TOKEN.fullmatch(piece):
            return bytes([int(piece[1:-1], 16)])
        # What some decoders do at the start of a text (strip a space) they do not do to the second of two.
        once = self.decode([token])
        return self.decode([token, token])[len(once) :].encode()

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens included."""
        return library.decode(self._tokenizer, ids)

    @property
    def largest_id(self) -> int:
        """The largest id of all tokens that a text can contain."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)

    def detokenizer(self) -> Detokenizer:
        """A detokenizer at the start of a text."""
        if self._pieces is not None:
            return ByteLevelDetokenizer(self._pieces)
        return WindowDetokenizer(self._tokenizer, self._hidden)


def _add_tokens(tokenizer: tokenizers.Tokenizer, added: Mapping[int, AddedToken], file: pathlib.Path) -> None:
    """Add the tokens that the file lacks or has with other fields, as transformers does (`tokens_to_add`), but only by
    the ids that they should have."""
    own = {token: repr(each) for token, each in tokenizer.get_added_tokens_decoder().items()}
    wanted = {token: _library_token(each) for token, each in added.items()}
    tokenizer.add_tokens([each for token, each in wanted.items() if own.get(token) != repr(each)])
    for token, each in wanted.items():
        if (found := tokenizer.token_to_id(each.content)) != token:
            raise CheckpointError(
                f"{file}: makes {each.content!r} token {found}, but added_tokens_decoder in tokenizer_config.json says"
                f" {token}; both files must come from the same model"
            )


def _library_token(token: AddedToken) -> tokenizers.AddedToken:
    normalized = not token.special if token.normalized is None else token.normalized
    fields = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
    return tokenizers.AddedToken(token.content, special=token.special, normalized=normalized, **fields)


def _begin_with(tokenizer: tokenizers.Tokenizer, bos: str, file: pathlib.Path) -> None:
    """Let `bos` begin every text, once. What the file itself would put around a text without it is replaced, as in
    transformers 4 (tokenization_llama_fast.py, `update_post_processor`)."""
    token = tokenizer.token_to_id(bos)
    if token is None:
        raise CheckpointError(
            f"{file}: has no token {bos!r}, which tokenizer_config.json names as bos_token and adds before every text"
            " (add_bos_token); both files must come from the same model"
        )
    if library.encode(tokenizer, "", add_special_tokens=True).ids[:1] == [token]:
        return
    tokenizer.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, token)])


def _is_byte_level(file: pathlib.Path, tokenizer: tokenizers.Tokenizer) -> bool:
    # As the library has read it: parsing the whole file again would take as long as reading it did, and serde takes
    # more than one spelling.
    decoder = tokenizer.decoder
    kinds = _decoder_kinds(json.loads(decoder.__getstate__())) if decoder is not None else []
    if "ByteLevel" in kinds and len(kinds) > 1:
        raise CheckpointError(
            f"{file}: decoder {' + '.join(kinds)}: ByteLevel is supported on its own only; remove the other decoders"
        )
    return kinds == ["ByteLevel"]


def _decoder_kinds(decoder: dict[str, Any]) -> list[str]:
    if decoder["type"] == "Sequence":
        return [kind for inner in decoder["decoders"] for kind in _decoder_kinds(inner)]
    return [decoder["type"]]
