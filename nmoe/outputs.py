"""What a request can return besides its tokens, and the bytes that carry it from worker to frontend.

The scheduler passes these bytes on without reading them. One `Block` is what one row of one step returned:

    int32  number of cells, number of records, number of routed positions
    int32  [cells]    the arena cell of each record's logits (nmoe/arena.py); as many as records, or none
           [records]  of `Returns.record_bytes` each, in order of position
           [routed]   of `RoutingLayout.position_bytes` each, in order of position

A record describes one token: how likely the model considered it, and which tokens it considered likely there.

    float32       its log-probability under the model's own distribution (log-softmax of the logits, nothing applied)
    float32       its log-probability under the distribution it was drawn from: after bias, penalties, temperature,
                  min_p, top_k and top_p; 0 for a greedy token, NaN for a prompt token, which was not drawn
    int32         its rank: one plus the number of tokens with greater logits
    int32   [K]   the likeliest tokens, likeliest first; ties go to the lower id
    float32 [K]   their log-probabilities under the model's own distribution
    float32 [S]   log-probabilities of the tokens named by the request

Routing is the ids of the experts chosen by the router: for each position, uint8 [layers with experts, experts per
token] (uint16 above 256 experts), best first.
"""

import struct
from collections.abc import Sequence

import msgspec

from nmoe.architecture import Architecture

MAX_TOP_K = 128
MAX_SCORED = 128  # tokens that one request may name

_HEADER = struct.Struct("<3i")
HEADER_BYTES = _HEADER.size


class Returns(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What each position of a request returns; nothing by default."""

    records: bool = False  # of every sampled token
    prompt: bool = False  # and of every prompt token but the first
    top_k: int = 0  # K, at most MAX_TOP_K
    scored_ids: tuple[int, ...] = ()  # S tokens, at most MAX_SCORED
    logits: bool = False  # all logits that each record is computed from, float32 [V], through the arena
    routing: bool = False  # of every computed position, including the cached prefix

    def __bool__(self) -> bool:
        return self.records or self.routing

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return 12 + 8 * self.top_k + 4 * len(self.scored_ids)


class RoutingLayout(msgspec.Struct, frozen=True):
    """The shape of one position's routing."""

    layers: int  # with routed experts
    top_k: int  # experts per token
    item_bytes: int  # of an expert id

    @classmethod
    def of(cls, architecture: Architecture) -> "RoutingLayout":
        """The layout for a model."""
        return cls(architecture.num_expert_layers, architecture.num_experts_per_tok, architecture.expert_id_bytes)

    @property
    def position_bytes(self) -> int:
        """Bytes of one position."""
        return self.layers * self.top_k * self.item_bytes


class Block(msgspec.Struct, frozen=True):
    """One row's outputs, not yet decoded."""

    cells: memoryview  # int32
    records: memoryview  # bytes
    routing: memoryview  # bytes


def pack(cells: bytes, records: bytes, num_records: int, routing: bytes, num_routed: int) -> bytes:
    """Encode a block."""
    return b"".join((_HEADER.pack(len(cells) // 4, num_records, num_routed), cells, records, routing))


def cells_of(data: memoryview) -> memoryview:
    """The cells of a block, int32, regardless of what else is in it: they must be released even if it goes unread."""
    count = _HEADER.unpack_from(data)[0]
    return data[_HEADER.size : _HEADER.size + 4 * count].cast("i")


def unpack(data: memoryview, returns: Returns) -> Block:
    """The parts of a block that was made for `returns`. Raises ValueError if its length does not match."""
    num_cells, num_records, _ = _HEADER.unpack_from(data)
    records = _HEADER.size + 4 * num_cells
    routing = records + num_records * returns.record_bytes
    if len(data) < routing:
        raise ValueError(f"a block of {len(data)} bytes cannot have {num_cells} cells and {num_records} records")
    return Block(cells_of(data), data[records:routing], data[routing:])


class Record(msgspec.Struct, frozen=True):
    """One decoded record."""

    logprob: float
    drawn_logprob: float
    rank: int
    top_ids: Sequence[int]
    top_logprobs: Sequence[float]
    scored: Sequence[float]


def read_records(records: memoryview, returns: Returns) -> list[Record]:
    """Decode the records of a block."""
    k, size = returns.top_k, returns.record_bytes
    ids, logprobs, scored = 12, 12 + 4 * k, 12 + 8 * k
    read = []
    for start in range(0, len(records), size):
        record = records[start : start + size]
        raw, drawn, rank = struct.unpack_from("<2fi", record)
        read.append(
            Record(
                raw,
                drawn,
                rank,
                record[ids:logprobs].cast("i").tolist(),
                record[logprobs:scored].cast("f").tolist(),
                record[scored:].cast("f").tolist(),
            )
        )
    return read
