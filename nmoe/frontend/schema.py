"""The fields of every request, with types and ranges: what requests are validated against, and what /openapi.json
documents. Sources: OpenAI's API reference; vLLM for what OpenAI does not have.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from nmoe.outputs import MAX_SCORED, MAX_TOP_K

Endpoint = Literal["completions", "chat", "generate"]

MAX_STOPS = 16  # as DeepSeek's own API takes; OpenAI's takes 4
MAX_STOP_IDS = 16  # every token of every request is compared with all of them
MAX_BIASES = 1024
MAX_LIKELIEST = 20  # tokens at each position in OpenAI's and vLLM's formats
MAX_CHOICES = 1024  # in one request, over all prompts


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The function called; `arguments` is JSON, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool call in an assistant message."""

    id: str
    function: Function
    type: Literal["function"] = "function"


Role = Literal["system", "developer", "user", "assistant", "tool"]


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation. Content may be absent only if there are `tool_calls`."""

    role: Role
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] = []  # the assistant's
    tool_call_id: str | None = None  # a tool's: which call it answers
    name: str | None = None  # of the participant, for templates that show it
    type: Literal["text"] = "text"  # what the content is; lm-evaluation-harness says so in every message

    @property
    def text(self) -> str | None:
        """The content as one string; parts are joined by newlines, as vLLM does for templates that take strings."""
        if self.content is None or isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class Conversation(msgspec.Struct, frozen=True):
    """The input of a chat template."""

    messages: list[ChatMessage]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: dict[str, Any] = {}


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


Length = Annotated[int, Meta(ge=0, lt=1 << 31)]
Likeliest = Annotated[int, Meta(ge=0, le=MAX_LIKELIEST)]
StopString = Annotated[str, Meta(max_length=1024)]  # as much text may be held back
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]

_CONVERSATION: dict[str, Any] = {
    "messages": list[ChatMessage],
    "add_generation_prompt": bool,
    "continue_final_message": bool,
    "chat_template_kwargs": dict[str, Any],
}
_SHARED: dict[str, Any] = {
    "model": str,
    "n": Annotated[int, Meta(ge=1, le=128)],
    "max_tokens": Length,
    "min_tokens": Annotated[int, Meta(ge=0, lt=1 << 31)],
    "temperature": Annotated[float, Meta(ge=0, le=2)],
    "top_p": Annotated[float, Meta(gt=0, le=1)],
    "top_k": Annotated[int, Meta(ge=-1, lt=1 << 31)],  # 0 and -1: off
    "min_p": Annotated[float, Meta(ge=0, le=1)],
    "presence_penalty": Annotated[float, Meta(ge=-2, le=2)],
    "frequency_penalty": Annotated[float, Meta(ge=-2, le=2)],
    "repetition_penalty": Annotated[float, Meta(ge=0.01, le=2)],  # divides logits: a smaller one makes them infinite
    "logit_bias": Annotated[
        dict[Annotated[str, Meta(pattern=r"^[0-9]{1,9}$(?!\n)")], Annotated[float, Meta(ge=-100, le=100)]],
        Meta(max_length=MAX_BIASES),
    ],
    "seed": Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)],
    "stop": StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)],
    "stop_token_ids": Annotated[list[TokenId], Meta(max_length=MAX_STOP_IDS)],
    "ignore_eos": bool,
    "stream": bool,
    "stream_options": StreamOptions,
    "return_token_ids": bool,
    "return_tokens_as_token_ids": bool,
    "prompt_logprobs": Likeliest,
    "top_k_logprobs": Annotated[int, Meta(ge=1, le=MAX_TOP_K)],
    "logprob_token_ids": Annotated[list[TokenId], Meta(max_length=MAX_SCORED)],
    "return_routed_experts": bool,
    "priority": Annotated[int, Meta(ge=-(1 << 31), lt=1 << 31)],
    "profile": str,
    "user": Annotated[str, Meta(max_length=512)],
    "metadata": Annotated[
        dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
    ],
}
FIELDS: dict[Endpoint, dict[str, Any]] = {
    "completions": {"prompt": str | list[int | str | list[int]], "echo": bool, "logprobs": Likeliest, **_SHARED},
    "chat": {
        **_CONVERSATION,
        "max_completion_tokens": Length,
        "logprobs": bool,
        "top_logprobs": Likeliest,
        **_SHARED,
    },
}
# Token ids are always returned, without their texts, and logits, if requested, are always streamed.
FIELDS["generate"] = {
    name: kind
    for name, kind in FIELDS["completions"].items()
    if name not in ("stream", "stream_options", "return_token_ids", "return_tokens_as_token_ids")
} | {"logits": bool}
TOKENIZE: dict[str, Any] = {
    "model": str,
    "prompt": str,
    **_CONVERSATION,
    "add_special_tokens": bool,
    "return_token_strs": bool,
}
DETOKENIZE: dict[str, Any] = {"model": str, "tokens": list[TokenId]}
PATHS: dict[Endpoint, str] = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "generate": "/v1/generate",
}
REQUIRED: dict[Endpoint, str] = {"completions": "prompt", "chat": "messages", "generate": "prompt"}

# Fields of OpenAI's and vLLM's APIs that nmoe lacks: for these, a misspelt field is not the likely cause. First those
# that many clients send in every request, with the values that ask for nothing.
ASKS_NOTHING: dict[str, list[Any]] = {
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "store": [False],
    "service_tier": ["auto", "default"],
    "echo": [False],
    "suffix": [""],
    "best_of": [1],
    "use_beam_search": [False],
    "length_penalty": [1],
    "bad_words": [[]],
    "include_reasoning": [True],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True, False],  # special tokens are never shown
    "include_stop_str_in_output": [False],
}
_OTHERS = """
    top_logprobs audio prediction reasoning_effort verbosity guided_json guided_choice guided_regex guided_grammar
    guided_decoding_backend guided_whitespace_pattern structured_outputs chat_template add_special_tokens
    web_search_options safety_identifier prompt_cache_key prompt_cache_retention logits_processors allowed_token_ids
    documents truncate_prompt_tokens truncation_side reasoning thinking_token_budget prompt_embeds mm_processor_kwargs
    media_io_kwargs cache_salt request_id session_id kv_transfer_params vllm_xargs repetition_detection
    stream_interval
"""
FOREIGN = frozenset([*ASKS_NOTHING, *_OTHERS.split()])
