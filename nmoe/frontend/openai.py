"""OpenAI's request schema, as far as nmoe has it: a JSON object becomes a `Call`, or a 400 that names the field.

Every field is checked on its own, then the contradictions between them. null means absent, as OpenAI's clients send it.
What does not exist here is refused, never ignored. Sources: OpenAI's API reference for the fields; vLLM for `top_k`,
`ignore_eos` and `return_token_ids`.
"""

import difflib
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from nmoe.errors import RequestError

Endpoint = Literal["completions", "chat"]

_INT64 = 1 << 63
MAX_STOPS = 4


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The content as one string; parts are joined by newlines, as vLLM does for templates that take strings."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to stream."""

    include_usage: bool = False


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A checked request. Defaults are OpenAI's."""

    endpoint: Endpoint
    model: str = ""  # empty: not given
    prompt: str | list[int] = ""  # completions
    messages: list[ChatMessage] = []  # chat
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False


_SHARED: dict[str, Any] = {
    "model": str,
    "max_tokens": Annotated[int, Meta(ge=1, lt=1 << 31)],
    "temperature": Annotated[float, Meta(ge=0, le=2)],
    "top_p": Annotated[float, Meta(gt=0, le=1)],
    "top_k": Annotated[int, Meta(ge=-1, lt=1 << 31)],  # 0 and -1: off
    "seed": int,
    "stop": str | list[str],
    "ignore_eos": bool,
    "stream": bool,
    "stream_options": StreamOptions,
    "return_token_ids": bool,
}
FIELDS: dict[Endpoint, dict[str, Any]] = {
    "completions": {"prompt": str | list[int], **_SHARED},
    "chat": {"messages": list[ChatMessage], "max_completion_tokens": _SHARED["max_tokens"], **_SHARED},
}
_REQUIRED: dict[Endpoint, str] = {"completions": "prompt", "chat": "messages"}
# Fields of OpenAI's and vLLM's APIs that nmoe does not have: a misspelling of a field above is not the likely cause.
_FOREIGN_NAMES = """
    n logprobs top_logprobs prompt_logprobs echo best_of suffix user logit_bias presence_penalty frequency_penalty
    repetition_penalty min_p min_tokens stop_token_ids tools tool_choice functions function_call response_format
    parallel_tool_calls metadata store service_tier modalities audio prediction reasoning_effort verbosity priority
    profile guided_json structured_outputs chat_template chat_template_kwargs add_generation_prompt
    continue_final_message add_special_tokens skip_special_tokens include_stop_str_in_output web_search_options
"""
_FOREIGN = frozenset(_FOREIGN_NAMES.split())


def parse_call(endpoint: Endpoint, document: dict[str, Any]) -> Call:
    """Check the request. Raises RequestError (400) for the first field that is wrong."""
    fields = FIELDS[endpoint]
    values: dict[str, Any] = {}
    for name, value in document.items():
        if value is None and (name in fields or name in _FOREIGN):
            continue
        if name not in fields:
            raise _unknown(name, list(fields))
        values[name] = _convert(name, value, fields[name])
    required = _REQUIRED[endpoint]
    if required not in values:
        raise RequestError(f"{required}: missing", param=required, code="missing_required_parameter")
    _check_prompt(values, required)
    _settle_lengths(values)
    _settle_stops(values)
    _settle_numbers(values)
    options = values.pop("stream_options", None)
    if options is not None and not values.get("stream"):
        raise RequestError("stream_options: only allowed together with stream: true", param="stream_options")
    return Call(endpoint=endpoint, include_usage=options is not None and options.include_usage, **values)


def _unknown(name: str, known: list[str]) -> RequestError:
    if name in _FOREIGN:
        return RequestError(f"{name}: not supported", param=name, code="unsupported_parameter")
    close = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"known fields: {', '.join(known)}"
    return RequestError(f"{name[:64]}: unknown field; {hint}", param=name[:64], code="unknown_parameter")


def _convert(name: str, value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(_without_nulls(value) if name == "messages" else value, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        param = name + path.strip("`").removeprefix("$")
        raise RequestError(f"{param}: {message[0].lower()}{message[1:]}", param=param) from None


def _without_nulls(messages: Any) -> Any:
    """Clients send back an answer's message as they got it, with nulls for what it does not have."""
    if not isinstance(messages, list):
        return messages
    return [
        {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else message
        for message in messages
    ]


def _check_prompt(values: dict[str, Any], name: str) -> None:
    if len(values[name]) == 0:
        raise RequestError(f"{name}: empty; there must be something to continue", param=name)


def _settle_lengths(values: dict[str, Any]) -> None:
    """`max_completion_tokens` is the newer name of `max_tokens`."""
    newer = values.pop("max_completion_tokens", None)
    if newer is not None and values.setdefault("max_tokens", newer) != newer:
        raise RequestError(
            f"max_completion_tokens = {newer} contradicts max_tokens = {values['max_tokens']}; send one of them",
            param="max_completion_tokens",
        )


def _settle_stops(values: dict[str, Any]) -> None:
    stop = values.get("stop", [])
    values["stop"] = stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop: at most {MAX_STOPS} strings, got {len(stops)}", param="stop")
    if "" in stops:
        raise RequestError("stop: a stop string must not be empty", param="stop")


def _settle_numbers(values: dict[str, Any]) -> None:
    """A top_k of -1 is off, like 0; a seed may be any int64 and is taken modulo 2**63."""
    values["top_k"] = max(values.get("top_k", 0), 0)
    seed = values.get("seed")
    if seed is not None:
        if not -_INT64 <= seed < _INT64:
            raise RequestError(f"seed = {seed}: must fit in 64 bits", param="seed")
        values["seed"] = seed % _INT64
