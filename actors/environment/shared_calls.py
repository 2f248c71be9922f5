"""Shared calls, the actor's half: what the episodes of a rollout actor ask comes in few calls, and what is ready leaves with them.

    exchange    begins these calls, each with a number that the client chose; returns all answers that are ready for this client.
                Waits until there is one, or until the client's next exchange has come

So no answer waits for a slower one, and an exchange with environments that answer at once brings all of their answers. A call of a Ray
actor costs both processes more than such an environment itself. The other half is cluster/fleet/ray_shared_calls.py.
"""

import asyncio
import pickle
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

LOST_SECONDS = 600.0
"""After this long without an exchange, a client with answers that it has not taken is gone."""


class Asked(NamedTuple):
    """A call of one of the actor's methods."""

    number: int
    method: str
    arguments: tuple[Any, ...]


class Answered(NamedTuple):
    """What a call has returned."""

    number: int
    value: bytes = b""
    """Pickled by itself: what cannot be read is one call's fault."""
    error: str = ""
    """What is wrong where there is no value."""


@dataclass
class _Client:
    """The calls of one client."""

    ready: list[Answered] = field(default_factory=list)
    under_way: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    exchanges: int = 0
    """Those that have come so far."""
    heard: float = 0.0
    """When the last one came, in seconds of time.monotonic()."""


class SharedCalls:
    """Base class of actors whose methods are called through `exchange`. For one event loop, without locks."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client] = {}
        self._calls: set[asyncio.Task[None]] = set()

    async def exchange(self, name: str, asked: Sequence[Asked]) -> list[Answered]:
        """See the module. name: the client's."""
        client = self._client(name)
        client.exchanges += 1
        own = client.exchanges
        client.wake.set()  # the exchange before this one returns
        for number, method, arguments in asked:
            client.under_way += 1
            call = asyncio.create_task(self._call(client, number, method, arguments))
            self._calls.add(call)  # asyncio itself holds only a weak reference to a task
            call.add_done_callback(self._calls.discard)
        while not client.ready and client.exchanges == own:
            client.wake.clear()
            await client.wake.wait()
        answers, client.ready = client.ready, []
        if not client.under_way and client.exchanges == own:
            self._clients.pop(name, None)
        return answers

    def _client(self, name: str) -> _Client:
        now = time.monotonic()
        if name not in self._clients:
            for other in [
                other for other, one in self._clients.items() if one.ready and now - one.heard > LOST_SECONDS
            ]:
                del self._clients[other]
            self._clients[name] = _Client()
        self._clients[name].heard = now
        return self._clients[name]

    async def _call(self, client: _Client, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            answer = Answered(number, pickle.dumps(await getattr(self, method)(*arguments)))
        except BaseException as error:  # becomes the caller's; nobody here cancels, and others would end the event loop
            traceback.print_exc()
            answer = Answered(number, error=f"{method} failed: {type(error).__name__}: {error}")
        client.under_way -= 1
        client.ready.append(answer)
        client.wake.set()
