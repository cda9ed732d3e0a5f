"""Steps for a model without a scheduler: requests whose pages are scattered, chunked in whatever way a test wants."""

import dataclasses

import torch

from nmoe.worker.batch import Batch, KVCache

PAGE = 4


@dataclasses.dataclass
class Sequence:
    """One request: all its tokens, its pages, and how many positions are in the cache."""

    tokens: torch.Tensor
    pages: list[int]
    computed: int = 0


class Stepper:
    """A cache of `num_pages` pages, handed out from the end and never twice."""

    def __init__(self, architecture, *, num_pages=64, dtype=torch.float32):
        shape = (architecture.num_layers, num_pages + 1, PAGE, architecture.cache_dim)
        self.cache = KVCache(torch.full(shape, torch.nan, dtype=dtype))  # what nobody wrote must never count
        self._free = list(range(0, num_pages, 2)) + list(range(1, num_pages, 2))

    def add(self, tokens) -> Sequence:
        """A request with pages for all of its tokens."""
        return Sequence(torch.as_tensor(tokens), [self._free.pop() for _ in range(-(-len(tokens) // PAGE))])

    def batch(self, rows, *, decodes=0, write=True) -> Batch:
        """The next `count` tokens of each (sequence, count); the first `decodes` rows are decode rows."""
        reserved = self.cache.num_pages * PAGE
        ids, positions, writes, starts, contexts = [], [], [], [0], []
        for sequence, count in rows:
            first, last = sequence.computed, sequence.computed + count
            ids.append(sequence.tokens[first:last])
            positions += range(first, last)
            writes += [sequence.pages[p // PAGE] * PAGE + p % PAGE if write else reserved for p in range(first, last)]
            starts.append(starts[-1] + count)
            contexts.append(last)
            sequence.computed = last
        width = max((len(sequence.pages) for sequence, _ in rows), default=0)
        pages = [sequence.pages + [self.cache.num_pages] * (width - len(sequence.pages)) for sequence, _ in rows]
        return Batch(
            ids_T=torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64),
            positions_T=torch.tensor(positions, dtype=torch.int64),
            write_T=torch.tensor(writes, dtype=torch.int64),
            starts=starts,
            contexts=contexts,
            pages_RP=torch.tensor(pages, dtype=torch.int64).reshape(len(rows), width),
            num_decodes=decodes,
        )
