"""How often something that was lost is started again: a budget within an hour, and nothing the same way three times."""

import re
import time
from collections import deque

from actors.errors import ActorFaultError, LearnerLostError

WINDOW_SECONDS = 3600.0
RECENT_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 30.0


class Restarts:
    """The restart budget of one actor: at most `most` restarts within an hour, with growing pauses between them.

    The window is an hour, not the campaign: a campaign of two weeks has many single faults, a permanent fault shows
    many times in an hour.
    """

    def __init__(self, most: int):
        self._most = most
        self._times: deque[float] = deque()

    def spent(self) -> bool:
        """Whether the budget of the last hour is used up."""
        while self._times and time.monotonic() - self._times[0] > WINDOW_SECONDS:
            self._times.popleft()
        return len(self._times) >= self._most

    def pause(self) -> float:
        """Seconds to wait before the next restart: 0 after a quiet minute, else 1, 2, 4 ... up to 30.

        A machine that kills actors as fast as they start is not helped by starting them faster.
        """
        recent = sum(time.monotonic() - moment < RECENT_SECONDS for moment in self._times)
        return min(LONGEST_PAUSE_SECONDS, 0.5 * 2**recent) if recent else 0.0

    def count(self) -> None:
        """Records a restart that happens now."""
        self._times.append(time.monotonic())


class Repeated:
    """Remembers how the learner was lost, so that nothing that fails in the same way at the same step is tried a third time.

    `Restarts` counts within an hour; a fault that comes back after two hours of updates would be repeated for ever.
    """

    def __init__(self) -> None:
        self._seen: set[tuple[object, ...]] = set()

    def seen(self, back_to: int, failed_at: int, error: LearnerLostError) -> bool:
        """Records a loss; whether the campaign has gone back to this step before, for the same cause.

        back_to: the step of the checkpoint. failed_at: the step that was reached. An error that the learner raised is the
        same wherever it comes. A process that ended without one may have been ended from outside (a node was taken
        away), so it also has to have ended at the same step.
        """
        raised = isinstance(error.__cause__, ActorFaultError)
        way = (back_to, same_cause(error), None if raised else failed_at)
        before = way in self._seen
        self._seen.add(way)
        return before

    @staticmethod
    def told(back_to: int) -> str:
        """The end of the message about a cause that was seen before."""
        origin = f"the checkpoint of step {back_to}" if back_to else "the untrained student"
        return f"it was so before, after {origin} was taken up, so it is not tried a third time"


def same_cause(error: Exception | str) -> str:
    """The text of an error without what differs each time: numbers, addresses, and ids of processes and nodes."""
    return re.sub(r"0x[0-9a-f]+|\b[0-9a-f]{16,}\b|\d+(?:\.\d+)*", "#", str(error))
