"""OpenAI's response bodies: whole answers, errors, the list of models, and the frames of a stream's chunks.

Chunks with text are what a frontend writes most, so everything in them but the text and the ids is rendered once
per choice, and `Chunks.text` fills in the rest.
"""

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from nmoe.errors import RequestError
from nmoe.frontend.logprobs import ChoiceFormats, fragment, joined
from nmoe.frontend.openai import Call
from nmoe.frontend.prompt import Prompt
from nmoe.frontend.streams import Stream

_OBJECTS = {"completions": ("text_completion", "text_completion"), "chat": ("chat.completion", "chat.completion.chunk")}
_ID_PREFIX = {"completions": "cmpl-", "chat": "chatcmpl-"}
_MAX_MESSAGE, _MAX_PARAM = 1000, 100  # characters; both may quote the client
_encode = msgspec.json.Encoder().encode
# Placeholders for what changes between chunks; they cannot occur in a rendered body, where quotes are escaped.
_TEXT, _IDS = "\u0001text\u0001", "\u0001ids\u0001"


class Choice(msgspec.Struct):
    """One of a request's answers: `index` = prompt's place * n + sibling's place, as OpenAI numbers them."""

    index: int
    prompt: Prompt
    stream: Stream
    formats: ChoiceFormats | None = None  # None if the request wants only tokens
    seed: int | None = None  # its prompt's, if it was drawn and the client is to be told


def error_body(error: RequestError) -> bytes:
    """OpenAI's error object."""
    return orjson.dumps(
        {
            "error": {
                "message": str(error)[:_MAX_MESSAGE],
                "type": error.type,
                "param": error.param and error.param[:_MAX_PARAM],
                "code": error.code,
            }
        }
    )


def models_body(name: str, created: int, max_seq_len: int | None) -> dict[str, Any]:
    """The one model, as a list."""
    return {"object": "list", "data": [model_body(name, created, max_seq_len)]}


def model_body(name: str, created: int, max_seq_len: int | None) -> dict[str, Any]:
    """The model itself; `max_model_len` as in vLLM, None until the engine serves."""
    return {"id": name, "object": "model", "created": created, "owned_by": "nmoe", "max_model_len": max_seq_len}


