"""Where the episodes of a rollout actor are played: which process hosts one, that it has room, and how it is asked."""

import asyncio
import hashlib
import time
from collections import defaultdict
from collections.abc import Coroutine
from typing import Any

from actors.environment.base import EnvironmentLostError, Environments
from actors.heartbeat import beat
from actors.rollout.thinking import Thinking
from actors.trajectory import TrajectoryId

LOST_SECONDS = 60.0
"""After this long without a process that hosts environments, those that were lost are tried again."""
BEAT_SECONDS = 2.0
"""Between two signs of life while an environment is waited for."""


class Places:
    """The processes that host environments, as one rollout actor sees them. For one event loop, without locks."""

    def __init__(self, environments: Environments | None, thinking: Thinking, *, limited: bool):
        """environments: None until `reach` is called. limited: a process may have no room for an episode."""
        self._environments, self._thinking, self._limited = environments, thinking, limited
        self._lost = set[int]()
        self._doors: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        """Of each process: who may ask it for room."""

    def reach(self, environments: Environments) -> None:
        """The processes that host environments from now on."""
        self._environments, self._lost = environments, set()

    def call(self, place: Any, method: str, *arguments: Any) -> Coroutine[Any, Any, Any]:
        """See `Environments.call`."""
        assert self._environments is not None
        return self._environments.call(place, method, *arguments)

    def lose(self, place: Any) -> None:
        """It has died: no episode goes there before another is there, or `LOST_SECONDS` are over."""
        self._lost.add(id(place))

    async def _named(self, id_: TrajectoryId, attempt: int) -> Any:
        """Where an episode is played: it follows from its id; a retry goes to another process where there is one.

        Waits while there is none: a lost one is being replaced, or the campaign ends.
        """
        since = time.monotonic()
        while True:
            if time.monotonic() - since > LOST_SECONDS:  # those that were lost may be back, and nobody said so
                self._lost.clear()
            places = [one for one in getattr(self._environments, "places", ()) if id(one) not in self._lost]
            if places:
                number = int.from_bytes(hashlib.blake2b(str(id_).encode(), digest_size=6).digest()) + attempt
                return places[number % len(places)]
            with self._thinking.asking():
                await asyncio.sleep(BEAT_SECONDS / 10)
            beat()

    async def enter(self, id_: TrajectoryId, attempt: int, key: str) -> Any:
        """`_named`, once it has room for the episode; others of this actor's wait in a row."""
        while True:
            place = await self._named(id_, attempt)
            if not self._limited:
                return place
            async with self._doors[id(place)]:
                try:
                    while id(place) not in self._lost:
                        if await self.call(place, "enter", key):
                            return place
                        with self._thinking.asking():
                            await asyncio.sleep(BEAT_SECONDS / 10)
                        beat()
                except EnvironmentLostError:
                    self.lose(place)
                except asyncio.CancelledError:
                    self.in_background(place, key)
                    raise

    def in_background(self, place: Any, key: str) -> None:
        """Tells the environment that the attempt is over; nobody waits for it."""
        if self._environments is not None and id(place) not in self._lost:
            _quietly(self._environments.call(place, "close", key))


def _quietly(work: Coroutine[Any, Any, Any]) -> None:
    """Runs it in the background, whatever comes of it."""
    task = asyncio.ensure_future(work)
    _UNWATCHED.add(task)  # asyncio itself holds only a weak reference
    task.add_done_callback(_over)


def _over(task: asyncio.Future) -> None:
    _UNWATCHED.discard(task)
    if not task.cancelled():
        task.exception()  # looked at, so that asyncio does not report it


_UNWATCHED: set[asyncio.Future] = set()
