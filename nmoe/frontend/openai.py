"""OpenAI's requests: turns a JSON object into a `Call`, or into a 400 that names the field.

Every field is checked on its own against `schema.py`; then contradictions between fields are. null means absent, as
OpenAI's clients send it. What is not supported here is refused, never ignored, unless it asks for nothing.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any, get_args

import msgspec

from nmoe.errors import RequestError
from nmoe.frontend.schema import (
    ASKS_NOTHING,
    DETOKENIZE,
    FIELDS,
    FOREIGN,
    MAX_CHOICES,
    PATHS,
    REQUIRED,
    TOKENIZE,
    Conversation,
    Endpoint,
    Role,
)
from nmoe.keys import inside
from nmoe.outputs import MAX_TOP_K, Returns
from nmoe.profiles import PROFILES, Profile

_TEMPLATES_OWN_NAMES = """
    messages tools documents add_generation_prompt continue_final_message chat_template tokenize
    bos_token eos_token unk_token pad_token raise_exception strftime_now
"""
_TEMPLATES_OWN = frozenset(_TEMPLATES_OWN_NAMES.split())
_UNKNOWN = re.compile("Object contains unknown field `(.*)`", re.DOTALL)
_PLACE = re.compile(r"\[([0-9]+)\]")
_PLACES = re.compile(r"(\[[0-9]+\])*")
_NUMBERS_OF_LIKELIEST = ("logprobs", "top_logprobs", "prompt_logprobs", "top_k_logprobs")


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A validated generation request. Defaults are OpenAI's."""

    endpoint: Endpoint
    model: str = ""  # empty: not given
    prompts: list[str | list[int]] = []  # completions, at least one
    conversation: Conversation | None = None  # chat
    n: int = 1
    max_tokens: int | None = None
    limit_field: str = "max_tokens"  # what the client called it
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False  # in `logprobs`
    logprobs: int | None = None  # of output tokens, plus this many likeliest tokens at each; None: not wanted
    prompt_logprobs: int | None = None  # the same for the prompt
    top_k_logprobs: int = 0  # this many likeliest tokens in nmoe's own format
    logprob_token_ids: tuple[int, ...] = ()
    return_routed_experts: bool = False
    logits: bool = False  # for every position that has log-probabilities
    priority: int = 0
    profile: str = "production_generate"
    user: str = ""
    metadata: dict[str, str] = {}
    text_length: int = 0  # characters that may have to be tokenized, excluding the template's own

    @property
    def is_repeatable(self) -> bool:
        """Whether the client is told the seed that was drawn for it."""
        return self.seed is None and self.profile == "rl_sample"

    @property
    def returns(self) -> Returns:
        """What must come back with the tokens, for all fields together."""
        prompt = self.prompt_logprobs is not None or (self.echo and self.logprobs is not None)
        records = prompt or self.logprobs is not None or self.top_k_logprobs > 0 or bool(self.logprob_token_ids)
        records = records or self.logits
        top_k = max(self.logprobs or 0, self.prompt_logprobs or 0, self.top_k_logprobs)
        return Returns(
            records, prompt, top_k, self.logprob_token_ids, logits=self.logits, routing=self.return_routed_experts
        )


class ToTokenize(msgspec.Struct, frozen=True):
    """A validated request for the ids of a text or a conversation."""

    model: str
    text: str | Conversation
    add_special_tokens: bool
    return_token_strs: bool
    text_length: int


class ToDetokenize(msgspec.Struct, frozen=True):
    """A validated request for the text of ids."""

    model: str
    tokens: list[int]


