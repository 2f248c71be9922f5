"""The real `Fleet` with actors in this process: no Ray, so that a test of what a fleet does takes milliseconds.

A `Handle` stands for Ray's: calls are answered in order, one at a time, and not while the test has stopped the actor.
"""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.fleet import ray_actor, ray_fleet, supervision
from cluster.fleet.ray_actor import ActorLostError, Resources
from cluster.fleet.ray_fleet import Fleet

Events = list[tuple[str, dict[str, Any]]]


class Handle:
    """One actor. `stopped` is as SIGSTOP: it answers neither calls nor the watch."""

    def __init__(self, actor: Any):
        self._actor, self._turn = actor, asyncio.Lock()
        self._calls: list[asyncio.Future] = []
        self.start = ("", "")
        """What it tells of its start: a text that changes with its progress, and what it does."""
        self.awake, self.dead, self.steps, self.waits = asyncio.Event(), asyncio.Event(), 0, ("", 0.0)
        self.awake.set()

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any, **keywords: Any) -> asyncio.Future:
            call = asyncio.ensure_future(self._answer(method, arguments, keywords))
            self._calls.append(call)
            return asyncio.shield(call)  # as with Ray, a caller that gives up does not end the call

        return SimpleNamespace(remote=remote)

    async def _answer(self, method: str, arguments: tuple, keywords: dict[str, Any]) -> Any:
        async with self._turn:
            await self.alive(self.awake.wait())
            self.steps += 1
            return await self.alive(getattr(self._actor, method)(*arguments, **keywords))

    async def alive(self, work: Awaitable[Any]) -> Any:
        """What the work gives; ActorLostError as soon as the actor is dead."""
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(self.dead.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self.dead.is_set():
                raise ActorLostError("killed by the test")
            return tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()


def with_fleet(
    monkeypatch: pytest.MonkeyPatch,
    actor_class: type,
    body: Callable[[Fleet, Events], Awaitable[None]],
    *,
    replicas: int = 2,
    hang_timeout: float = 600.0,
    place: Any = None,
    **more: Any,
) -> None:
    """Runs the body with a fleet of these actors, whose methods are coroutines, and closes it."""

    async def steps_of(handle: Handle) -> tuple[int, tuple[str, float]]:
        await handle.alive(handle.awake.wait())
        return handle.steps, handle.waits

    async def progress_of(handles: list[Handle]) -> list[tuple[str, str]]:
        return [handle.start for handle in handles]

    async def started(_: Handle) -> list[tuple[str, float]]:
        return [("loads its model", 0.25)]

    async def nothing(*_: Any) -> Any:
        return None

    async def whereabouts(handle: Handle) -> tuple[str, int]:
        return "node", 0

    def kill(handle: Handle) -> None:
        handle.dead.set()

    monkeypatch.setattr(ray_actor.ray, "kill", kill)
    for module in (supervision, ray_fleet):
        for name, fake in {
            "create": lambda actor, arguments, keywords, *_: Handle(actor(*arguments, **keywords)),
            "place": place or nothing,
            "wait_until_built": nothing,
            "whereabouts": whereabouts,
            "steps_of": steps_of,
            "started": started,
            "progress_of": progress_of,
            "end_processes": lambda replica: replica.handle.dead.set(),
        }.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fake)

    async def run() -> None:
        events: Events = []
        fleet = Fleet(
            "worker",
            actor_class,
            (),
            {},
            **{
                "replicas": replicas,
                "resources": Resources(0.0, 0.0),
                "max_restarts": 3,
                "start_timeout_seconds": 600.0,
                "hang_timeout_seconds": hang_timeout,
                "on_event": lambda kind, **fields: events.append((kind, fields)),
                **more,
            },
        )
        try:
            async with asyncio.timeout(600):
                await fleet.start()
                await body(fleet, events)
        finally:
            fleet.close()

    asyncio.run(run())
