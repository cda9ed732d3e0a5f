"""The memory through which ranks exchange tokens (RDEP): where everything lies in it. Drawn in docs/rdep.md.

One slab per rank: on the CPU all of a server's in one piece of shared memory that the launcher makes before it forks,
on GPUs each in its GPU's memory, mapped by the others. A slab belongs to its rank; the others write into the parts that
are theirs alone, so no byte has two writers at a time. On the CPU pages are touched when they are used, so a slab costs
what the traffic needs and not what the limits allow.

Beside slabs in GPU memory there is a page of `ControlLayout`: what kernels and hosts of all ranks tell each other when
something goes wrong. It is ordinary shared memory, which a host reads without asking its GPU.
"""

import mmap

import msgspec

from nmoe.architecture import DTYPE_BYTES, Architecture
from nmoe.config import Config
from nmoe.ipc import sparse_memory
from nmoe.messages import CHANNEL_DECODE, CHANNEL_PREFILL

LINE = 64  # bytes: one cache line, so that ranks that wait on neighbouring flags do not disturb each other
NUM_CHANNELS = 2
NUM_PHASES = 2
DISPATCH = 0  # phase: rows of tokens are there for the owner's experts
RETURN = 1  # phase: the owner's sums are there, and it will not read the rows again
COUNT_BITS = 36  # of an epoch, the count of exchanges; the life has the others
POISON_BITS = 8  # of a poison word, one per rank; the life has the others
_SCALED = 128  # columns that share a scale


class Channel(msgspec.Struct, frozen=True):
    """One channel of a slab: offsets in bytes from the slab's start; N source or owner ranks, K experts per token.

    The slot of a token is (rank, index of the token in its rank's step).
    """

    max_tokens: int  # slots per rank
    counts: int  # int32 [N, max_tokens]: how many experts of this rank the source's token wants; 0: nothing was pushed
    routes: int  # [N, max_tokens] of (int32 [K] local expert ids, float32 [K] weights), the wanted experts first
    hidden: int  # model dtype or float8_e4m3fn [N, max_tokens, D]
    returned: int  # model dtype [N, max_tokens, D]: for this rank's own tokens, the sums from each owner
    scales: int = 0  # float32 [N, max_tokens, D / 128]: of quantised rows


class SlabLayout(msgspec.Struct, frozen=True):
    """All slabs of a server. Offsets of the methods are in bytes from the start of the memory."""

    world_size: int
    num_experts: int  # of one rank
    top_k: int
    row_bytes: int  # of one hidden row in the model's dtype
    channels: tuple[Channel, ...]
    slab_bytes: int  # from one rank's slab to the next one's
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
        # What the experts would quantise first can as well travel quantised.
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


class ControlLayout(msgspec.Struct, frozen=True):
    """The words through which GPU workers hear of trouble; offsets in bytes, int64 words, three lines per rank."""

    world_size: int

    def life(self, rank: int) -> int:
        """The newest life that `rank` has begun."""
        return 3 * rank * LINE

    def compiling(self, rank: int) -> int:
        """Whether `rank` compiles a kernel, during which it does nothing else."""
        return self.life(rank) + 8

    def awaited(self, rank: int) -> int:
        """What `rank` waits for, once that takes long: epoch << 2 | channel << 1 | phase."""
        return self.life(rank) + LINE

    def poison(self, rank: int) -> int:
        """The line with `rank`'s poison words: one for each rank that may write it."""
        return self.awaited(rank) + LINE

    def make(self) -> mmap.mmap:
        """Anonymous memory, zeroed, inherited by fork; serves any number of generations of workers."""
        return mmap.mmap(-1, _aligned(self.life(self.world_size)))


def _aligned(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def make_slabs(layout: SlabLayout) -> mmap.mmap:
    """Anonymous memory for all ranks, zeroed, inherited by fork.

    It may serve any number of generations of workers: what an earlier one left has lower epochs.
    """
    return sparse_memory(layout.total_bytes)