def parse_call(endpoint: Endpoint, document: dict[str, Any], vocab_size: int = MAX_TOP_K) -> Call:
    """Check a generation request. Raises RequestError (400) for the first invalid field.

    `vocab_size`: a smaller vocabulary has fewer likeliest tokens than the fields allow.
    """
    values = _read(document, FIELDS[endpoint])
    _require(values, REQUIRED[endpoint])
    if endpoint == "chat":
        values["conversation"] = _conversation(values)
    else:
        values["prompts"] = _prompts(values.pop("prompt"))
    _settle_lengths(values)
    _settle_stops(values)
    _settle_numbers(values)
    profile = _settle_profile(values)
    _settle_outputs(endpoint, values, profile, vocab_size)
    _settle_streaming(values, profile)
    _check_scoring(values)
    conversation = values.get("conversation")
    length = _written(conversation) if conversation else _characters(values["prompts"])
    call = Call(endpoint=endpoint, text_length=length, **values)
    if len(call.prompts) * call.n > MAX_CHOICES:
        message = f"prompt: {len(call.prompts)} prompts with n = {call.n} make more than {MAX_CHOICES} choices"
        raise RequestError(message, param="prompt")
    return call


def parse_tokenize(document: dict[str, Any]) -> ToTokenize:
    """Check a request for token ids. Raises RequestError (400)."""
    values = _read(document, TOKENIZE)
    model, special = values.pop("model", ""), values.pop("add_special_tokens", None)
    strings = values.pop("return_token_strs", False)
    if "prompt" in values:
        if others := sorted(values.keys() - {"prompt"}):
            raise RequestError(f"{others[0]}: not together with prompt", param=others[0])
        return ToTokenize(model, values["prompt"], special is not False, strings, len(values["prompt"]))
    if "messages" not in values:
        raise RequestError(
            "prompt: missing; send prompt or messages", param="prompt", code="missing_required_parameter"
        )
    conversation = _conversation(values)
    return ToTokenize(model, conversation, special is True, strings, _written(conversation))


def parse_detokenize(document: dict[str, Any]) -> ToDetokenize:
    """Check a request for text. Raises RequestError (400)."""
    values = _read(document, DETOKENIZE)
    _require(values, "tokens", may_be_empty=True)
    return ToDetokenize(values.get("model", ""), values["tokens"])


def _characters(texts: Iterable[Any]) -> int:
    return sum(len(text) for text in texts if isinstance(text, str))


def _written(conversation: Conversation) -> int:
    """The most characters of a conversation that its template may write: everything the client sent in it."""
    count = _characters(text for message in conversation.messages for text in (message.text, message.name))
    for call in (call for message in conversation.messages for call in message.tool_calls):
        count += len(call.id) + len(call.function.name) + len(call.function.arguments)
    containers: list[Any] = [conversation.template_kwargs]  # not recursive: the client controls the nesting
    while containers:
        container = containers.pop()
        items = container.values() if isinstance(container, dict) else container
        count += _characters(items)
        containers += [item for item in items if isinstance(item, dict | list)]
    return count


