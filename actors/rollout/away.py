"""Patience with something that environments ask and that is away, such as a server: which episodes wait for it, and how long.

An attempt that finds it away is made again after a growing pause, with the same id and seed. As long as each attempt does, that
is no failure, up to a limit. The supervisor tells that the process waits (actors/heartbeat.py).
"""

import time
from collections.abc import Callable, Hashable

from actors import heartbeat


class Away:
    """Of all episodes of one rollout actor. For one event loop, without locks."""

    def __init__(self, limit_seconds: float, clock: Callable[[], float] = time.monotonic):
        """limit_seconds: `environment.away_timeout_seconds`."""
        self._limit, self._clock = limit_seconds, clock
        self._waiting: dict[Hashable, float] = {}
        """Episode -> when its first attempt in a row found it away."""
        self._since: float | None = None
        """The same of all episodes: an episode that begins later does not wait anew."""

    def found(self, episode: Hashable, cause: str) -> float | None:
        """An attempt has found it away: seconds until the next one; None: for so long that the attempt has failed."""
        now = self._clock()
        own = self._waiting.setdefault(episode, now)
        self._since = now if self._since is None else self._since
        away = now - min(own, self._since)
        if away >= self._limit:
            return None
        heartbeat.wait_for(f"environment: {cause}")
        pause = min(
            away / 2, heartbeat.LONGEST_WAIT_SECONDS, self._limit - away
        )  # there is a try when the time is over
        return max(pause, heartbeat.FIRST_WAIT_SECONDS)

    def ended(self, episode: Hashable) -> None:
        """An attempt has ended otherwise."""
        self._since = None
        self.left(episode)

    def left(self, episode: Hashable) -> None:
        """The episode waits no longer: it is over, or given up."""
        if self._waiting.pop(episode, None) is not None and not self._waiting:
            heartbeat.wait_for("")
