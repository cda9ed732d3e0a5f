"""On which rank a request runs: the one with the least load plus the least of the prompt still to compute.

Both are tokens. A rank's load is what its requests still have to compute: prompt tokens not planned yet, and tokens to
generate, of which no more than EXPECTED_OUTPUT count per request, since max_tokens is often a cap far above what
comes. So a rank that has a long prefix cached attracts requests until its backlog outweighs the recomputation, or
until it is full; then the prefix is computed on another rank too, and spreads.
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

    Candidates are the keys of `loads` (tokens, see above). It fits if the pages it lacks of its `num_pages` leave the
    rank `reserves[rank]` pages, so that the requests that run there can grow and nobody is preempted at once.
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
