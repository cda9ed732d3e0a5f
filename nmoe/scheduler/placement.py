"""Chooses a request's rank: the one that minimises the rank's load plus the uncached part of the prompt.

Both are in tokens. A rank's load is what its requests still have to compute: prompt tokens not yet planned, plus tokens
to generate, capped at EXPECTED_OUTPUT per request because max_tokens is often a limit far above the actual length. So a
rank with a long cached prefix attracts requests until its backlog outweighs the cost of recomputing the prefix, or
until it is full; then another rank computes the prefix too, and it spreads.
"""

from collections.abc import Sequence

from nmoe.scheduler.pages import PagePool
from nmoe.scheduler.request import Request

EXPECTED_OUTPUT = 256  # tokens


def place(
    request: Request,
    num_pages: int,
    pools: Sequence[PagePool],
    loads: dict[int, int],
    reserves: Sequence[int],
    page_size: int,
) -> tuple[int, int] | None:
    """The rank for `request` and how many of its pages are cached there; None if it fits nowhere.

    The candidates are the keys of `loads` (in tokens, see above). A request fits if, once it has the pages it lacks of
    its `num_pages`, the rank has `reserves[rank]` pages left, so that running requests can grow without preemption.
    """
    known_len, keys = request.known_len, request.shared_keys(page_size)
    costs = []
    for rank, load in loads.items():
        cached = pools[rank].tree.match(keys)
        costs.append((load + max(known_len - cached * page_size, 1), rank, cached))
    for _, rank, cached in sorted(costs):
        if pools[rank].fits(keys[:cached], num_pages - cached + reserves[rank]):
            return rank, cached
    return None
