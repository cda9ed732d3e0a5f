"""The messages between processes: frozen, tagged, array-like msgspec Structs, one union per link.

Fields are only ever appended, with defaults. Every message carries the `generation` of its sender (which life of that
process sent it); receivers drop messages from earlier lives. Arrays travel as raw little-endian bytes: token ids,
slots, pages and positions as int32, uids as int64.

    frontend  -> scheduler    Hello, Submit, Finish, Abort, Release   (FrontendToScheduler)
    scheduler -> frontend     Serving, Tokens, Rejected               (SchedulerToFrontend)
    scheduler -> worker       Step                                    (SchedulerToWorker)
    worker    -> scheduler    Ready, StepDone                         (WorkerToScheduler)

The life of a request: `Submit` is answered by `Rejected`, or by `Tokens`, the last of which lists the uid in `ended`.
That terminal entry comes exactly once for every accepted uid, including after `Finish` and `Abort`.
"""

import array
from collections.abc import Mapping
from typing import Literal

import msgspec

from nmoe.outputs import Returns
from nmoe.profiles import Numerics

Reason = Literal["stop", "length", "abort", "error"]

# A uid packs (frontend, generation of the frontend, counter) into one non-negative int64.
_COUNTER_BITS = 38
_GENERATION_BITS = 16


def make_uid(frontend: int, generation: int, counter: int) -> int:
    """The id of a request, unique across all frontends and their lives. Frontend < 512, counter < 2**38."""
    return (frontend << _GENERATION_BITS | generation & 0xFFFF) << _COUNTER_BITS | counter


def uid_frontend(uid: int) -> int:
    """The index of the frontend that created `uid`."""
    return uid >> _COUNTER_BITS + _GENERATION_BITS


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base class of all messages; `generation` is the sender's."""

    generation: int


