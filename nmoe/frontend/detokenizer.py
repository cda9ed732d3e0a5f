"""Turns token ids into text, one at a time.

Invariant: the texts returned for a stream of ids, joined and followed by `flush()`, equal what the tokenizer's decoder
makes of all the ids at once, hidden ones left out. Every piece is final: never half a UTF-8 character,
never something that a later token would change.
"""

import codecs
import re
from collections.abc import Collection
from typing import Protocol

import tokenizers

from nmoe.frontend import library

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Detokenizer(Protocol):
    """The state of one stream."""

    def feed(self, token: int) -> str:
        """The text that has become final with `token`; often all of its own, "" if some of it must wait."""

    @property
    def holds(self) -> bool:
        """Whether some text must wait."""

    def flush(self) -> str:
        """The remaining text, once there are no more tokens."""


def _bytes_of_letters() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character (GPT-2's encoder.py, `bytes_to_unicode`): those that
    print in Latin-1 as themselves, the others as U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _bytes_of_letters()


def token_bytes(piece: str) -> bytes:
    """The bytes of a byte-level BPE token."""
    try:
        return bytes(map(_BYTES.__getitem__, piece))
    except KeyError:  # an added token is written literally, not in the byte alphabet
        return piece.encode()


def begins_character(raw: bytes) -> bool:
    """Whether these UTF-8 bytes do not continue a character begun earlier."""
    return bool(raw) and raw[0] & 0xC0 != 0x80


def whole_characters(raw: bytes) -> str:
    """Their text, without a final incomplete character."""
    return _Utf8Decoder("replace").decode(raw)


class BytePieces(dict[int, str | bytes]):
    """Maps a token id to its text, or to its bytes if they are not valid text alone; filled as ids are seen."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, hidden: Collection[int]) -> None:
        super().__init__(dict.fromkeys(hidden, ""))
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str | bytes:
        # A model's vocabulary may be padded past the tokenizer's: such ids have no text.
        raw = token_bytes(self._tokenizer.id_to_token(token) or "")
        try:
            self[token] = raw.decode()
        except UnicodeDecodeError:
            self[token] = raw
        return self[token]


class ByteLevelDetokenizer:
    """For byte-level BPE: a token is some bytes. Most are whole characters, and their text is looked up; where a
    character is cut, an incremental UTF-8 decoder puts it together."""

    def __init__(self, pieces: BytePieces) -> None:
        self._pieces = pieces
        self._decoder = _Utf8Decoder("replace")
        self._inside = False  # in the middle of a character

    def feed(self, token: int) -> str:
        """See Detokenizer."""
        piece = self._pieces[token]
        if isinstance(piece, str):
            if not self._inside:
                return piece
            piece = piece.encode()
        text = self._decoder.decode(piece)
        self._inside = bool(self._decoder.getstate()[0])
        return text

    @property
    def holds(self) -> bool:
        """See Detokenizer."""
        return self._inside

    def flush(self) -> str:
        """See Detokenizer."""
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """For other decoders: decode the last visible tokens with and without the new ones; the difference is the new text.

    What a decoder does at the start of a text (strip a space) then happens in both. Byte tokens (`<0xE4>`) wait for
    their run to end, because decoders judge a run as a whole: one bad byte makes all of it replacement characters.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, hidden: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._shown: list[int] = []  # the window: tokens whose text has been returned
        self._shown_length = 0  # characters they decode to on their own
        self._waiting: list[int] = []

    def feed(self, token: int) -> str:
        """See Detokenizer."""
        piece = self._tokenizer.id_to_token(token)
        if piece is None or token in self._hidden:
            return ""
        run_ends = bool(self._waiting)
        if BYTE_TOKEN.fullmatch(piece):
            self._waiting.append(token)
            return ""
        before = self._take() if run_ends else ""
        self._waiting.append(token)
        return before + self._take()

    @property
    def holds(self) -> bool:
        """See Detokenizer."""
        return bool(self._waiting)

    def flush(self) -> str:
        """See Detokenizer."""
        return self._take() if self._waiting else ""

    def _take(self) -> str:
        text = self._text(self._shown + self._waiting)[self._shown_length :]
        # A window without text cannot stand for the start of the text; it grows until it has some.
        self._shown = self._waiting if text else self._shown + self._waiting
        self._shown_length = len(self._text(self._shown))
        self._waiting = []
        return text

    def _text(self, ids: list[int]) -> str:
        return library.decode(self._tokenizer, ids)
