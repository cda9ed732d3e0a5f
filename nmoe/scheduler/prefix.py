"""The prefix tree of one rank: which page holds the KV of which tokens after which prefix.

A node is one full page. It is named by its key, a digest of its whole path: the numerics class, then every page's token
ids from the start of the sequence. So lookups need no links: a dictionary from key to page is the tree, and two
sequences meet in a node exactly if they agree up to its end. A request computes its keys once, whatever the number of
ranks.

A page is proven when logits behind it were finite: then it is. One that is not may have been computed by a request that
ended before anybody saw its logits, so when those of some request are not finite, all of its path that is not proven is
cut off.

Invariant: the tree is closed under prefixes (a node's parent is in it). Pages enter root first and, by the order in
which `nmoe/scheduler/pages.py` evicts, leave leaf first. Hence the longest match can be found by bisection.
"""

import hashlib
from array import array

from nmoe.profiles import Numerics

_KEY_BYTES = 16  # 2**64 pages until a collision is likely


def extend_keys(keys: list[bytes], ids: bytes, page_size: int, numerics: Numerics) -> None:
    """Append to `keys` those of the full pages of `ids` (int32) that it does not have yet."""
    width = 4 * page_size
    key = keys[-1] if keys else b"%d" % numerics
    for start in range(len(keys) * width, len(ids) - width + 1, width):
        key = hashlib.blake2b(key + ids[start : start + width], digest_size=_KEY_BYTES).digest()
        keys.append(key)


class PrefixTree:
    """Key -> page, and back."""

    def __init__(self, num_pages: int) -> None:
        self._pages: dict[bytes, int] = {}
        self._keys: list[bytes | None] = [None] * num_pages
        self._parents = array("i", bytes(4 * num_pages))  # of pages in the tree; -1 at the root
        self.holds = bytearray(num_pages)  # 1 for pages in the tree
        self.proven = bytearray(num_pages)  # 1 for those of them that are proven; then those above are, too

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
        """Enter `page` under `key`, behind the page `parent`, -1 at the root; False if another page has that place
        already, or the parent was cut off."""
        if key in self._pages or (parent >= 0 and not self.holds[parent]):
            return False
        self._pages[key] = page
        self._parents[page] = parent
        self._keys[page] = key
        self.holds[page] = 1
        return True

    def prove(self, path: list[int]) -> None:
        """Logits behind these pages, given from the root on, were finite."""
        for page in reversed(path):
            if self.proven[page]:
                break
            self.proven[page] = self.holds[page]

    def cut(self, keys: list[bytes]) -> list[int]:
        """Take out what is not proven on the path of `keys`, with all that hangs on it: these pages."""
        cut = [page for page in self.pages(keys[: self.match(keys)]) if not self.proven[page]][:1]
        if cut:
            children: dict[int, list[int]] = {}
            for page in self._pages.values():
                children.setdefault(self._parents[page], []).append(page)
            for page in cut:  # which grows
                cut += children.get(page, ())
        for page in cut:
            self.remove(page)
        return cut

    def remove(self, page: int) -> None:
        """Take a leaf out."""
        key = self._keys[page]
        if key is None:
            raise RuntimeError(f"page {page} is not in the prefix tree")
        del self._pages[key]
        self._keys[page] = None
        self.holds[page] = self.proven[page] = 0
