"""The prefix tree of one rank: which page holds the KV of which tokens after which prefix.

A node is one full page. It is named by its key, a digest of its whole path: the numerics class, then every page's token
ids from the start of the sequence. So the tree needs no links: a dictionary from key to page is the tree, and two
sequences meet in a node exactly if they agree up to its end. A request computes its keys once, whatever the number of
ranks.

Invariant: the tree is closed under prefixes (a node's parent is in it). Pages enter root first and, by the order in
which `nmoe/scheduler/pages.py` evicts, leave leaf first. Hence the longest match can be found by bisection.
"""

import hashlib

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
        self.holds = bytearray(num_pages)  # 1 for pages in the tree

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

    def insert(self, key: bytes, page: int) -> bool:
        """Enter `page` under `key`; False if another page has that place already."""
        if key in self._pages:
            return False
        self._pages[key] = page
        self._keys[page] = key
        self.holds[page] = 1
        return True

    def remove(self, page: int) -> None:
        """Take a leaf out."""
        key = self._keys[page]
        if key is None:
            raise RuntimeError(f"page {page} is not in the prefix tree")
        del self._pages[key]
        self._keys[page] = None
        self.holds[page] = 0
