"""Stop strings in a stream of text.

Invariant: what `feed` has returned contains no stop string and no part of one that could still become whole, and
nothing that is certain is held back.
"""


class StopFinder:
    """Looks for `stops` (none empty) in the text fed to it. `found` once one has appeared."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""  # the longest end of the text so far that a stop string begins with
        self.found = False

    def feed(self, text: str, *, early: bool = False) -> str:
        """The text that is certain not to belong to a stop string; one that ends in an `early` text does not count.

        Of several stop strings the one that is complete first counts, and of those the longest: so it does not matter
        how the text was cut into pieces. What follows it is dropped.
        """
        before, text = len(self._held), self._held + text
        if not early:
            # What is held has been looked through: a stop string ends behind it.
            places = [(text.find(stop, max(0, before + 1 - len(stop))), len(stop)) for stop in self._stops]
            if ends := [(place + length, place) for place, length in places if place >= 0]:
                self.found = True
                return text[: min(ends)[1]]
        held = max(self._overlap(stop, text) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    @property
    def holds(self) -> bool:
        """Whether some text is held back."""
        return bool(self._held) and not self.found

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        return "" if self.found else self._held

    @staticmethod
    def _overlap(stop: str, text: str) -> int:
        """The length of the longest end of `text` that is a proper beginning of `stop`."""
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0
