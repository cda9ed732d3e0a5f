"""The KV pages of one rank: every page is free, cached (in the tree, used by no request), or held by requests.

    free ----take----> held (private) ---publish---> held (in the tree, shared)
      ^                  |                              |        ^
      +-----release------+                           release    share
      |                                                 v        |
      +-----------evict (least recently used), cut--- cached ----+

A page's reference count is the number of requests that have it in their page list. A request that holds a tree page
holds every page on the path to it, so no node has more references than its parent. `release` drops the deepest page
first; therefore, ordering unreferenced pages by when they lost their last reference puts every node after its
descendants, and the oldest of them is always a leaf.

Pages that a `lasting` request shared or published are evicted after all others. Such a request holds the whole path to
its pages, so a lasting page's ancestors are lasting too, and no page is evicted before its descendants.

Conservation: free + cached + held == num_pages, each page once.
"""

from array import array
from collections import OrderedDict

import numpy as np

from nmoe.scheduler.prefix import PrefixTree
from nmoe.scheduler.stats import Stats


class PagePool:
    """Page ownership; knows nothing about requests, ranks or steps."""

    def __init__(self, num_pages: int, stats: Stats) -> None:
        self.num_pages = num_pages
        self._stats = stats
        self.tree = PrefixTree(num_pages)
        self._free = array("i", range(num_pages - 1, -1, -1))  # the last one is taken first
        self._references = array("i", bytes(4 * num_pages))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._cached_last: OrderedDict[int, None] = OrderedDict()  # lasting pages, in the same order
        self._lasting = bytearray(num_pages)  # 1 for pages in the tree that are evicted last

    @property
    def num_free(self) -> int:
        """Pages with no contents."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages in the tree that no request uses."""
        return len(self._cached) + len(self._cached_last)

    @property
    def available(self) -> int:
        """How many pages `take` can provide."""
        return len(self._free) + self.num_cached

    def fits(self, keys: list[bytes], new: int) -> bool:
        """Whether `new` pages could still be taken after sharing the pages of `keys`, all of which are in the tree."""
        spare = self.available - new
        if spare < 0:
            return False
        if spare >= len(keys):
            return True
        # Sharing protects unreferenced pages from eviction; these are the deepest pages of the path.
        unused = 0
        for page in reversed(self.tree.pages(keys)):
            if self._references[page]:
                break
            unused += 1
        return spare >= unused

    def share(self, keys: list[bytes], lasting: bool = False) -> list[int]:
        """The pages of `keys`, adding one reference to each."""
        pages = self.tree.pages(keys)
        for page in pages:
            if self._references[page] == 0:
                del (self._cached_last if self._lasting[page] else self._cached)[page]
            self._references[page] += 1
            self._lasting[page] |= lasting
        return pages

    def take(self, count: int) -> list[int]:
        """Take `count` private pages, evicting as needed. The caller has checked `available`."""
        while len(self._free) < count:
            page, _ = (self._cached or self._cached_last).popitem(last=False)
            self.tree.remove(page)
            self._lasting[page] = 0
            self._free.append(page)
            self._stats.evictions += 1
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def publish(self, key: bytes, page: int, parent: int, lasting: bool = False) -> bool:
        """Insert a held page into the tree as a child of `parent`, -1 at the root. If the tree does not accept it
        (see `PrefixTree.insert`), returns False and the page stays private."""
        entered = self.tree.insert(key, page, parent)
        self._lasting[page] |= lasting and entered
        return entered

    def cut(self, keys: list[bytes]) -> None:
        """Stop sharing the unproven pages on the path of `keys` and their descendants. Current holders keep them."""
        for page in self.tree.cut(keys):
            if self._references[page] == 0:
                del (self._cached_last if self._lasting[page] else self._cached)[page]
                self._free.append(page)
            self._lasting[page] = 0

    def release(self, pages: list[int]) -> None:
        """Drop one reference to each of a request's pages, given in position order."""
        for page in reversed(pages):
            left = self._references[page] - 1
            if left < 0:
                raise RuntimeError(f"page {page} is released but nobody holds it")
            self._references[page] = left
            if left == 0:
                if self.tree.holds[page]:
                    (self._cached_last if self._lasting[page] else self._cached)[page] = None
                else:
                    self._free.append(page)

    def check(self, idle: bool) -> None:
        """Raise RuntimeError unless every page is in exactly one place; `idle` asserts that no request holds any."""
        references = np.frombuffer(self._references, np.int32)
        in_tree = np.frombuffer(self.tree.holds, np.int8).astype(bool)
        free = np.bincount(np.frombuffer(self._free, np.int32), minlength=self.num_pages)
        held = references > 0
        places = free + (held | in_tree)
        cached = int(np.count_nonzero(in_tree & ~held))
        if (places != 1).any() or cached != self.num_cached or (idle and held.any()):
            wrong = np.flatnonzero((places != 1) | (held if idle else False))
            raise RuntimeError(
                f"KV pages do not add up: {self.num_free} free + {self.num_cached} cached ({cached} expected)"
                f" + {int(held.sum())} held of {self.num_pages}; pages in no or two places: {wrong[:16].tolist()}"
            )
