"""Finds stop strings in a stream of text.

Invariant: what `feed` has returned contains no stop string and no part of one that may still be completed, and
nothing that is certain is held back.
"""


class StopFinder:
    """Looks for `stops` (none empty) in the text fed to it. `found` is set once one has appeared."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops))
        self._firsts = frozenset(stop[0] for stop in stops)
        self._held = ""  # the longest suffix of the text so far that is a prefix of a stop string
        self.found = False

    def feed(self, text: str, *, early: bool = False) -> str:
        """The text that cannot belong to a stop string; a stop string that ends within an `early` text does not count.

        Among several stop strings, the first to be completed wins, and among those the longest, so the result does not
        depend on how the text was split. What follows it is dropped.
        """
        before, text = len(self._held), self._held + text
        if not early:
            # The held text has been searched already: a stop string must end after it.
            places = [(text.find(stop, max(0, before + 1 - len(stop))), len(stop)) for stop in self._stops]
            if ends := [(place + length, place) for place, length in places if place >= 0]:
                self.found = True
                return text[: min(ends)[1]]
        certain = self._certain(text)
        self._held = text[certain:]
        return text[:certain]

    @property
    def holds(self) -> bool:
        """Whether some text is held back."""
        return bool(self._held) and not self.found

    def flush(self) -> str:
        """The text held back, once there is no more to come."""
        return "" if self.found else self._held

    def _certain(self, text: str) -> int:
        """The length of `text` before the longest suffix that is a proper prefix of a stop string.

        The longest is looked for first, so a long text that goes on being held back costs no more than a short one.
        """
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._firsts:
                suffix = text[start:]
                if any(stop.startswith(suffix) and len(stop) > len(suffix) for stop in self._stops):
                    return start
        return len(text)
