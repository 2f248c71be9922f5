"""Batched calls, the campaign's half: requests to one actor and its answers, in as few Ray calls as possible.

    generate, generate, ...  -->  one call `submit` with all requests of one turn of the event loop
    answers                  <--  calls `collect`, one at a time: each brings all answers that are ready

Where answers trickle, each comes at once, with a call of its own. Where they pour, more come together the less time the
campaign process has. The other half is actors/rollout/batched_calls.py.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

from actors.trajectory import Requests, RolloutCounts
from cluster.fleet.ray_actor import invoke


class BatchedCaller:
    """Makes the calls to one actor that has `submit` and `collect`. For one event loop, without locks."""

    def __init__(self, handle: Any, client: str, patiently: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]):
        """client: this caller's name at the actor. patiently: makes a call, again while the object store is full."""
        self.handle, self._client, self._patiently = handle, client, patiently
        self._unsent: list[tuple[int, Requests]] = []
        self._waiting: dict[int, asyncio.Future] = {}
        """Number -> future of a request without an answer."""
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task] = set()
        self._collecting = False

    async def generate(self, requests: Requests) -> tuple[RolloutCounts, Any]:
        """The counts of the sampled requests, and a reference to Trajectories that hold them and perhaps others.

        Errors are those of a call of the actor's `generate`.
        """
        number = next(self._numbers)
        self._waiting[number] = answer = asyncio.get_running_loop().create_future()
        self._unsent.append((number, requests))
        if len(self._unsent) == 1:  # the first of this turn: its task runs in the next turn, and sends all
            self._start(self._submit())
        if not self._collecting:
            self._collecting = True
            self._start(self._collect())
        try:
            return await answer
        finally:
            self._waiting.pop(number, None)

    async def _submit(self) -> None:
        numbered, self._unsent = self._unsent, []
        try:
            await self._patiently(lambda: invoke(self.handle, "submit", (self._client, numbered), 1))
        except Exception as error:  # every request of this call gets it
            self._fail([number for number, _ in numbered], error)

    async def _collect(self) -> None:
        """Collects as long as a request waits."""
        try:
            while self._waiting:
                answers, reference = await self._collect_once()
                for number, answer in answers:
                    future = self._waiting.pop(number, None)
                    if future is None or future.done():  # its caller was cancelled
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result((answer, reference))
        except Exception as error:  # the actor has died: every waiting request gets it
            self._fail(list(self._waiting), error)
        finally:
            # No await since the last test of `_waiting`: a request cannot come in between and miss its collector.
            self._collecting = False

    async def _collect_once(self) -> Any:
        tries = itertools.count()
        return await self._patiently(lambda: invoke(self.handle, "collect", (self._client, next(tries) > 0), 2))

    def _fail(self, numbers: list[int], error: Exception) -> None:
        for number in numbers:
            future = self._waiting.pop(number, None)
            if future is not None and not future.done():
                future.set_exception(error)

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the event loop holds tasks only weakly
        task.add_done_callback(self._tasks.discard)
