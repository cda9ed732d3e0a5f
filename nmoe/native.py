"""The answers of `POST /v1/generate`: msgpack, with tensors as raw little-endian bytes (docs/generate.md).

An answer without logits is one `Answer`. One with logits is a sequence of frames, sent as they are computed: any number
of `Logits`, followed by the `Answer`, or by a `Failure` in its place. A frame is a msgpack `bin 32` containing one
msgpack object, so any msgpack library can read the sequence incrementally. So can a client that reads five bytes and
then as many as those specify.
"""

import struct
from typing import Any, Generic, Literal, TypeVar

import msgspec

CONTENT_TYPE = "application/msgpack"
FRAMES_CONTENT_TYPE = "application/x-msgpack-frames"
FRAME_HEAD = struct.Struct(">BI")  # msgpack's bin 32: marker and number of bytes that follow
_BIN_32 = 0xC6

ItemType = Literal["int32", "float32", "uint8", "uint16"]
ITEM_BYTES: dict[ItemType, int] = {"int32": 4, "float32": 4, "uint8": 1, "uint16": 2}
LogitsName = Literal["logits", "prompt_logits"]
T = TypeVar("T")


class Tensor(msgspec.Struct, frozen=True):
    """An array: `data` is its elements, little-endian, in row-major order."""

    dtype: ItemType
    shape: tuple[int, ...]
    data: bytes


class Choice(msgspec.Struct, Generic[T], frozen=True, omit_defaults=True, kw_only=True):
    """One output of `n` tokens for a prompt of `p`; fields that were not requested are absent.

    Prompt fields have a row for every prompt token except the first, which has no predecessor, and are present only in
    the first choice of each prompt. K is the greatest of the request's `logprobs`, `prompt_logprobs` and
    `top_k_logprobs`, S the number of its `logprob_token_ids`.
    """

    index: int
    text: str
    finish_reason: str
    seed: int | None = None  # as in `Answer`, if there are several prompts
    token_ids: T  # int32 [n]
    prompt_token_ids: T | None = None  # int32 [p]
    logprobs: T | None = None  # float32 [n], under the model's own distribution
    drawn_logprobs: T | None = None  # float32 [n], under the distribution that the token was drawn from
    ranks: T | None = None  # int32 [n]: 1 is the likeliest token
    top_k_ids: T | None = None  # int32 [n, K]
    top_k_logprobs: T | None = None  # float32 [n, K]
    token_id_logprobs: T | None = None  # float32 [n, S]
    prompt_logprobs: T | None = None  # float32 [p - 1]
    prompt_ranks: T | None = None  # int32 [p - 1]
    prompt_top_k_ids: T | None = None  # int32 [p - 1, K]
    prompt_top_k_logprobs: T | None = None  # float32 [p - 1, K]
    prompt_token_id_logprobs: T | None = None  # float32 [p - 1, S]
    routed_experts: T | None = None  # uint8 or uint16 [computed positions, layers with experts, experts per token]
    logits: T | None = None  # float32 [n, vocabulary]; on the wire in `Logits`, never here
    prompt_logits: T | None = None  # float32 [p - 1, vocabulary]; the same


class Answer(msgspec.Struct, Generic[T], frozen=True, omit_defaults=True, tag="answer"):
    """The whole answer except its logits; also marks its end. `created` is in seconds since the epoch."""

    id: str
    model: str
    created: int
    choices: list[Choice[T]]
    usage: dict[str, Any]  # OpenAI's
    seed: int | None = None  # the one that was drawn, where the profile lets the output be repeated


class Logits(msgspec.Struct, Generic[T], frozen=True, tag="logits"):
    """Rows of a choice's logits: float32 [rows, vocabulary], of which the first is row `first` of `name`.

    The rows of one `name` of one choice come in order and without gaps.
    """

    index: int  # of the choice
    name: LogitsName
    first: int
    rows: T


class Failure(msgspec.Struct, frozen=True, tag="error"):
    """The answer ends here, unfinished. `error` is OpenAI's error object, `status` what its HTTP status would be."""

    status: int
    error: dict[str, Any]


_encode = msgspec.msgpack.Encoder().encode


def pack(answer: Answer[Tensor]) -> bytes:
    """An answer that is one object."""
    return _encode(answer)


def frame(part: Answer[Tensor] | Logits[Tensor] | Failure) -> bytes:
    """One frame of an answer that is a sequence of them."""
    payload = _encode(part)
    return FRAME_HEAD.pack(_BIN_32, len(payload)) + payload


def frame_length(head: bytes) -> int:
    """How many bytes follow a frame's five first ones. Raises ValueError when they are not a frame's."""
    marker, length = FRAME_HEAD.unpack(head)
    if marker != _BIN_32:
        raise ValueError(f"an answer's frame begins with the byte {marker:#x}, not with {_BIN_32:#x}")
    return int(length)