def _same(value: Any, other: Any) -> bool:
    """Whether both are the same in JSON, where true is not 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _read(document: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in document.items():
        if value is None and (name in fields or name in FOREIGN):
            continue
        if name not in fields:
            if any(_same(value, nothing) for nothing in ASKS_NOTHING.get(name, [])):
                continue
            raise _unknown(name, list(fields))
        values[name] = _convert(name, value, fields[name])
    return values


def _unknown(name: str, known: list[str]) -> RequestError:
    homes = ", ".join(path for endpoint, path in PATHS.items() if name in FIELDS[endpoint])
    if name in FOREIGN:
        remedy = f"it belongs to {homes}" if homes else "leave it out"
        return RequestError(f"{name}: not supported; {remedy}", param=name, code="unsupported_parameter")
    close = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}?" if close else f"known fields: {', '.join(known)}"
    if homes:  # a field of the same name, not one of a similar name
        hint = f"it belongs to {homes}"
    return RequestError(f"{name[:64]}: unknown field; {hint}", param=name[:64], code="unknown_parameter")


def _convert(name: str, value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(_without_nulls(value) if name == "messages" else value, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        # A key of an object has no path of its own: "`key` in `$`".
        param = name + path.rpartition(" in ")[2].strip("`").removeprefix("$")
        if message.startswith("Expected `int") and _was_long_integer(value, param.removeprefix(name)):
            message = "Expected `int` of at most 64 bits, sign included"
        elif unknown := _UNKNOWN.fullmatch(message):
            param, message = inside(param, unknown[1]), "Unknown field; leave it out"
        elif "matching regex" in message:
            message = "Its keys are token ids, written in decimal digits"
        elif param.endswith(".role") and message.startswith("Invalid enum value"):
            message += f"; one of {', '.join(get_args(Role))}"
        elif param.endswith("].type") and message.startswith("Invalid enum value"):
            message += "; only function is supported" if ".tool_calls" in param else "; only text is supported"
        raise RequestError(f"{param}: {message[0].lower()}{message[1:]}", param=param) from None
    except RecursionError:
        raise RequestError(f"{name}: nested too deeply", param=name) from None


def _was_long_integer(value: Any, path: str) -> bool:
    """Whether the value at `path` in `value` is an integer of over 64 bits, which the JSON parser reads as a float."""
    if not _PLACES.fullmatch(path):
        return False
    for place in _PLACE.findall(path):
        value = value[int(place)]
    return isinstance(value, float) and value.is_integer() and abs(value) >= 1 << 63


def _without_nulls(messages: Any) -> Any:
    """Drop nulls: clients return an answer's message as they received it, with nulls for absent fields."""
    if not isinstance(messages, list):
        return messages
    return [
        {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else message
        for message in messages
    ]


def _require(values: dict[str, Any], name: str, *, may_be_empty: bool = False) -> None:
    if name not in values:
        raise RequestError(f"{name}: missing", param=name, code="missing_required_parameter")
    if not may_be_empty and len(values[name]) == 0:
        raise RequestError(f"{name}: empty; there must be something to continue", param=name)


def _prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """The prompts of a completion: the field holds one prompt or a list of them."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [prompt]
    if len(kinds) > 1:
        place = next(i for i, item in enumerate(prompt) if type(item) is not type(prompt[0]))
        message = f"prompt[{place}]: one text, texts, token ids, or lists of token ids; not a mixture"
        raise RequestError(message, param=f"prompt[{place}]")
    for place, item in enumerate(prompt):
        if len(item) == 0:
            raise RequestError(f"prompt[{place}]: empty; there must be something to continue", param=f"prompt[{place}]")
    return prompt


def _conversation(values: dict[str, Any]) -> Conversation:
    """Build a conversation, removing its fields from `values`."""
    _require(values, "messages")
    messages = values.pop("messages")
    goes_on = values.pop("continue_final_message", False)
    opens = values.pop("add_generation_prompt", not goes_on)
    kwargs = values.pop("chat_template_kwargs", {})
    if goes_on and opens:
        message = "continue_final_message: contradicts add_generation_prompt = true, which begins a new message"
        raise RequestError(message, param="continue_final_message")
    for name in kwargs:
        if name in _TEMPLATES_OWN:
            message = f"chat_template_kwargs.{name}: the template gets this from elsewhere"
            raise RequestError(message, param=f"chat_template_kwargs.{name}")
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if message.tool_calls and message.role != "assistant":
            raise RequestError(f"{where}.tool_calls: only the assistant calls tools", param=f"{where}.tool_calls")
        if message.tool_call_id is not None and message.role != "tool":
            raise RequestError(f"{where}.tool_call_id: only of the role tool", param=f"{where}.tool_call_id")
        if message.content is None and not message.tool_calls:
            raise RequestError(f"{where}: object missing required field `content`", param=where)
    if goes_on and not messages[-1].text:
        raise RequestError("continue_final_message: the last message has no text", param="continue_final_message")
    return Conversation(messages, opens, goes_on, kwargs)


def _settle_lengths(values: dict[str, Any]) -> None:
    """`max_completion_tokens` is the newer name for `max_tokens`."""
    newer = values.pop("max_completion_tokens", None)
    field = "max_tokens" if newer is None or "max_tokens" in values else "max_completion_tokens"
    values["limit_field"] = field
    if newer is not None and values.setdefault("max_tokens", newer) != newer:
        raise RequestError(
            f"max_completion_tokens = {newer} contradicts max_tokens = {values['max_tokens']}; send one of them",
            param="max_completion_tokens",
        )
    least, most = values.get("min_tokens", 0), values.get("max_tokens")
    if most is not None and least > most:
        raise RequestError(f"min_tokens = {least}: more than {field} = {most}", param="min_tokens")


def _settle_stops(values: dict[str, Any]) -> None:
    stop = values.get("stop", [])
    values["stop"] = stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise RequestError("stop: a stop string must not be empty", param="stop")
    values["stop_token_ids"] = tuple(dict.fromkeys(values.get("stop_token_ids", ())))


def _settle_numbers(values: dict[str, Any]) -> None:
    """A top_k of -1 is off, like 0; a seed may be any int64 and is taken modulo 2**63."""
    values["top_k"] = max(values.get("top_k", 0), 0)
    seed = values.get("seed")
    if seed is not None:
        values["seed"] = seed % (1 << 63)
    bias = values.get("logit_bias", {})
    values["logit_bias"] = by_id = {int(token): value for token, value in bias.items()}
    if len(by_id) < len(bias):
        raise RequestError("logit_bias: a token id appears more than once", param="logit_bias")


def _settle_profile(values: dict[str, Any]) -> Profile:
    name = values.get("profile", "production_generate")
    if name not in PROFILES:
        raise RequestError(f"profile: unknown; there are {', '.join(PROFILES)}", param="profile")
    return PROFILES[name]


def _settle_outputs(endpoint: Endpoint, values: dict[str, Any], profile: Profile, vocab_size: int) -> None:
    """What is returned besides the tokens: what was asked for, plus what the profile includes by default."""
    for name in _NUMBERS_OF_LIKELIEST:
        if (number := values.get(name, 0)) > vocab_size:
            raise RequestError(f"{name} = {number}: the model's vocabulary has {vocab_size} tokens", param=name)
    if endpoint == "chat":
        _settle_chat_logprobs(values, profile)
    elif profile.scores:
        values.setdefault("logprobs", 0)
    if profile.scores_prompt:
        values.setdefault("prompt_logprobs", 0)
    if profile.top_k:
        values.setdefault("top_k_logprobs", min(profile.top_k, vocab_size))
    ids = values.get("logprob_token_ids", [])
    if len(set(ids)) < len(ids):
        raise RequestError("logprob_token_ids: a token id appears more than once", param="logprob_token_ids")
    values["logprob_token_ids"] = tuple(ids)


def _settle_chat_logprobs(values: dict[str, Any], profile: Profile) -> None:
    """A chat has a switch and, separately, a number; 0, vLLM's default, asks for nothing."""
    is_on, number = values.pop("logprobs", profile.scores), values.pop("top_logprobs", 0)
    if number and not is_on:
        raise RequestError("top_logprobs: only together with logprobs: true", param="top_logprobs")
    if is_on:
        values["logprobs"] = number


def _settle_streaming(values: dict[str, Any], profile: Profile) -> None:
    if values.get("stream") and not profile.streams:
        streaming = ", ".join(name for name, each in PROFILES.items() if each.streams)
        raise RequestError(
            f"stream: the profile {profile.name} does not stream; leave stream out, or use {streaming}", param="stream"
        )
    options = values.pop("stream_options", None)
    if options is None:
        return
    if not values.get("stream"):
        raise RequestError("stream_options: only allowed together with stream: true", param="stream_options")
    if options.continuous_usage_stats and not options.include_usage:
        param = "stream_options.continuous_usage_stats"
        raise RequestError(f"{param}: only allowed together with include_usage: true", param=param)
    values |= {"include_usage": options.include_usage, "continuous_usage": options.continuous_usage_stats}


def _check_scoring(values: dict[str, Any]) -> None:
    """If nothing is generated, something must be asked of the prompt."""
    asked = ("echo", "return_routed_experts")
    if values.get("max_tokens") == 0 and values.get("prompt_logprobs") is None and not any(map(values.get, asked)):
        field = values["limit_field"]
        echo = "" if "conversation" in values else "echo with logprobs, "
        raise RequestError(
            f"{field} = 0: nothing would come back; ask for something of the prompt (prompt_logprobs, {echo}"
            "return_routed_experts), or for tokens",
            param=field,
        )
