"""Whose step is next.

While PRODUCTION has work, every second step is its own; the other lanes share the rest, one after the other. So a lane
with work waits for no more than 2 * (len(Lane) - 1) - 1 steps of others.
"""

from nmoe.profiles import Lane

_OTHERS = [lane for lane in Lane if lane is not Lane.PRODUCTION]


class Turns:
    """Remembers who had the last steps."""

    def __init__(self) -> None:
        self._last: Lane | None = None
        self._last_other = _OTHERS[-1]

    def order(self) -> list[Lane]:
        """All lanes; the first of them that has work takes the step."""
        at = _OTHERS.index(self._last_other) + 1
        others = _OTHERS[at:] + _OTHERS[:at]
        return [*others, Lane.PRODUCTION] if self._last is Lane.PRODUCTION else [Lane.PRODUCTION, *others]

    def took(self, lane: Lane) -> None:
        """The step is `lane`'s."""
        self._last = lane
        if lane is not Lane.PRODUCTION:
            self._last_other = lane
