"""What a fleet does about actors that are slow or stopped, before they count as lost. Actors of this process, no Ray."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from cluster.fleet import ray_fleet, supervision
from cluster.fleet.ray_fleet import Fleet
from tests.actors_of_this_process import Events, with_fleet


class Worker:
    def __init__(self) -> None:
        self.done: list[Any] = []
        self.version = 0

    async def status(self) -> dict[str, Any]:
        return {}

    async def work(self, what: str) -> "Worker":
        self.done.append(what)
        return self

    async def load(self, version: int) -> int:
        self.version = version
        return version


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def kinds(events: Events) -> list[str]:
    return [kind for kind, _ in events]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "SILENT_SECONDS", 0.05)
    monkeypatch.setattr(supervision, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(ray_fleet, "LATE_SECONDS", 0.05)


def test_the_work_of_an_actor_that_falls_silent_goes_to_another_and_it_gets_none_until_it_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(fleet: Fleet, events: Events) -> None:
        first, second = fleet.replicas
        first.handle.awake.clear()
        answer = await fleet.call("work", "a", at=first)
        assert answer is second.handle._actor and not first.takes_work
        assert [await fleet.call("work", what) for what in "bc"] == [answer, answer]
        assert await fleet.room(1) is second
        [silent] = [fields for kind, fields in events if kind == "actor_silent"]
        assert silent["actor"] == "worker-0" and silent["cause"].startswith("it has not answered for ")
        first.handle.awake.set()
        await until(lambda: first.takes_work)
        assert await fleet.call("work", "d", at=first) is first.handle._actor
        assert kinds(events).count("actor_heard") == 1 and "actor_hung" not in kinds(events)

    with_fleet(monkeypatch, Worker, body)


def test_work_that_no_other_actor_can_take_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(fleet: Fleet, events: Events) -> None:
        first, second = fleet.replicas
        first.handle.awake.clear()
        second.handle.awake.clear()
        call = asyncio.create_task(fleet.call("work", "a", at=first))
        await until(lambda: kinds(events).count("actor_silent") == 2)
        assert not call.done()
        second.handle.awake.set()
        assert await call is second.handle._actor

    with_fleet(monkeypatch, Worker, body)


def test_a_call_moves_once_so_that_work_without_steps_is_not_passed_on_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Long(Worker):
        async def work(self, what: str) -> "Worker":
            await asyncio.sleep(0.5)
            return await super().work(what)

    async def body(fleet: Fleet, events: Events) -> None:
        answer = await fleet.call("work", "a")
        workers = [replica.handle._actor for replica in fleet.replicas]
        assert answer in workers and sum(len(worker.done) for worker in workers) <= 2
        assert "actor_hung" not in kinds(events)
        assert "it has made no progress" in next(fields["cause"] for kind, fields in events if kind == "actor_silent")

    with_fleet(monkeypatch, Long, body, hang_timeout=0.8)


def test_a_silent_actor_still_counts_as_hanging_after_the_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(fleet: Fleet, events: Events) -> None:
        fleet.replicas[0].handle.awake.clear()
        await until(lambda: fleet.replicas[0].restarts == 1 and fleet.replicas[0].takes_work)
        [hung] = [fields for kind, fields in events if kind == "actor_hung"]
        assert hung["cause"] == "it has not answered for 0.4 s (ray.hang_timeout_seconds)"

    with_fleet(monkeypatch, Worker, body, hang_timeout=0.4)


def test_an_actor_that_is_late_is_left_behind_and_gets_no_work_before_it_has_caught_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    newest = 0

    async def prepare(handle: Any) -> None:
        while (given := newest) and handle._actor.version != given:
            await handle.load.remote(given)

    async def body(fleet: Fleet, events: Events) -> None:
        nonlocal newest
        fleet.prepare = prepare
        first, second = fleet.replicas
        newest = 1
        assert await fleet.call_each("load", 1) == [1, 1]
        first.handle.awake.clear()
        for newest in (2, 3):  # the second time nobody waits for it
            assert await fleet.call_each("load", newest) == [newest]
            assert first.behind and await fleet.call("work", "a", at=first) is second.handle._actor
        first.handle.awake.set()
        await until(lambda: first.takes_work)
        assert first.handle._actor.version == 3
        newest = 4
        assert await fleet.call_each("load", 4) and not second.behind
        await until(lambda: first.takes_work)
        assert (kinds(events).count("left_behind") >= 1) and "actor_hung" not in kinds(events)
        newest = 5
        assert len(await fleet.call_each("load", 5)) in (1, 2)

    with_fleet(monkeypatch, Worker, body)


def test_a_single_actor_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(fleet: Fleet, events: Events) -> None:
        [only] = fleet.replicas
        only.handle.awake.clear()
        call = asyncio.create_task(fleet.call_each("load", 1))
        await until(lambda: only.silent)
        await asyncio.sleep(0.1)
        assert not call.done()
        only.handle.awake.set()
        assert await call == [1] and not only.behind

    with_fleet(monkeypatch, Worker, body, replicas=1)
