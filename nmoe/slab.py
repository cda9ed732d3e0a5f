"""The memory through which ranks exchange tokens (RDEP): where everything lies in it. Drawn in docs/rdep.md.

One slab per rank, all slabs of a server in one piece of shared memory that the launcher makes before it forks. A slab
belongs to its rank; the others write into the parts that are theirs alone, so no byte has two writers at a time. Pages
are touched when they are used, so a slab costs what the traffic needs and not what the limits allow.
"""

import mmap

import msgspec

from nmoe.architecture import DTYPE_BYTES, Architecture
from nmoe.config import Config
from nmoe.messages import CHANNEL_DECODE, CHANNEL_PREFILL

LINE = 64  # bytes: one cache line, so that ranks that wait on neighbouring flags do not disturb each other
NUM_CHANNELS = 2
NUM_PHASES = 2
DISPATCH = 0  # phase: rows of tokens are there for the owner's experts
RETURN = 1  # phase: the owner's sums are there, and it will not read the rows again
_MAP_NORESERVE = 0x4000  # Linux; Python's mmap has no name for it


class Channel(msgspec.Struct, frozen=True):
    """One channel of a slab: offsets in bytes from the slab's start; N source or owner ranks, K experts per token.

    The slot of a token is (rank, index of the token in its rank's step).
    """

    max_tokens: int  # slots per rank
    counts: int  # int32 [N, max_tokens]: how many experts of this rank the source's token wants; 0: nothing was pushed
    routes: int  # [N, max_tokens] of (int32 [K] local expert ids, float32 [K] weights), the wanted experts first
    hidden: int  # model dtype [N, max_tokens, D]
    returned: int  # model dtype [N, max_tokens, D]: for this rank's own tokens, the sums from each owner


class SlabLayout(msgspec.Struct, frozen=True):
    """All slabs of a server. Offsets of the methods are in bytes from the start of the memory."""

    world_size: int
    num_experts: int  # of one rank
    top_k: int
    row_bytes: int  # of one hidden row
    channels: tuple[Channel, ...]
    slab_bytes: int  # from one rank's slab to the next one's

    @classmethod
    def of(cls, architecture: Architecture, dtype: str, config: Config) -> "SlabLayout":
        """The layout for a model computed in `dtype` under `config`'s limits."""
        engine, world_size = config.engine, config.parallel.world_size
        max_tokens = {
            CHANNEL_DECODE: engine.max_batch_size,
            CHANNEL_PREFILL: max(1, engine.max_prefill_tokens // world_size) + engine.max_batch_size,
        }
        top_k, row_bytes = architecture.num_experts_per_tok, architecture.hidden_size * DTYPE_BYTES[dtype]
        end = _aligned((NUM_CHANNELS * NUM_PHASES * world_size + 2) * LINE)
        channels = []
        for channel in range(NUM_CHANNELS):
            slots = world_size * max_tokens[channel]
            offsets = []
            for row in (4, 8 * top_k, row_bytes, row_bytes):
                offsets.append(end)
                end = _aligned(end + slots * row)
            channels.append(Channel(max_tokens[channel], *offsets))
        return cls(world_size, architecture.num_experts // world_size, top_k, row_bytes, tuple(channels), end)

    @property
    def total_bytes(self) -> int:
        """Of all ranks' slabs."""
        return self.world_size * self.slab_bytes

    def flag(self, rank: int, channel: int, phase: int, peer: int) -> int:
        """The line that `peer` writes in `rank`'s slab: int64 epoch, int64 tokens (dispatch only)."""
        line = (channel * NUM_PHASES + phase) * self.world_size + peer
        return rank * self.slab_bytes + line * LINE

    def awaited(self, rank: int) -> int:
        """The line in which `rank` says what it waits for: int64 channel, phase, epoch, and whether it sleeps."""
        return self.flag(rank, NUM_CHANNELS, 0, 0)

    def poison(self, rank: int) -> int:
        """The line with `rank`'s poison words: int64, one for each rank that may write it."""
        return self.awaited(rank) + LINE


def _aligned(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def make_slabs(layout: SlabLayout) -> mmap.mmap:
    """Anonymous memory for all ranks, zeroed, inherited by fork.

    It may serve any number of generations of workers: what an earlier one left has lower epochs.
    """
    # Not reserved: the limits of a large model ask for more than the traffic will ever touch.
    return mmap.mmap(-1, layout.total_bytes, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
