"""A request's outputs other than its text, in the formats of the API's fields (docs/api.md).

Log-probabilities cover exactly the tokens that `usage` counts, including the end token and those of a stop string.
"""

import base64
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import orjson

from nmoe.frontend.detokenizer import Detokenizer, begins_character, whole_characters
from nmoe.frontend.openai import Call
from nmoe.frontend.outputs import Outputs
from nmoe.frontend.prompt import Prompt
from nmoe.frontend.tokenizer import Tokenizer
from nmoe.outputs import Record, RoutingLayout, read_records

_LEAST = -9999.0  # OpenAI's number for values that JSON cannot express
_AT_ONCE = 256  # positions; with the 20 likeliest tokens each, writing them takes 1 ms
_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "token_ids", "drawn_logprobs")


def fragment(value: Any) -> orjson.Fragment:
    """A value's JSON, written piece by piece, because orjson holds the interpreter, and so the event loop, until done.

    An iterator becomes a list, of which only one piece exists at a time.
    """
    return orjson.Fragment(b"".join(_pieces(value)))


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        yield b"{"
        for place, (key, part) in enumerate(value.items()):
            yield (b"," if place else b"") + orjson.dumps(key) + b":"
            yield from _pieces(part)
        yield b"}"
    elif isinstance(value, list | Iterator):
        yield from _list_pieces(value)
    else:
        yield orjson.dumps(value)


def _list_pieces(values: Iterable[Any]) -> Iterator[bytes]:
    left, mark = iter(values), b"["
    while piece := list(itertools.islice(left, _AT_ONCE)):
        yield mark
        yield orjson.dumps(piece)[1:-1]
        mark = b","
    yield b"[]" if mark == b"[" else b"]"


def name_of(token: int) -> str:
    """A token without its text, as vLLM writes it."""
    return f"token_id:{token}"


class Vocabulary:
    """Renders tokens for the formats. Without a tokenizer there are only ids."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def raw(self, token: int) -> bytes | None:
        """The bytes of a token; None without a tokenizer."""
        return self._tokenizer.token_bytes(token) if self._tokenizer is not None else None

    def text(self, token: int) -> str:
        """The text of a token, with replacement characters for an incomplete character."""
        raw = self.raw(token)
        return name_of(token) if raw is None else raw.decode(errors="replace")

    def detokenizer(self) -> Detokenizer | None:
        """A detokenizer at the start of a text."""
        return self._tokenizer.detokenizer() if self._tokenizer is not None else None


class Offsets:
    """The character offsets at which tokens begin in a text."""

    def __init__(self, vocabulary: Vocabulary, start: int, silent_ids: Sequence[int] = ()) -> None:
        self._vocabulary = vocabulary
        self._detokenizer = vocabulary.detokenizer()
        self._silent_ids = silent_ids
        self._at = start

    def of(self, ids: Sequence[int]) -> list[int]:
        """The offsets of the next tokens; a token within a character begins where the character does."""
        found = []
        for token in ids:
            start = self._at
            if self._detokenizer is not None and token not in self._silent_ids:
                held = self._detokenizer.holds
                text = self._detokenizer.feed(token)
                if held and text:  # a character that was never completed may come first
                    start += self._length_before(token, text)
                self._at += len(text)
            found.append(start)
        return found

    def _length_before(self, token: int, text: str) -> int:
        """How many characters of the text that came with a token precede its own, if the token begins a character."""
        raw = self._vocabulary.raw(token) or b""
        return max(0, len(text) - len(whole_characters(raw))) if begins_character(raw) else 0


class Formats(msgspec.Struct, frozen=True):
    """What all choices of a request share."""

    call: Call
    vocabulary: Vocabulary
    routing: RoutingLayout

    def shown(self, token: int) -> str:
        """A token in `logprobs`."""
        return name_of(token) if self.call.return_tokens_as_token_ids else self.vocabulary.text(token)


class PromptFormats:
    """A prompt's outputs: they come with the first sibling and are rendered once for all of them."""

    def __init__(self, formats: Formats, prompt: Prompt, outputs: Outputs) -> None:
        self._formats = formats
        self._prompt = prompt
        self._outputs = outputs

    def render(self) -> None:
        """Compute everything that is cached; the prompt must have been computed."""
        _ = self.fields, self.echoed_json

    @functools.cached_property
    def _records(self) -> list[Record]:
        return read_records(memoryview(bytes(self._outputs.prompt)), self._outputs.returns)

    @functools.cached_property
    def fields(self) -> dict[str, orjson.Fragment]:
        """The fields whose names begin with prompt_. The first token has no predecessors, so its entry is null."""
        call = self._formats.call
        if call.prompt_logprobs is None:
            return {}
        entries = map(self._entry, self._prompt.ids[1:], self._records)
        fields = {"prompt_logprobs": fragment(itertools.chain((None,), entries))}
        for name, value in _own_fields(call, self._records).items():
            parts = {key: [None, *rows] for key, rows in value.items()} if isinstance(value, dict) else [None, *value]
            fields[f"prompt_{name}"] = fragment(parts)
        return fields

    def _entry(self, token: int, record: Record) -> dict[str, Any]:
        """One position in vLLM's format."""
        shown = {token: (record.logprob, record.rank)}
        likeliest = zip(record.top_ids, record.top_logprobs, strict=True)
        for place, (each, logprob) in enumerate(likeliest):
            if place == self._formats.call.prompt_logprobs:
                break
            shown.setdefault(each, (logprob, place + 1))
        return {
            str(each): {"logprob": _number(logprob), "rank": rank, "decoded_token": self._formats.vocabulary.text(each)}
            for each, (logprob, rank) in shown.items()
        }

    @functools.cached_property
    def echoed(self) -> dict[str, list[Any]] | None:
        """The echoed tokens in OpenAI's completions format."""
        call, ids = self._formats.call, self._prompt.ids
        if not call.echo or call.logprobs is None:
            return None
        offsets = self._prompt.offsets
        if offsets is None:  # ids were given, and their text is what they decode to
            offsets = Offsets(self._formats.vocabulary, 0).of(ids)
        lists = _completion_lists(self._formats, ids[1:], self._records, offsets[1:])
        first = (self._formats.shown(ids[0]), None, None, 0, ids[0], None)
        echoed = {name: [value, *lists[name]] for name, value in zip(_LISTS, first, strict=True)}
        return echoed | {"drawn_logprobs": [None] * len(ids)}

    @functools.cached_property
    def echoed_json(self) -> orjson.Fragment:
        """The same as JSON, for an answer with nothing else in these lists."""
        return fragment(self.echoed)


