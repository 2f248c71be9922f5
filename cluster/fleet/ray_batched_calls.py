"""Batched calls, the campaign's half: requests to one actor and its answers, in as few Ray calls as possible.

    generate, generate, ...  -->  calls `submit`, one at a time: each takes all requests that have come meanwhile
    answers                  <--  calls `collect`, one at a time: each brings all answers that are ready

The first answer comes at once. Before the next `collect` there is a pause (pauses.py), so that answers come together where there
are many. The other half is actors/rollout/batched_calls.py.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Any

from actors.trajectory import Requests, RolloutCounts
from cluster.fleet.pauses import Pause
from cluster.fleet.ray_actor import invoke


class BatchedCaller:
    """Makes the calls to one actor that has `submit` and `collect`. For one event loop, without locks."""

    def __init__(
        self,
        handle: Any,
        client: str,
        patiently: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]],
        clock: Callable[[], float] = time.monotonic,
    ):
        """client: this caller's name at the actor. patiently: makes a call, again while the object store is full."""
        self.handle, self._client, self._patiently, self._clock = handle, client, patiently, clock
        self._unsent: list[tuple[int, Requests]] = []
        self._waiting: dict[int, tuple[asyncio.Future, float]] = {}
        """Number -> future of a request without an answer, and when it came."""
        self._pause = Pause()
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task] = set()
        self._submitting = self._collecting = False

    async def generate(self, requests: Requests) -> tuple[RolloutCounts, Any]:
        """The counts of the sampled requests, and a reference to Trajectories that hold them and perhaps others.

        Errors are those of a call of the actor's `generate`.
        """
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._waiting[number] = answer, self._clock()
        self._unsent.append((number, requests))
        if not self._submitting:  # its task runs in the next turn, and sends all of this turn
            self._submitting = True
            self._start(self._submit())
        if not self._collecting:
            self._collecting = True
            self._start(self._collect())
        try:
            return await answer
        finally:
            self._waiting.pop(number, None)

    async def _submit(self) -> None:
        """Sends as long as there are requests."""
        try:
            while self._unsent:
                numbered, self._unsent = self._unsent, []
                try:
                    await self._send(numbered)
                except Exception as error:  # every request of this call gets it
                    self._fail([number for number, _ in numbered], error)
        finally:
            self._submitting = False

    async def _send(self, numbered: list[tuple[int, Requests]]) -> None:
        await self._patiently(lambda: invoke(self.handle, "submit", (self._client, numbered), 1))

    async def _collect(self) -> None:
        """Collects as long as a request waits."""
        try:
            while self._waiting:
                answers, reference = await self._collect_once()
                for number, answer in answers:
                    future, since = self._waiting.pop(number, (None, 0.0))
                    if future is None or future.done():  # its caller was cancelled
                        continue
                    self._pause.answered(self._clock() - since)
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result((answer, reference))
                if self._waiting:
                    await asyncio.sleep(self._pause.seconds)
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
            future, _ = self._waiting.pop(number, (None, 0.0))
            if future is not None and not future.done():
                future.set_exception(error)

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the event loop holds tasks only weakly
        task.add_done_callback(self._tasks.discard)
