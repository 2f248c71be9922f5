"""How often what is lost may be started again: a number within an hour, each time after a longer pause. Pure."""

import time
from collections import deque

WINDOW_SECONDS = 3600.0
RECENT_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 30.0


class Restarts:
    """The restarts of one actor. Two weeks have many faults; what is wrong for good has many in an hour."""

    def __init__(self, most: int):
        self._most = most
        self._times: deque[float] = deque()

    def spent(self) -> bool:
        """Whether another restart would be one too many within the hour."""
        while self._times and time.monotonic() - self._times[0] > WINDOW_SECONDS:
            self._times.popleft()
        return len(self._times) >= self._most

    def pause(self) -> float:
        """Seconds to wait before the next: none, unless the last minute has seen others; then 1, 2, 4 … A machine that
        kills actors as fast as they start is not helped by starting them faster."""
        recent = sum(time.monotonic() - moment < RECENT_SECONDS for moment in self._times)
        return min(LONGEST_PAUSE_SECONDS, 0.5 * 2**recent) if recent else 0.0

    def count(self) -> None:
        """One is made now."""
        self._times.append(time.monotonic())
