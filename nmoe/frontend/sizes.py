"""Limits the size of an answer: one that might not fit in memory is refused before any of it is computed.

The most that a request may generate counts, since the actual length is unknown. Numbers in JSON have typical lengths.
"""

from collections import Counter
from collections.abc import Sequence

from nmoe.errors import RequestError
from nmoe.frontend.openai import Call
from nmoe.frontend.prompt import Prompt
from nmoe.outputs import RoutingLayout
from nmoe.profiles import PROFILES

MAX_ANSWER_BYTES = 1 << 30  # of everything returned besides text; a frontend holds it about three times
_ID_BYTES = 7  # of a token id in JSON, with its comma
_NUMBER_BYTES = 22  # of a log-probability
_COMPLETION_BYTES = 30  # of a token with its log-probability in OpenAI's completions format
_CHAT_BYTES = 90  # the same in the chat format
_NAME_BYTES = 10  # more of each, if the token is shown by its id
_LOGPROB_BYTES = 60  # in vLLM's format


def check_returned(call: Call, prompts: Sequence[Prompt], max_bytes: int) -> None:
    """Raises RequestError (400) if the prompts that the answers repeat total more than `max_bytes`."""
    per_id = _ID_BYTES if call.return_token_ids else 0
    if call.returns.prompt and call.endpoint != "generate":  # there each prompt appears once, in few bytes
        per_id += _LOGPROB_BYTES * (1 + max(call.prompt_logprobs or 0, call.logprobs or 0))
        per_id += _LOGPROB_BYTES // 2 * (call.top_k_logprobs + len(call.logprob_token_ids))
    copies = 1 if call.endpoint == "chat" else call.n  # in a chat, the prompt is outside the choices
    size = copies * sum(len(prompt.text) + per_id * len(prompt.ids) for prompt in prompts)
    if size > max_bytes:
        param = "prompt_logprobs" if call.prompt_logprobs is not None else "echo" if call.echo else "return_token_ids"
        raise RequestError(
            f"{param}: the prompts, returned with each of n = {call.n} answers, are {size >> 20} MiB, more than"
            f" [server] max_body_mb = {max_bytes >> 20}; ask for fewer answers at once",
            param=param,
        )


def check_answer(call: Call, prompts: Sequence[Prompt], max_tokens: Sequence[int], routing: RoutingLayout) -> None:
    """Raises RequestError (400) if the answer to these prompts, with at most `max_tokens` each, may be too large.

    For a stream only routing counts, because it is kept until the choice ends.
    """
    tokens, prompt_tokens = call.n * sum(max_tokens), sum(len(prompt.ids) for prompt in prompts)
    sizes: Counter[str] = Counter()
    if not call.stream:
        sizes.update({field: size * tokens for field, size in _token_bytes(call).items()})
    if call.endpoint == "generate" and call.returns.prompt:
        asks = "echo" if call.prompt_logprobs is None else "prompt_logprobs"
        sizes[asks] += call.returns.record_bytes * prompt_tokens
    if call.return_routed_experts:
        raw = routing.position_bytes * (tokens + call.n * prompt_tokens)
        sizes["return_routed_experts"] = raw if call.endpoint == "generate" else raw * 4 // 3  # base64
    if (total := sizes.total()) <= MAX_ANSWER_BYTES:
        return
    fields = sorted((field for field, size in sizes.items() if size), key=lambda field: -sizes[field])
    streaming = not call.stream and not call.return_routed_experts and PROFILES[call.profile].streams
    can_stream = ", stream the answer" if streaming and call.endpoint != "generate" else ""
    limit = call.limit_field
    raise RequestError(
        f"{', '.join(fields)}: for {len(prompts)} prompts with n = {call.n} and {limit} = {max(max_tokens)} up to"
        f" {total / 2**30:.1f} GiB may come back, more than the {MAX_ANSWER_BYTES >> 30} GiB of an answer; lower"
        f" {limit} or n, ask for less of each token{can_stream}, or send several requests (nmoe batch takes any"
        " number)",
        param=fields[0],
    )


def _token_bytes(call: Call) -> dict[str, int]:
    """Bytes returned per output token, by the field that asks for them."""
    scored = len(call.logprob_token_ids)
    if call.endpoint == "generate":  # records as they are: nmoe/outputs.py
        return {_widest(call): call.returns.record_bytes} if call.returns.records else {}
    sizes = {
        "top_k_logprobs": (_ID_BYTES + _NUMBER_BYTES) * call.top_k_logprobs,
        "logprob_token_ids": _NUMBER_BYTES * scored,
    }
    name = _NAME_BYTES if call.return_tokens_as_token_ids else 0
    if call.logprobs is not None and call.endpoint == "chat":
        sizes["logprobs"] = (_CHAT_BYTES + name) * (call.logprobs + 1) + 2 * _NUMBER_BYTES
    elif call.logprobs is not None:
        sizes["logprobs"] = (_COMPLETION_BYTES + name) * (call.logprobs + 2) + 2 * (_NUMBER_BYTES + _ID_BYTES)
    return sizes


def _widest(call: Call) -> str:
    """The field that contributes most to a record's size."""
    per_id = {"logprobs": call.logprobs, "prompt_logprobs": call.prompt_logprobs, "top_k_logprobs": call.top_k_logprobs}
    numbers = {field: 8 * number for field, number in per_id.items() if number}
    numbers |= {"logprob_token_ids": 4 * len(call.logprob_token_ids)} if call.logprob_token_ids else {}
    alone = "logits" if call.logits else "logprobs" if call.logprobs is not None else "prompt_logprobs"
    return max(numbers, key=numbers.__getitem__, default=alone)
