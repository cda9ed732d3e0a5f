"""The layout of the memory through which ranks exchange tokens (RDEP). See docs/rdep.md for drawings.

Each rank has one slab. On the CPU, all slabs are in one shared memory mapping that the launcher creates before forking;
on GPUs, each is in its own GPU's memory, mapped by the others. A slab belongs to its rank, and every other rank writes
only to its own part of it, so no byte ever has two writers. On the CPU pages are touched on first use, so a slab costs
what the traffic needs rather than what the limits allow.

Slabs in GPU memory are accompanied by a page of `ControlLayout`, through which kernels and hosts of all ranks report
failures to each other. It is ordinary shared memory, which a host can read without involving its GPU.
"""

import mmap

import msgspec

from nmoe.architecture import DTYPE_BYTES, Architecture
from nmoe.config import Config
from nmoe.ipc import sparse_memory
from nmoe.messages import CHANNEL_DECODE, CHANNEL_PREFILL

LINE = 64  # bytes; one cache line each, so that ranks waiting on adjacent flags do not cause false sharing
NUM_CHANNELS = 2
NUM_PHASES = 2
DISPATCH = 0  # phase: token rows have arrived for the owner's experts
RETURN = 1  # phase: the owner's sums have arrived, and it will not read the rows again
COUNT_BITS = 36  # low bits of an epoch that count exchanges; the rest is the life
POISON_BITS = 8  # bits of a poison word, one per rank; the rest is the life
_SCALED = 128  # columns per scale


class Channel(msgspec.Struct, frozen=True):
    """One channel of a slab: offsets in bytes from the slab's start; N source or owner ranks, K experts per token.

    The slot of a token is (rank, index of the token in its rank's step).
    """

    max_tokens: int  # slots per rank
    counts: int  # int32 [N, max_tokens]: how many of this rank's experts the source's token needs; 0: not sent
    routes: int  # [N, max_tokens] of (int32 [K] local expert ids, float32 [K] weights), needed experts first
    hidden: int  # model dtype or float8_e4m3fn [N, max_tokens, D]
    returned: int  # model dtype [N, max_tokens, D]: each owner's sums for this rank's own tokens
    scales: int = 0  # float32 [N, max_tokens, D / 128]: of quantised rows


class SlabLayout(msgspec.Struct, frozen=True):
    """The layout of a server's slabs. The methods return byte offsets from the start of the memory."""

    world_size: int
    num_experts: int  # of one rank
    top_k: int
    row_bytes: int  # of one hidden row in the model's dtype
    channels: tuple[Channel, ...]
    slab_bytes: int  # distance between consecutive ranks' slabs
    quantised: bool = False  # rows are pushed in FP8, with a scale per 128 columns; sums never are

    @classmethod
    def of(cls, architecture: Architecture, dtype: str, config: Config) -> "SlabLayout":
        """The layout for a model computed in `dtype` under `config`'s limits."""
        engine, world_size = config.engine, config.parallel.world_size
        max_tokens = {
            CHANNEL_DECODE: engine.max_batch_size,
            CHANNEL_PREFILL: max(1, engine.max_prefill_tokens // world_size) + engine.max_batch_size,
        }
        top_k, hidden = architecture.num_experts_per_tok, architecture.hidden_size
        row_bytes = hidden * DTYPE_BYTES[dtype]
        # If the experts would quantise their input anyway, send it quantised.
        quantised = architecture.quant_block is not None and config.parallel.device == "cuda"
        pushed_bytes, scales_bytes = (hidden, hidden // _SCALED * 4) if quantised else (row_bytes, 0)
        end = _aligned((NUM_CHANNELS * NUM_PHASES * world_size + 2) * LINE)
        channels = []
        for channel in range(NUM_CHANNELS):
            slots = world_size * max_tokens[channel]
            offsets = []
            for row in (4, 8 * top_k, pushed_bytes, row_bytes, scales_bytes):
                offsets.append(end)
                end = _aligned(end + slots * row)
            channels.append(Channel(max_tokens[channel], *offsets))
        num_experts = architecture.num_experts // world_size
        return cls(world_size, num_experts, top_k, row_bytes, tuple(channels), end, quantised)

    @property
    def total_bytes(self) -> int:
        """Bytes of all ranks' slabs."""
        return self.world_size * self.slab_bytes

    def flag(self, rank: int, channel: int, phase: int, peer: int) -> int:
        """The line in `rank`'s slab written by `peer`: int64 epoch, int64 tokens (dispatch only)."""
        line = (channel * NUM_PHASES + phase) * self.world_size + peer
        return rank * self.slab_bytes + line * LINE

    def awaited(self, rank: int) -> int:
        """The line where `rank` publishes what it waits for: int64 channel, phase, epoch, and whether it is asleep."""
        return self.flag(rank, NUM_CHANNELS, 0, 0)

    def poison(self, rank: int) -> int:
        """The line of `rank`'s poison words: one int64 per rank that may write it."""
        return self.awaited(rank) + LINE


class ControlLayout(msgspec.Struct, frozen=True):
    """The words that report failures among GPU workers: byte offsets, int64 words, three lines per rank."""

    world_size: int

    def life(self, rank: int) -> int:
        """The newest life of `rank`."""
        return 3 * rank * LINE

    def compiling(self, rank: int) -> int:
        """Whether `rank` is compiling kernels, during which it does nothing else that peers wait for."""
        return self.life(rank) + 8

    def awaited(self, rank: int) -> int:
        """What `rank` is waiting for, if the wait is long: epoch << 2 | channel << 1 | phase."""
        return self.life(rank) + LINE

    def poison(self, rank: int) -> int:
        """The line of `rank`'s poison words: one per rank that may write it."""
        return self.awaited(rank) + LINE

    def make(self) -> mmap.mmap:
        """Anonymous memory, zeroed, inherited by fork; can serve any number of generations of workers."""
        return mmap.mmap(-1, _aligned(self.life(self.world_size)))


def _aligned(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def make_slabs(layout: SlabLayout) -> mmap.mmap:
    """Anonymous memory for all ranks, zeroed, inherited by fork.

    It can serve any number of generations of workers: the leftovers of earlier ones have lower epochs.
    """
    return sparse_memory(layout.total_bytes)