class ChoiceFormats:
    """The outputs of one choice's tokens."""

    def __init__(self, formats: Formats, prompt: PromptFormats, text_start: int, outputs: Outputs) -> None:
        self.prompt = prompt
        self._formats = formats
        self._outputs = outputs
        self._offsets = Offsets(formats.vocabulary, text_start, formats.call.stop_token_ids)

    def take(self, ids: Sequence[int]) -> dict[str, Any]:
        """The choice's fields for `ids`, the tokens since the last call."""
        call = self._formats.call
        records = read_records(memoryview(self._outputs.take()), self._outputs.returns)
        assert len(records) == len(ids) or not self._outputs.returns.records, "a token without its record"
        fields: dict[str, Any] = {"logprobs": None}
        if call.logprobs is not None and call.endpoint == "chat":
            content = list(map(self._entry, ids, records))
            fields["logprobs"] = {"content": content, "refusal": None}
        elif call.logprobs is not None:
            fields["logprobs"] = _completion_lists(self._formats, ids, records, self._offsets.of(ids))
        return fields | _own_fields(call, records)

    def routed(self) -> dict[str, Any]:
        """The field that comes at the end of an answer."""
        if not self._formats.call.return_routed_experts:
            return {}
        layout, data = self._formats.routing, bytes(self._outputs.routing)
        shape = (len(data) // layout.position_bytes, layout.layers, layout.top_k)
        dtype = "uint8" if layout.item_bytes == 1 else "uint16"
        return {"routed_experts": {"dtype": dtype, "shape": shape, "data": base64.b64encode(data).decode()}}

    def _entry(self, token: int, record: Record) -> dict[str, Any]:
        """One token in OpenAI's chat format, plus `drawn_logprob`."""
        number = self._formats.call.logprobs
        likeliest = zip(record.top_ids[:number], record.top_logprobs[:number], strict=True)
        return self._shown(token, record.logprob) | {
            "top_logprobs": [self._shown(each, logprob) for each, logprob in likeliest],
            "drawn_logprob": _number(record.drawn_logprob),
        }

    def _shown(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._formats.vocabulary.raw(token)
        shown = self._formats.shown(token)
        return {"token": shown, "logprob": _number(logprob), "bytes": None if raw is None else list(raw)}


def joined(first: dict[str, list[Any]] | None, then: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
    """The lists of an echoed prompt, followed by those of the output."""
    if first is None or then is None:
        return first or then
    return {name: first[name] + then[name] for name in _LISTS}


def _completion_lists(
    formats: Formats, ids: Sequence[int], records: Sequence[Record], offsets: list[int]
) -> dict[str, list[Any]]:
    """OpenAI's completions format, plus `token_ids` and `drawn_logprobs`."""
    shown = formats.shown
    tops = []
    for token, record in zip(ids, records, strict=True):
        # Two tokens may have the same text: the likelier one wins. The token itself is always included.
        likeliest = zip(record.top_ids, record.top_logprobs, strict=True)
        top: dict[str, float] = {}
        for _, (each, logprob) in zip(range(formats.call.logprobs or 0), likeliest, strict=False):
            top.setdefault(shown(each), _number(logprob))
        top.setdefault(shown(token), _number(record.logprob))
        tops.append(top)
    return {
        "tokens": list(map(shown, ids)),
        "token_logprobs": [_number(record.logprob) for record in records],
        "top_logprobs": tops,
        "text_offset": offsets,
        "token_ids": list(ids),
        "drawn_logprobs": [_number(record.drawn_logprob) for record in records],
    }


def _own_fields(call: Call, records: Sequence[Record]) -> dict[str, Any]:
    """The fields in nmoe's own formats."""
    fields: dict[str, Any] = {}
    if k := call.top_k_logprobs:
        fields["top_k_logprobs"] = {
            "ids": [record.top_ids[:k] for record in records],
            "logprobs": [list(map(_number, record.top_logprobs[:k])) for record in records],
        }
    if call.logprob_token_ids:
        fields["token_id_logprobs"] = [list(map(_number, record.scored)) for record in records]
    return fields


def _number(logprob: float) -> float:
    return max(logprob, _LEAST)