class Sampling(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How a request's tokens are drawn.

    First the logits are adjusted: bias, minimum length, penalties. Then temperature 0 takes the argmax; otherwise the
    draw applies temperature, min_p, top_k (0: off) and top_p (1: off). `seed` and the token's position determine the
    draw: a counter-based generator, never a stateful stream.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0  # 0 <= seed < 2**63
    min_p: float = 0.0  # minimum probability, relative to the likeliest token's
    presence_penalty: float = 0.0  # subtracted for every token that occurs in the output
    frequency_penalty: float = 0.0  # subtracted once per occurrence
    repetition_penalty: float = 1.0  # scales down every token that occurs in the prompt or the output
    bias_ids: bytes = b""  # int32: tokens whose logits are biased, without duplicates
    min_tokens: int = 0  # none of `barred_ids` is sampled until the output has this many tokens
    barred_ids: tuple[int, ...] = ()
    biases: bytes = b""  # float32: added to the logits of `bias_ids`

    @property
    def logit_bias(self) -> dict[int, float]:
        """Token id -> value added to its logit."""
        ids, biases = memoryview(self.bias_ids).cast("i"), memoryview(self.biases).cast("f")
        return dict(zip(ids, biases, strict=True))

    @property
    def needs_past(self) -> bool:
        """Whether the draw depends on earlier tokens."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1


def bias_fields(logit_bias: Mapping[int, float]) -> dict[str, bytes]:
    """The fields of `Sampling` that add these values to these tokens' logits. As bytes, because a request may have a
    thousand of them for each of its prompts."""
    ids, biases = array.array("i", logit_bias), array.array("f", logit_bias.values())
    return {"bias_ids": ids.tobytes(), "biases": biases.tobytes()}


# ---------------------------------------------------------------------------------------------- frontend -> scheduler


class Hello(Message, frozen=True, tag="hello"):
    """A frontend (or a new life of one) is connected and wants to know when the engine serves."""


class Submit(Message, frozen=True, tag="submit"):
    """One prompt to continue `n` times. Sibling i has the uid `uid + i`; the frontend reserves the range.

    Siblings compute the prompt once: they wait for the first, then share its full pages on the same rank. Sibling i
    draws from a seed derived from (seed, i); sibling 0 uses the seed itself.
    """

    uid: int
    prompt: bytes  # int32 [prompt_len], at least one token
    max_tokens: int  # 0 scores the prompt alone; prompt_len + max_tokens <= Serving.max_seq_len
    sampling: Sampling
    eos_ids: tuple[int, ...] = ()  # any of these ends the request with reason "stop": EOS unless ignored, and stop ids
    n: int = 1
    priority: int = 0  # lower runs first
    profile: str = "production_generate"
    returns: Returns = Returns()


class Finish(Message, frozen=True, tag="finish"):
    """The frontend found a stop string: the request is complete with `count` output tokens. This is not an abort."""

    uid: int
    count: int


class Abort(Message, frozen=True, tag="abort"):
    """The client is gone or its time is up: stop computing and free everything `uid` holds."""

    uid: int


class Release(Message, frozen=True, tag="release"):
    """The frontend has read the logits in these cells of the arena, int32."""

    cells: bytes


FrontendToScheduler = Hello | Submit | Finish | Abort | Release

# ---------------------------------------------------------------------------------------------- scheduler -> frontend


class Serving(Message, frozen=True, tag="serving"):
    """All workers are ready; these are the limits for requests."""

    max_seq_len: int  # prompt and output together, capped by the KV cache's size
    workers: int = 0  # the workers' generation; ignore the message if that generation is known to have died


class Ended(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The one terminal entry of a request. `cached_tokens`: how many prompt tokens came from the prefix cache.

    For the reason "error", `detail`, `status` and `code` are the message for the client, the HTTP status and OpenAI's
    error code. The two times are seconds on CLOCK_MONOTONIC; 0.0 if the request never got that far.
    """

    uid: int
    reason: Reason
    cached_tokens: int = 0
    detail: str = ""
    scheduled_at: float = 0.0
    first_token_at: float = 0.0
    status: int = 0
    code: str = ""


class Tokens(Message, frozen=True, tag="tokens"):
    """What one step produced for one frontend: at most one such message per step and frontend.

    `uids` int64 [R]; `tokens` int32 [sum of counts], in the order of `uids`; `counts` int32 [R], None if every row has
    one token. A request's last tokens and its `ended` entry come in the same message; its EOS token is among the
    tokens. `blocks` (nmoe/outputs.py) are concatenated in the order of `uids`; `block_sizes` int32 [R] in bytes, 0
    where a row returned nothing; None if no row did. A row of prompt tokens only has a block and no token.
    """

    uids: bytes
    tokens: bytes
    counts: bytes | None = None
    ended: tuple[Ended, ...] = ()
    blocks: bytes = b""
    block_sizes: bytes | None = None


class Rejected(Message, frozen=True, tag="rejected"):
    """The request (with its siblings) was not accepted; no other message will come for it."""

    uid: int
    status: int  # HTTP status: 400 (can never fit), 429 (queue full), 503 (not serving)
    detail: str


SchedulerToFrontend = Serving | Tokens | Rejected

# ------------------------------------------------------------------------------------------------ scheduler -> worker

# Flags of a row in Step.rows.
ROW_SAMPLES = 1  # the row's last position is sampled from; its token comes back in StepDone and becomes the slot's last
ROW_HAS_IDS = 2  # the row's input ids are in Step.ids; without it the one input is the slot's last sampled token
ROW_RETURNS = 4  # StepDone carries a block of what the slot's `Admit.returns` asks for

CHANNEL_DECODE = 0  # every row of every rank is a decode row
CHANNEL_PREFILL = 1


class Admit(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request's first appearance in `slot`, or its return after a preemption: resets the slot's page list and state.

    Positions below `cached` are in shared pages, which the worker never writes, not even when it recomputes the last
    cached token in order to sample from it. `past` (int32) is all of the known tokens; it is sent only if sampling
    needs them (penalties) or prompt records are returned (a chunk's last position scores a token of the next chunk);
    otherwise it is empty. The first `prompt_len` known tokens are the prompt.

    Position p returns the record of token p + 1 and the routing of p. Both are returned once: not for positions below
    `returned`, which were returned before a preemption. Routing starts there even if the first row starts later, after
    a cached prefix.
    """

    slot: int
    cached: int
    sampling: Sampling
    past: bytes = b""
    prompt_len: int = 0
    returns: Returns = Returns()
    returned: int = 0


class Step(Message, frozen=True, tag="step"):
    """One lockstep iteration of one rank, as a delta to the worker's slot table.

    `rows` is int32 [R, 4]: slot, first position, token count, flags; decode rows precede prefill chunks. None means the
    rows of this rank's previous Step, each continuing where it ended. `ids` is int32, the input ids of the rows with
    ROW_HAS_IDS, concatenated in row order. `pages` is int32 [P, 2]: (slot, page), to append to the slot's page list in
    this order, after `admits` have reset theirs. An idle rank gets rows of length 0. `cells` int32: the arena cell for
    each record that returns logits, ordered by row and position.
    """

    step_id: int
    numerics: Numerics
    channel: int
    num_tokens: int  # the largest token count over all ranks; the same on every rank, so all pick the same graph
    rows: bytes | None
    ids: bytes = b""
    pages: bytes = b""
    admits: tuple[Admit, ...] = ()
    cells: bytes = b""


SchedulerToWorker = Step

# ------------------------------------------------------------------------------------------------ worker -> scheduler


class Ready(Message, frozen=True, tag="ready"):
    """The worker has its weights and its KV cache."""

    rank: int
    num_pages: int


class StepDone(Message, frozen=True, tag="done"):
    """The results of one Step. `tokens` int32: for each row with ROW_SAMPLES, in row order, its new tokens.

    `counts` int32 [rows that sample]: how many tokens each row returned; None if each returned one. `blocks`: one for
    each row with ROW_RETURNS, in row order (nmoe/outputs.py); `block_sizes` int32 [those rows], in bytes. `failed`
    int32: the slots of rows whose logits were not finite; their tokens and blocks are meaningless.
    """

    rank: int
    step_id: int
    tokens: bytes
    counts: bytes | None = None
    blocks: bytes = b""
    block_sizes: bytes = b""
    failed: bytes = b""


WorkerToScheduler = Ready | StepDone
