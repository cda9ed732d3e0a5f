"""Decides which lane gets the next step.

While PRODUCTION has work, it gets every second step; the other lanes share the rest round-robin. So a lane with work
waits for at most 2 * (len(Lane) - 1) - 1 steps of other lanes.
"""

from nmoe.profiles import Lane

_OTHERS = [lane for lane in Lane if lane is not Lane.PRODUCTION]


class Turns:
    """Remembers which lanes had the last steps."""

    def __init__(self) -> None:
        self._last: Lane | None = None
        self._last_other = _OTHERS[-1]

    def order(self) -> list[Lane]:
        """All lanes in order of preference; the first that has work gets the step."""
        at = _OTHERS.index(self._last_other) + 1
        others = _OTHERS[at:] + _OTHERS[:at]
        return [*others, Lane.PRODUCTION] if self._last is Lane.PRODUCTION else [Lane.PRODUCTION, *others]

    def took(self, lane: Lane) -> None:
        """`lane` has taken the step."""
        self._last = lane
        if lane is not Lane.PRODUCTION:
            self._last_other = lane
