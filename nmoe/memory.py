"""How many KV pages a rank takes when [engine] num_pages = 0: the worker's rule, which the doctor predicts it by."""

import pathlib

from nmoe.architecture import Architecture
from nmoe.config import Engine
from nmoe.errors import LaunchError

CPU_CACHE_SHARE = 0.25  # of the free memory, for all ranks' caches together: the machine has other things to do


def free_ram() -> int:
    """Bytes of memory that new work can have: MemAvailable of /proc/meminfo. Raises LaunchError without it."""
    for line in pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise LaunchError("/proc/meminfo has no MemAvailable: a Linux kernel of 3.14 or newer is needed")


def sampling_bytes(engine: Engine, vocab_size: int) -> int:
    """What penalties take when every request has some: an int32 count per token of the vocabulary for each of the
    2 * max_batch_size slots, and as much again for the logits they change, and while the counts' table grows."""
    return 2 * (2 * engine.max_batch_size) * vocab_size * 4


def pages_that_fill(engine: Engine, architecture: Architecture, max_seq_len: int, page_bytes: int, room: float) -> int:
    """Pages for `room` bytes less what sampling may take, the reserved one apart, but no more than a full batch of the
    longest requests can use."""
    useful = engine.max_batch_size * -(-max_seq_len // engine.page_size)
    return max(0, min(useful, int((room - sampling_bytes(engine, architecture.vocab_size)) // page_bytes) - 1))
