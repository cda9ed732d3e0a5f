"""What should stay in the GPU's second-level cache.

A decode step reads every weight and every cached position once: gigabytes, which push everything else out. What a
kernel writes for the next one, always to the same places layer after layer, then goes to memory each time although
nobody will read it there: some 41 MB a layer of Moonlight at 256 tokens, beside 1,750 MB that have to be read. So
kernels of decode steps store their results as the last lines to go. benchmarks/LOG.md has the gain. What a prefill
writes would fill the whole cache.
"""

from nmoe.worker.kernels.early import early


def kept(tokens: int) -> str:
    """The `eviction_policy` with which a kernel over this many tokens stores its results, passed to it as KEPT."""
    return "evict_last" if early(tokens) else ""
