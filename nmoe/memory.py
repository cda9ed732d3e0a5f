"""How many KV pages a rank takes when [engine] num_pages = 0: the rule used by workers and predicted by the doctor."""

import pathlib

from nmoe.architecture import Architecture
from nmoe.config import Engine
from nmoe.errors import LaunchError

CPU_CACHE_SHARE = 0.25  # of free memory, for all ranks' caches together: the machine has other uses for it


def free_ram() -> int:
    """Bytes of memory available to new work: MemAvailable of /proc/meminfo. Raises LaunchError if it is missing."""
    for line in pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise LaunchError("/proc/meminfo has no MemAvailable: a Linux kernel of 3.14 or newer is needed")


def sampling_bytes(engine: Engine, vocab_size: int) -> int:
    """What penalties take if every request uses them: an int32 count per vocabulary token for each of the
    2 * max_batch_size slots, and the same again for the logits they change and for growing the table of counts."""
    return 2 * (2 * engine.max_batch_size) * vocab_size * 4


def pages_that_fill(engine: Engine, architecture: Architecture, max_seq_len: int, page_bytes: int, room: float) -> int:
    """Pages that fit into `room` bytes, less what sampling may take and the one reserved page, capped at what a full
    batch of the longest requests can use."""
    useful = engine.max_batch_size * -(-max_seq_len // engine.page_size)
    return max(0, min(useful, int((room - sampling_bytes(engine, architecture.vocab_size)) // page_bytes) - 1))
