"""OpenAI's response bodies: whole answers, errors, the list of models, and the frames of a stream's chunks.

A chunk with text is the commonest thing that a frontend writes, so all of it but the text and the ids is rendered once
per request: `Chunks.text` puts them between ready bytes.
"""

import time
from typing import Any

import msgspec
import orjson

from nmoe.errors import RequestError
from nmoe.frontend.openai import Call
from nmoe.frontend.streams import Stream

_OBJECTS = {"completions": ("text_completion", "text_completion"), "chat": ("chat.completion", "chat.completion.chunk")}
_ID_PREFIX = {"completions": "cmpl-", "chat": "chatcmpl-"}
_encode = msgspec.json.Encoder().encode
# Stand-ins for what changes from chunk to chunk; none can occur in a rendered body, where quotes are escaped.
_TEXT, _IDS = "\u0001text\u0001", "\u0001ids\u0001"


def error_body(error: RequestError) -> bytes:
    """OpenAI's error object."""
    return orjson.dumps(
        {
            "error": {
                "message": str(error),
                "type": _error_type(error.status),
                "param": error.param,
                "code": error.code,
            }
        }
    )


def _error_type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")


def models_body(name: str, created: int, max_seq_len: int | None) -> dict[str, Any]:
    """The one model, in the list's form."""
    return {"object": "list", "data": [model_body(name, created, max_seq_len)]}


def model_body(name: str, created: int, max_seq_len: int | None) -> dict[str, Any]:
    """The model itself; `max_model_len` as vLLM has it, None until the engine serves."""
    return {"id": name, "object": "model", "created": created, "owned_by": "nmoe", "max_model_len": max_seq_len}


def usage(stream: Stream, prompt_tokens: int) -> dict[str, Any]:
    """Token counts of a finished stream."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": stream.num_tokens,
        "total_tokens": prompt_tokens + stream.num_tokens,
        "prompt_tokens_details": {"cached_tokens": stream.cached_tokens},
    }


def _header(call: Call, model: str, uid: int, *, chunk: bool) -> dict[str, Any]:
    return {
        "id": f"{_ID_PREFIX[call.endpoint]}{uid:x}",
        "object": _OBJECTS[call.endpoint][chunk],
        "created": int(time.time()),
        "model": model,
    }


def whole_body(call: Call, model: str, stream: Stream, prompt: list[int]) -> bytes:
    """The answer of a request without `stream`, from its finished stream."""
    text, ids = stream.take()
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": stream.reason}
    body = _header(call, model, stream.uid, chunk=False) | {"choices": [choice], "usage": usage(stream, len(prompt))}
    if call.endpoint == "chat":
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        choice["text"] = text
    if call.return_token_ids:
        choice["token_ids"] = ids
        (body if call.endpoint == "chat" else choice)["prompt_token_ids"] = prompt
    return orjson.dumps(body)


class Chunks:
    """The chunks of one stream, as JSON."""

    def __init__(self, call: Call, model: str, stream: Stream, prompt: list[int]) -> None:
        self._call = call
        self._stream = stream
        self._prompt = prompt
        self._is_chat = call.endpoint == "chat"
        self._header = _header(call, model, stream.uid, chunk=True)
        self._prompt_due = call.return_token_ids
        frame = orjson.dumps(self._chunk(_TEXT, _IDS if call.return_token_ids else None, None))
        self._before, rest = frame.split(orjson.dumps(_TEXT))
        self._between, self._after = rest.split(orjson.dumps(_IDS)) if call.return_token_ids else (rest, b"")

    def opening(self) -> bytes | None:
        """The chunk before the first text: a chat's role."""
        if not self._is_chat:
            return None
        chunk = self._chunk("", [] if self._call.return_token_ids else None, None)
        chunk["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return orjson.dumps(self._with_prompt(chunk))

    def text(self, text: str, ids: list[int]) -> bytes:
        """A chunk with new text and, when asked for, the ids it came with."""
        if self._prompt_due:
            return orjson.dumps(self._with_prompt(self._chunk(text, ids, None)))
        if self._after:
            return b"".join((self._before, _encode(text), self._between, _encode(ids), self._after))
        return b"".join((self._before, _encode(text), self._between))

    def closing(self, text: str, ids: list[int]) -> bytes:
        """The chunk with the finish reason, and what was held back until now."""
        chunk = self._chunk(text, ids if self._call.return_token_ids else None, self._stream.reason)
        if self._is_chat and not text:
            chunk["choices"][0]["delta"] = {}
        return orjson.dumps(self._with_prompt(chunk) if self._prompt_due else chunk)

    def usage(self) -> bytes:
        """The chunk that `include_usage` asks for."""
        return orjson.dumps(self._header | {"choices": [], "usage": usage(self._stream, len(self._prompt))})

    def _chunk(self, text: str, ids: Any, reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0}
        if self._is_chat:
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        choice |= {"logprobs": None, "finish_reason": reason}
        if ids is not None:
            choice["token_ids"] = ids
        return self._header | {"choices": [choice]} | ({"usage": None} if self._call.include_usage else {})

    def _with_prompt(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """vLLM puts the prompt's ids into the first chunk: a chat's at the top, a completion's in the choice."""
        if self._prompt_due:
            (chunk if self._is_chat else chunk["choices"][0])["prompt_token_ids"] = self._prompt
            self._prompt_due = False
        return chunk