def _counts(choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """Tokens so far; a prompt counts once, however many siblings share it."""
    prompts = sum(len(choice.prompt.ids) for choice in choices[::n])
    output = sum(choice.stream.num_tokens for choice in choices)
    return {"prompt_tokens": prompts, "completion_tokens": output, "total_tokens": prompts + output}


def usage(choices: Sequence[Choice], n: int) -> dict[str, Any]:
    """Token counts of a request whose streams have ended; cached tokens are those of the first sibling."""
    cached = sum(choice.stream.cached_tokens for choice in choices[::n])
    return _counts(choices, n) | {"prompt_tokens_details": {"cached_tokens": cached}}


def _header(call: Call, model: str, uid: int, *, chunk: bool) -> dict[str, Any]:
    return {
        "id": f"{_ID_PREFIX[call.endpoint]}{uid:x}",
        "object": _OBJECTS[call.endpoint][chunk],
        "created": int(time.time()),
        "model": model,
    }


def whole_body(call: Call, model: str, choices: Sequence[Choice]) -> bytes:
    """The answer of a request without `stream`, built from its finished streams."""
    body = _header(call, model, choices[0].stream.uid, chunk=False)
    if call.return_token_ids and call.endpoint == "chat":
        body["prompt_token_ids"] = choices[0].prompt.ids
    body |= {
        "choices": [_rendered(_whole(call, choice), choice) for choice in choices],
        "usage": usage(choices, call.n),
    }
    first = choices[0]
    if call.endpoint == "chat" and first.formats is not None:
        body |= first.formats.prompt.fields
    if first.seed is not None and len(call.prompts) <= 1:
        body["seed"] = first.seed
    return orjson.dumps(body)


def _rendered(entry: dict[str, Any], choice: Choice) -> dict[str, Any] | orjson.Fragment:
    """Render outputs to bytes at once, a tenth of the memory: only one choice's objects exist at a time."""
    return entry if choice.formats is None else fragment(entry)


def _whole(call: Call, choice: Choice) -> dict[str, Any]:
    text, ids = choice.stream.take()
    entry: dict[str, Any] = {"index": choice.index, "logprobs": None, "finish_reason": choice.stream.reason}
    if call.endpoint == "chat":
        entry["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        entry["text"] = choice.prompt.text + text
    if call.return_token_ids:
        entry["token_ids"] = ids
        if call.endpoint == "completions":
            entry["prompt_token_ids"] = choice.prompt.ids
    if choice.seed is not None and len(call.prompts) > 1:
        entry["seed"] = choice.seed
    if choice.formats is not None:
        entry |= choice.formats.take(ids) | choice.formats.routed()
        if call.endpoint == "completions":
            entry |= choice.formats.prompt.fields
            entry["logprobs"] = joined(choice.formats.prompt.echoed, entry["logprobs"])
    return entry


class Answer:
    """What the chunks of a streamed answer share."""

    def __init__(self, call: Call, model: str, choices: Sequence[Choice]) -> None:
        self.call = call
        self.choices = choices
        self.header = _header(call, model, choices[0].stream.uid, chunk=True)

    def counts(self) -> dict[str, Any] | None:
        """The usage to put in every chunk; None unless `continuous_usage_stats`."""
        return _counts(self.choices, self.call.n) if self.call.continuous_usage else None

    def usage(self) -> bytes:
        """The final chunk that `include_usage` asks for."""
        return orjson.dumps(self.header | {"choices": [], "usage": usage(self.choices, self.call.n)})


class Chunks:
    """The chunks of one choice, as JSON."""

    def __init__(self, answer: Answer, choice: Choice) -> None:
        self._answer = answer
        self._call = call = answer.call
        self._choice = choice
        self._is_chat = call.endpoint == "chat"
        self._prompt_due = call.return_token_ids
        self._before = self._between = self._after = b""
        if not call.continuous_usage:
            frame = orjson.dumps(self._chunk(_TEXT, _IDS if call.return_token_ids else None, None))
            self._before, rest = frame.split(orjson.dumps(_TEXT))
            self._between, self._after = rest.split(orjson.dumps(_IDS)) if call.return_token_ids else (rest, b"")

    def opening(self) -> bytes | None:
        """The chunk before the first text: a chat's role, or the prompt to be echoed."""
        if not self._is_chat and not self._choice.prompt.text:
            return None
        return orjson.dumps(self._opening())

    def text(self, text: str, ids: list[int]) -> bytes:
        """A chunk with new text and, if requested, the ids it came with."""
        if self._prompt_due or not self._before:
            some_ids = ids if self._call.return_token_ids else None
            return orjson.dumps(self._with_prompt(self._chunk(text, some_ids, None)))
        if self._after:
            return b"".join((self._before, _encode(text), self._between, _encode(ids), self._after))
        return b"".join((self._before, _encode(text), self._between))

    def closing(self, text: str, ids: list[int]) -> bytes:
        """The chunk with the finish reason and everything held back so far."""
        chunk = self._chunk(text, ids if self._call.return_token_ids else None, self._choice.stream.reason)
        if self._is_chat and not text:
            chunk["choices"][0]["delta"] = {}
        return orjson.dumps(self._with_prompt(chunk))

    def _opening(self) -> dict[str, Any]:
        no_ids: list[int] | None = [] if self._call.return_token_ids else None
        chunk = self._chunk(self._choice.prompt.text, no_ids, None)
        if self._is_chat:
            chunk["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return self._with_prompt(chunk)

    def _chunk(self, text: str, ids: Any, reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": self._choice.index}
        if self._is_chat:
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": reason}
        if ids is not None:
            choice["token_ids"] = ids
        counts = {"usage": self._answer.counts()} if self._call.include_usage else {}
        return self._answer.header | {"choices": [choice]} | counts

    def _with_prompt(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """vLLM puts the prompt's ids into the first chunk: a chat's at the top, a completion's in the choice."""
        if self._prompt_due:
            (chunk if self._is_chat else chunk["choices"][0])["prompt_token_ids"] = self._choice.prompt.ids
            self._prompt_due = False
        return chunk


class OutputChunks(Chunks):
    """The chunks of a choice that returns more than tokens; the first comes when the prompt has been computed."""

    def __init__(self, answer: Answer, choice: Choice, formats: ChoiceFormats) -> None:
        super().__init__(answer, choice)
        self._formats = formats
        self._opened = False

    def opening(self) -> bytes | None:
        """The chunk before the first text, with the prompt's outputs; None after the first call."""
        if self._opened:
            return None
        self._opened = True
        prompt = self._formats.prompt
        if not (self._is_chat or self._choice.prompt.text or prompt.fields or prompt.echoed):
            return None
        chunk = self._opening()
        (chunk if self._is_chat else chunk["choices"][0]).update(prompt.fields)
        chunk["choices"][0]["logprobs"] = prompt.echoed_json
        return orjson.dumps(chunk)

    def text(self, text: str, ids: list[int]) -> bytes:
        """A chunk with the text of some tokens and their outputs."""
        chunk = self._chunk(text, ids if self._call.return_token_ids else None, None)
        chunk["choices"][0] |= self._formats.take(ids)
        return orjson.dumps(self._with_prompt(chunk))

    def closing(self, text: str, ids: list[int]) -> bytes:
        """The chunk with the finish reason, everything held back, and the routing."""
        chunk = self._chunk(text, ids if self._call.return_token_ids else None, self._choice.stream.reason)
        if self._is_chat and not text:
            chunk["choices"][0]["delta"] = {}
        chunk["choices"][0] |= (self._formats.take(ids) if ids else {}) | self._formats.routed()
        return orjson.dumps(self._with_prompt(chunk))
