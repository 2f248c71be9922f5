"""Batched calls, the actor's half: many requests come in one call, and many answers leave in one.

    submit    the requests of a client, each with a number that the client chose; returns at once
    collect   all answers that are ready for this client, by number; waits until there is one

A call to a Ray actor costs the campaign process 0.2 to 0.3 ms of processor time, about as much as all its other work for
a trajectory. The campaign process's half is cluster/fleet/ray_batched_calls.py.
"""

import asyncio
import traceback
from collections import defaultdict

import numpy as np

from actors.errors import ActorFaultError, CampaignError, UserError
from actors.trajectory import Requests, RolloutCounts, Trajectories, select_trajectories

Answer = RolloutCounts | Exception
"""The answer to one request: the counts of its trajectories, or the error for which there are none."""


class _Client:
    """The answers that are ready for one client, in the order of completion."""

    def __init__(self) -> None:
        self._ready: list[tuple[int, Answer, Trajectories | None]] = []
        self._collected = 0
        self._wake = asyncio.Event()

    def add(self, number: int, answer: Answer, trajectories: Trajectories | None) -> None:
        """An answer to the request with this number is ready."""
        self._ready.append((number, answer, trajectories))
        self._wake.set()

    def clear(self) -> None:
        """Drops all answers."""
        self._ready, self._collected = [], 0

    async def collect(self, again: bool) -> tuple[list[tuple[int, Answer]], Trajectories | None]:
        """See BatchedCalls.collect."""
        # Collected answers are kept until the next call, since the client may not have received them.
        del self._ready[: 0 if again else self._collected]
        while not self._ready:
            self._wake.clear()
            await self._wake.wait()
        self._collected = len(self._ready)
        written = [trajectories for *_, trajectories in self._ready if trajectories is not None]
        return [(number, answer) for number, answer, _ in self._ready], concat(written)


class BatchedCalls:
    """Base class of actors with a coroutine `generate`: adds `submit` and `collect`. For one event loop, without locks."""

    def __init__(self) -> None:
        self._clients: defaultdict[str, _Client] = defaultdict(_Client)
        self._running: set[asyncio.Task] = set()

    async def generate(self, requests: Requests) -> tuple[RolloutCounts, Trajectories]:
        """Samples every request. Implemented by the actor."""
        raise NotImplementedError

    async def submit(self, client: str, numbered: list[tuple[int, Requests]]) -> None:
        """Starts to generate for each of these requests; their answers wait for `client` to collect them."""
        for number, requests in numbered:
            task = asyncio.create_task(self._answer(self._clients[client], number, requests))
            self._running.add(task)  # asyncio itself holds only a weak reference to a task
            task.add_done_callback(self._running.discard)

    async def collect(self, client: str, again: bool) -> tuple[list[tuple[int, Answer]], Trajectories | None]:
        """All answers that are ready for `client`, by number, and their trajectories together; waits until there is one.

        again: the answers collected last did not arrive (the object store was full). They come again, with newer ones.
        """
        return await self._clients[client].collect(again)

    def discard(self) -> None:
        """Cancels all running requests and drops all answers: their clients are gone."""
        for task in self._running:
            task.cancel()
        for client in self._clients.values():
            client.clear()

    async def _answer(self, client: _Client, number: int, requests: Requests) -> None:
        try:
            client.add(number, *await self.generate(requests))
        except (UserError, CampaignError) as error:
            client.add(number, error, None)
        except Exception as error:  # the client gets the error that a separate Ray call would have raised
            traceback.print_exc()
            client.add(number, ActorFaultError(f"generate failed: {type(error).__name__}: {error}"), None)


def concat(written: list[Trajectories]) -> Trajectories | None:
    """The trajectories of several batches, one batch after the other; None for no batch."""
    return select_trajectories(np.concatenate([batch.ids for batch in written]), written) if written else None
