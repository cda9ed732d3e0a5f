"""From a checked request to its prompt's token ids and its Submit, within the model's limits.

`Prompts.ids` is the expensive part (template, tokenizer) and runs in a thread.
"""

import array
import random

from nmoe.errors import RequestError
from nmoe.frontend.openai import Call
from nmoe.frontend.template import ChatTemplate
from nmoe.frontend.tokenizer import Tokenizer
from nmoe.messages import Sampling, Submit

_COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat may go on to the context's end


class Prompts:
    """Turns requests into token ids. `tokenizer` is None with random weights and no tokenizer.json."""

    def __init__(self, tokenizer: Tokenizer | None, template: ChatTemplate | None, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self._template = template
        self._vocab_size = vocab_size

    def ids(self, call: Call) -> list[int]:
        """The prompt's token ids, at least one. Raises RequestError."""
        field = "messages" if call.endpoint == "chat" else "prompt"
        if isinstance(call.prompt, list) and field == "prompt":
            self._check_ids(call.prompt)
            return call.prompt
        if self.tokenizer is None:
            raise RequestError(f"{field}: this model has no tokenizer.json; send `prompt` as token ids", param=field)
        if call.endpoint == "chat":
            if self._template is None:
                raise RequestError(
                    "messages: this model's checkpoint has no chat template; use /v1/completions", param="messages"
                )
            ids = self.tokenizer.encode(self._template.render(call.messages), add_special_tokens=False)
        else:
            assert isinstance(call.prompt, str)
            ids = self.tokenizer.encode(call.prompt, add_special_tokens=True)
        if not ids:
            raise RequestError(f"{field}: has no tokens; there must be something to continue", param=field)
        return ids

    def _check_ids(self, ids: list[int]) -> None:
        if min(ids) >= 0 and max(ids) < self._vocab_size:
            return
        place, wrong = next((i, x) for i, x in enumerate(ids) if not 0 <= x < self._vocab_size)
        raise RequestError(
            f"prompt[{place}] = {wrong}: token ids are from 0 to {self._vocab_size - 1}", param=f"prompt[{place}]"
        )


def output_limit(call: Call, prompt_len: int, max_seq_len: int) -> int:
    """How many tokens the request may generate. Raises RequestError when what it asks for does not fit."""
    field = "messages" if call.endpoint == "chat" else "prompt"
    room = max_seq_len - prompt_len
    if room < 1:
        raise RequestError(
            f"{field}: {prompt_len} tokens leave no room for output in the context of {max_seq_len} tokens",
            param=field,
            code="context_length_exceeded",
        )
    if call.max_tokens is None:
        return room if call.endpoint == "chat" else min(_COMPLETION_TOKENS, room)
    if call.max_tokens > room:
        raise RequestError(
            f"max_tokens = {call.max_tokens}: with a prompt of {prompt_len} tokens at most {room} fit in the context of"
            f" {max_seq_len} tokens",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return call.max_tokens


def make_submit(
    call: Call, generation: int, uid: int, ids: list[int], max_tokens: int, eos_ids: tuple[int, ...]
) -> Submit:
    """The message to the scheduler. A request without a seed gets a random one."""
    seed = random.getrandbits(63) if call.seed is None else call.seed
    return Submit(
        generation,
        uid,
        array.array("i", ids).tobytes(),
        max_tokens,
        Sampling(call.temperature, call.top_k, call.top_p, seed),
        eos_ids=() if call.ignore_eos else eos_ids,
    )
