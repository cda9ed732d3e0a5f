"""Turns a checked request into its prompts' token ids and its Submits, within the model's limits.

`Prompts.of` is the expensive part (template, tokenizer) and runs in a thread.
"""

import array
import random

import msgspec
import tokenizers

from nmoe.checkpoint import tokenizer_file
from nmoe.config import Config
from nmoe.config_json import config_file, is_there
from nmoe.errors import CheckpointError, RequestError
from nmoe.frontend.openai import Call
from nmoe.frontend.schema import Conversation
from nmoe.frontend.special_tokens import added_bos, added_tokens, read_tokenizer_config
from nmoe.frontend.template import ChatTemplate, load_template
from nmoe.frontend.tokenizer import Tokenizer
from nmoe.messages import Sampling, Submit, bias_fields

_FEW_IDS = 8192  # this many are checked faster than a thread can be reached
_COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat may fill the context


class Prompt(msgspec.Struct, frozen=True):
    """One prompt: its ids, the field it came from, and with `echo` its text; `offsets`, of a text that is echoed with
    log-probabilities: where in it each id begins, in characters."""

    ids: list[int]
    field: str
    text: str = ""
    offsets: list[int] | None = None


class Prompts:
    """Turns requests into token ids. `tokenizer` is None with random weights and no tokenizer.json."""

    def __init__(self, tokenizer: Tokenizer | None, template: ChatTemplate | None, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self._template = template
        self._vocab_size = vocab_size

    def of(self, call: Call, max_seq_len: int) -> list[Prompt]:
        """The prompts of a request, each with at least one token and room for output. Raises RequestError."""
        self._check_named_ids(call)
        most = _longest(call, max_seq_len)
        if call.conversation is not None:
            return [Prompt(self.conversation_ids(call.conversation, most), "messages")]
        prompts = []
        for place, given in enumerate(call.prompts):
            field = "prompt" if len(call.prompts) == 1 else f"prompt[{place}]"
            if isinstance(given, str):
                encoding = self._encoding(given, field, most)
                offsets = _beginnings(encoding) if call.echo and call.logprobs is not None else None
                prompt = Prompt(encoding.ids, field, given if call.echo else "", offsets)
            else:
                _check_length(len(given), field, most)
                self.check_ids(given, field)
                prompt = Prompt(given, field, self._shown(given) if call.echo else "")
            prompts.append(prompt)
        return prompts

    def is_long_work(self, call: Call) -> bool:
        """Whether `of` takes longer than handing it to a thread."""
        return bool(call.conversation or call.echo or call.text_length) or sum(map(len, call.prompts)) > _FEW_IDS

    def text_ids(
        self, text: str, field: str, most: int, *, add_special_tokens: bool = True, may_be_empty: bool = False
    ) -> list[int]:
        """The ids of a text, at most `most`. Raises RequestError."""
        return self._encoding(text, field, most, add_special_tokens, may_be_empty).ids

    def _encoding(
        self, text: str, field: str, most: int, add_special_tokens: bool = True, may_be_empty: bool = False
    ) -> tokenizers.Encoding:
        if self.tokenizer is None:
            raise RequestError(f"{field}: this model has no tokenizer.json; send `prompt` as token ids", param=field)
        if (least := self.tokenizer.least_tokens(text)) > most:
            raise RequestError(
                f"{field}: {len(text)} characters are at least {least} tokens, which leave no room in the context: a"
                f" prompt may have at most {most} here",
                param=field,
                code="context_length_exceeded",
            )
        encoding = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        _check_length(len(encoding), field, most)
        if not len(encoding) and not may_be_empty:
            raise RequestError(f"{field}: has no tokens; there must be something to continue", param=field)
        return encoding

    def conversation_ids(self, conversation: Conversation, most: int, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of a conversation; its template writes the special tokens itself. Raises RequestError."""
        if self.tokenizer is not None and self._template is None:
            raise RequestError(
                "messages: this model's checkpoint has no chat template; use /v1/completions", param="messages"
            )
        text = self._template.render(conversation) if self._template is not None else ""
        return self.text_ids(text, "messages", most, add_special_tokens=add_special_tokens)

    def check_ids(self, ids: list[int], field: str) -> None:
        """Raises RequestError if any of `ids` is not in the vocabulary."""
        if not ids or (min(ids) >= 0 and max(ids) < self._vocab_size):
            return
        place, wrong = next((i, x) for i, x in enumerate(ids) if not 0 <= x < self._vocab_size)
        param = f"{field}[{place}]"
        raise RequestError(f"{param} = {wrong}: token ids are from 0 to {self._vocab_size - 1}", param=param)

    def _check_named_ids(self, call: Call) -> None:
        self.check_ids(list(call.stop_token_ids), "stop_token_ids")
        self.check_ids(list(call.logprob_token_ids), "logprob_token_ids")
        for token in call.logit_bias:
            if token >= self._vocab_size:
                message = f"logit_bias: {token}: token ids are from 0 to {self._vocab_size - 1}"
                raise RequestError(message, param="logit_bias")
        if self.tokenizer is None and (call.stop or call.echo):
            field = "stop" if call.stop else "echo"
            raise RequestError(f"{field}: this model has no tokenizer.json, so there is no text", param=field)

    def _shown(self, ids: list[int]) -> str:
        assert self.tokenizer is not None
        detokenizer = self.tokenizer.detokenizer()
        return "".join(map(detokenizer.feed, ids)) + detokenizer.flush()


def load_prompts(config: Config, eos: tuple[int, ...], vocab_size: int) -> Prompts:
    """Load the checkpoint's tokenizer and chat template; optional with random weights. Raises CheckpointError."""
    folder = config_file(config.model.path).parent
    if config.model.weights == "random" and not is_there(folder / "tokenizer.json"):
        return Prompts(None, None, vocab_size)
    file, besides = tokenizer_file(config.model.path), read_tokenizer_config(folder)
    tokenizer = Tokenizer(file, eos, added_bos(folder, besides), added_tokens(folder, besides))
    if tokenizer.largest_id >= vocab_size:
        raise CheckpointError(
            f"{folder}: tokenizer.json has token ids up to {tokenizer.largest_id}, but vocab_size = {vocab_size} in"
            " config.json; tokenizer and model must come from the same repository"
        )
    return Prompts(tokenizer, load_template(folder, besides), vocab_size)


def _beginnings(encoding: tokenizers.Encoding) -> list[int]:
    """Where in the text each token begins. Tokens not in it (BOS) lie between their neighbours, and space that no token
    covers belongs to the next one."""
    found, end = [], 0
    for (start, stop), sequence in zip(encoding.offsets, encoding.sequence_ids, strict=True):
        found.append(end if sequence is None else min(start, end))
        end = max(end, stop)
    return found


def _check_length(num_tokens: int, field: str, most: int) -> None:
    if num_tokens > most:
        raise RequestError(
            f"{field}: {num_tokens} tokens leave no room in the context: a prompt may have at most {most} here",
            param=field,
            code="context_length_exceeded",
        )


def _longest(call: Call, max_seq_len: int) -> int:
    """The longest prompt allowed: some output must fit after it, if any is wanted."""
    return max_seq_len if call.max_tokens == 0 else max_seq_len - 1


def output_limit(call: Call, prompt: Prompt, max_seq_len: int) -> int:
    """The most tokens that a prompt's answer may have. Raises RequestError if the request does not fit."""
    _check_length(len(prompt.ids), prompt.field, _longest(call, max_seq_len))
    room = max_seq_len - len(prompt.ids)
    limit = call.max_tokens
    if limit is None:
        limit = room if call.endpoint == "chat" else min(_COMPLETION_TOKENS, room)
    if limit > room:
        raise RequestError(
            f"{call.limit_field} = {limit}: with a prompt of {len(prompt.ids)} tokens at most {room} fit in the context"
            f" of {max_seq_len} tokens",
            param=call.limit_field,
            code="context_length_exceeded",
        )
    if call.min_tokens > limit:
        remedy = "raise max_tokens" if call.min_tokens <= room else "lower it, or send a shorter prompt"
        message = f"min_tokens = {call.min_tokens}: more than the {limit} tokens that may be generated; {remedy}"
        raise RequestError(message, param="min_tokens")
    return limit


def end_ids(call: Call, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens that end an answer."""
    return tuple(dict.fromkeys((*(() if call.ignore_eos else eos_ids), *call.stop_token_ids)))


def make_sampling(call: Call, ends: tuple[int, ...]) -> Sampling:
    """How all of a request's tokens are sampled. Built once: a request may have many prompts and many biases."""
    return Sampling(
        temperature=call.temperature,
        top_k=call.top_k,
        top_p=call.top_p,
        seed=call.seed or 0,
        min_p=call.min_p,
        presence_penalty=call.presence_penalty,
        frequency_penalty=call.frequency_penalty,
        repetition_penalty=call.repetition_penalty,
        min_tokens=call.min_tokens,
        barred_ids=ends if call.min_tokens else (),
        **bias_fields({token: bias for token, bias in call.logit_bias.items() if bias}),
    )


def make_submit(
    call: Call, generation: int, uid: int, prompt: Prompt, max_tokens: int, sampling: Sampling, ends: tuple[int, ...]
) -> Submit:
    """The message to the scheduler. Each prompt of a request without a seed gets a random one below 2**53, so that
    clients can repeat it: many JSON readers cannot represent larger integers exactly."""
    if call.seed is None:
        sampling = msgspec.structs.replace(sampling, seed=random.getrandbits(53))
    ids = array.array("i", prompt.ids).tobytes()
    return Submit(generation, uid, ids, max_tokens, sampling, ends, call.n, call.priority, call.profile, call.returns)
