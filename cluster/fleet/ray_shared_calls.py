"""Shared calls, the client's half: the calls of many episodes to one environment actor, in as few Ray calls as possible.

    call, call, ...  -->  `exchange` takes all calls that have come meanwhile, and brings all answers that are ready

An exchange waits at the actor for its first answer; the next one sends it back, so at most two are under way. They begin a pause
apart, in which calls come together (pauses.py): a share of the time from an answer to the same episode's next call, its turn. The
other half is actors/environment/shared_calls.py.
"""

import asyncio
import itertools
import pickle
import time
from collections.abc import Callable
from typing import Any

from actors.environment.shared_calls import Asked
from actors.errors import ActorFaultError
from cluster.fleet.pauses import Pause
from cluster.fleet.ray_actor import invoke

SHARE, LONGEST_SECONDS = 1 / 8, 0.02
"""Of a turn. An exchange takes a millisecond or two of each process: rare enough at the longest pause, whatever a turn takes."""


class SharedCaller:
    """Makes the calls to one environment actor. For one event loop, without locks."""

    def __init__(self, handle: Any, client: str, clock: Callable[[], float] = time.monotonic):
        """client: this caller's name at the actor."""
        self._handle, self._client, self._clock = handle, client, clock
        self._unsent: list[Asked] = []
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        """Number -> future of a call without an answer."""
        self._numbers = itertools.count()
        self._gathering, self._under_way = False, 0
        self._began, self._pause = clock(), Pause(SHARE, LONGEST_SECONDS)
        self._answered: dict[Any, float] = {}
        """First argument of a call, which names an episode -> when its last call was answered."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """What the method returns. Errors: see `errors_of`; ActorFaultError too where its value cannot be read."""
        one, episode = Asked(next(self._numbers), method, arguments), arguments[0]
        if (since := self._answered.pop(episode, None)) is not None and method == "step":  # after a turn
            self._pause.answered(self._clock() - since)
        answer = self._waiting[one.number] = asyncio.get_running_loop().create_future()
        self._unsent.append(one)
        if not self._gathering and self._under_way < 2:
            self._gathering = True
            task = asyncio.create_task(self._exchange())
            self._tasks.add(task)  # the event loop holds tasks only weakly
            task.add_done_callback(self._tasks.discard)
        try:
            value = await answer
        finally:
            self._waiting.pop(one.number, None)
        if method != "close" and not getattr(value, "done", False):  # a further call of this episode comes
            self._answered[episode] = self._clock()
        return value

    async def _exchange(self) -> None:
        """Exchanges as long as there is something to send, or to wait for that no other exchange waits for."""
        while True:
            await asyncio.sleep(max(0.0, self._began + self._pause.seconds - self._clock()))
            self._gathering, self._began = False, self._clock()
            # Without those that were given up meanwhile.
            asked, self._unsent = [one for one in self._unsent if one.number in self._waiting], []
            if not self._waiting:
                return
            self._under_way += 1
            try:
                for answered in await invoke(self._handle, "exchange", (self._client, asked), 1):
                    self._answer(*answered)
            except Exception as error:  # the actor has died: every call that it was sent gets it
                self._fail(error)
            finally:
                self._under_way -= 1
            if self._gathering or not (self._unsent or (self._waiting and not self._under_way)):
                return
            self._gathering = True

    def _answer(self, number: int, value: bytes, error: str) -> None:
        future = self._waiting.pop(number, None)
        if future is None or future.done():  # its caller was cancelled
            return
        if not error:
            try:
                return future.set_result(pickle.loads(value))
            except Exception as fault:  # of a class that is not here, for example
                error = f"its answer cannot be read: {type(fault).__name__}: {fault}"
        future.set_exception(ActorFaultError(error))

    def _fail(self, error: Exception) -> None:
        for number in self._waiting.keys() - {one.number for one in self._unsent}:
            future = self._waiting.pop(number)
            if not future.done():
                future.set_exception(error)
