"""The prefix tree of one rank: which page holds the KV of which tokens after which prefix.

A node is one full page, named by its key: a digest of the whole path, i.e. the numerics class and then every page's
token ids from the start of the sequence. So lookups need no links: the tree is a dictionary from key to page, and two
sequences share a node exactly if they agree up to its end. A request computes its keys once, regardless of the number
of ranks.

A page is proven once finite logits have been computed from it. An unproven page may have been computed by a request
that ended before anybody saw its logits. So when a request's logits are not finite, every unproven page on its path is
removed.

Invariant: the tree is closed under prefixes (a node's parent is in it). Pages are inserted root first and, because of
the eviction order in `nmoe/scheduler/pages.py`, removed leaf first. Hence bisection finds the longest match.
"""

import hashlib
from array import array

from nmoe.profiles import Numerics

_KEY_BYTES = 16  # a collision becomes likely at 2**64 pages


def extend_keys(keys: list[bytes], ids: bytes, page_size: int, numerics: Numerics) -> None:
    """Append to `keys` the keys of those full pages of `ids` (int32) that it does not cover yet."""
    width = 4 * page_size
    key = keys[-1] if keys else b"%d" % numerics
    for start in range(len(keys) * width, len(ids) - width + 1, width):
        key = hashlib.blake2b(key + ids[start : start + width], digest_size=_KEY_BYTES).digest()
        keys.append(key)


class PrefixTree:
    """Maps keys to pages and back."""

    def __init__(self, num_pages: int) -> None:
        self._pages: dict[bytes, int] = {}
        self._keys: list[bytes | None] = [None] * num_pages
        self._parents = array("i", bytes(4 * num_pages))  # of pages in the tree; -1 at the root
        self.holds = bytearray(num_pages)  # 1 for pages in the tree
        self.proven = bytearray(num_pages)  # 1 for proven pages in the tree; their ancestors are proven too

    def match(self, keys: list[bytes]) -> int:
        """How many of the first `keys` are in the tree: the longest cached prefix, in pages."""
        low, high = 0, len(keys)
        while low < high:
            middle = (low + high) // 2
            if keys[middle] in self._pages:
                low = middle + 1
            else:
                high = middle
        return low

    def pages(self, keys: list[bytes]) -> list[int]:
        """The pages of `keys`, which must all be in the tree."""
        return [self._pages[key] for key in keys]

    def insert(self, key: bytes, page: int, parent: int) -> bool:
        """Insert `page` under `key` as a child of `parent`, -1 at the root. Returns False if another page already has
        that key, or if the parent was cut."""
        if key in self._pages or (parent >= 0 and not self.holds[parent]):
            return False
        self._pages[key] = page
        self._parents[page] = parent
        self._keys[page] = key
        self.holds[page] = 1
        return True

    def prove(self, path: list[int]) -> None:
        """Mark these pages, given from the root down, as proven: logits computed from them were finite."""
        for page in reversed(path):
            if self.proven[page]:
                break
            self.proven[page] = self.holds[page]

    def cut(self, keys: list[bytes]) -> list[int]:
        """Remove the unproven pages on the path of `keys` and all their descendants. Returns the removed pages."""
        cut = [page for page in self.pages(keys[: self.match(keys)]) if not self.proven[page]][:1]
        if cut:
            children: dict[int, list[int]] = {}
            for page in self._pages.values():
                children.setdefault(self._parents[page], []).append(page)
            for page in cut:  # `cut` grows as we iterate
                cut += children.get(page, ())
        for page in cut:
            self.remove(page)
        return cut

    def remove(self, page: int) -> None:
        """Remove a leaf."""
        key = self._keys[page]
        if key is None:
            raise RuntimeError(f"page {page} is not in the prefix tree")
        del self._pages[key]
        self._keys[page] = None
        self.holds[page] = self.proven[page] = 0
