"""Requests to one actor, and its answers, in as few calls as there can be.

    ask, ask, ask -->  one call `post` with all that was asked in one turn of the event loop
    answers       <--  calls `take`, one at a time: each brings what there is, as soon as there is anything

A call costs the calling process about as much as all else that it does for a trajectory. Where answers trickle each
comes by itself at once; where they pour, the more come together the less time there is for each.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

from actors.trajectory import Requests, RolloutCounts
from cluster.fleet.ray_actor import invoke


class Mailbox:
    """Between this process and one actor that is `Answering` (actors/rollout/batched_calls.py)."""

    def __init__(self, handle: Any, name: str, patiently: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]):
        """patiently: makes a call, again while the object store is full."""
        self.handle, self._name, self._patiently = handle, name, patiently
        self._asked: list[tuple[int, Requests]] = []
        self._waiting: dict[int, asyncio.Future] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task] = set()
        self._taking = False

    async def ask(self, requests: Requests) -> tuple[RolloutCounts, Any]:
        """What the actor's `generate` returns: its counts, and a reference of trajectories, these and perhaps others.

        Errors are those of a call.
        """
        number = next(self._numbers)
        self._waiting[number] = answer = asyncio.get_running_loop().create_future()
        self._asked.append((number, requests))
        if len(self._asked) == 1:
            self._start(self._post())
        if not self._taking:
            self._taking = True
            self._start(self._take())
        try:
            return await answer
        finally:
            self._waiting.pop(number, None)

    async def _post(self) -> None:
        asked, self._asked = self._asked, []
        try:
            await self._patiently(lambda: invoke(self.handle, "post", (self._name, asked), 1))
        except Exception as error:  # of those that asked
            self._fail([number for number, _ in asked], error)

    async def _take(self) -> None:
        try:
            while self._waiting:
                answers, reference = await self._answers()
                for number, answer in answers:
                    future = self._waiting.pop(number, None)
                    if future is None or future.done():  # nobody wants it any more
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result((answer, reference))
        except Exception as error:  # of all that wait
            self._fail(list(self._waiting), error)
        finally:
            self._taking = False

    async def _answers(self) -> Any:
        tries = itertools.count()
        return await self._patiently(lambda: invoke(self.handle, "take", (self._name, next(tries) > 0), 2))

    def _fail(self, numbers: list[int], error: Exception) -> None:
        for number in numbers:
            future = self._waiting.pop(number, None)
            if future is not None and not future.done():
                future.set_exception(error)

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
