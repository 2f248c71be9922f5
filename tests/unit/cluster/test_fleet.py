"""What a fleet does about actors that are slow or stopped, before they count as lost. Actors of this process, no Ray."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import ActorFaultError, CampaignError, UnavailableError
from cluster.config import WeightsConfig
from cluster.console.status import live_actors
from cluster.fleet import ray_fleet, supervision
from cluster.fleet.ray_fleet import Fleet
from cluster.fleet.restarts import Restarts
from cluster.loop.weight_sync import ObjectStoreTransport, Published
from cluster.records.event_table import FAULTS
from tests.actors_of_this_process import Events, with_fleet
from tests.light_campaign import Reference


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
    monkeypatch.setattr(supervision, "SILENT_SECONDS", 0.25)
    monkeypatch.setattr(supervision, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(ray_fleet, "LATE_SECONDS", 0.25)


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
        [silent] = [fields for kind, fields in events if (kind, fields["actor"]) == ("actor_silent", "worker-0")]
        assert silent["cause"].startswith("it has not answered for ")
        first.handle.awake.set()
        await until(lambda: first.takes_work)
        assert await fleet.call("work", "d", at=first) is first.handle._actor
        heard = [fields for kind, fields in events if (kind, fields["actor"]) == ("actor_heard", "worker-0")]
        assert len(heard) == 1 and "actor_hung" not in kinds(events)

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
            await asyncio.sleep(1.6)  # above a quarter of the hang time-out, far below all of it
            return await super().work(what)

    async def body(fleet: Fleet, events: Events) -> None:
        answer = await fleet.call("work", "a")
        workers = [replica.handle._actor for replica in fleet.replicas]
        assert answer in workers and sum(len(worker.done) for worker in workers) <= 2
        assert "actor_hung" not in kinds(events)
        assert "it has made no progress" in next(fields["cause"] for kind, fields in events if kind == "actor_silent")

    with_fleet(monkeypatch, Long, body, hang_timeout=4.0)


def test_a_silent_actor_still_counts_as_hanging_after_the_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(fleet: Fleet, events: Events) -> None:
        fleet.replicas[0].handle.awake.clear()
        await until(lambda: fleet.replicas[0].restarts == 1 and fleet.replicas[0].takes_work)
        [hung] = [fields for kind, fields in events if kind == "actor_hung"]
        assert hung["cause"] == "it has not answered for 1.5 s (ray.hang_timeout_seconds)"

    with_fleet(monkeypatch, Worker, body, hang_timeout=1.5)


@pytest.mark.parametrize("refusals", [2, 9])
def test_an_actor_whose_server_is_away_when_it_is_built_again_is_tried_again_within_its_budget(
    monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    built = 0

    class Client(Worker):
        def __init__(self) -> None:
            nonlocal built
            built += 1
            if 2 < built <= 2 + refusals:
                raise UnavailableError("teachers.t.urls", "http://localhost:1 (no answer)", "servers that answer")
            super().__init__()

    async def body(fleet: Fleet, events: Events) -> None:
        first = fleet.replicas[0]
        first.handle.dead.set()
        if refusals == 2:
            await until(lambda: first.restarts == 3 and first.takes_work)
            assert kinds(events).count("actor_died") == 3
        else:
            with pytest.raises(CampaignError, match=r"3 times .* once more .* because: teachers.t.urls: found"):
                await fleet.watched()

    monkeypatch.setattr(Restarts, "pause", lambda _: 0.0)
    with_fleet(monkeypatch, Client, body)


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


def test_an_actor_that_was_only_slow_is_done_with_its_old_work_before_it_is_heard_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    going_on = asyncio.Event()

    class SlowAtFirst(Worker):
        async def work(self, what: str) -> "Worker":
            if not self.done and what == "a":
                await going_on.wait()
            return await super().work(what)

    async def body(fleet: Fleet, events: Events) -> None:
        first, second = fleet.replicas
        second.handle._actor.done.append("quick")
        assert await fleet.call("work", "a", at=first) is second.handle._actor and first.silent
        assert not first.handle._actor.done
        going_on.set()
        await until(lambda: first.takes_work)
        assert first.handle._actor.done == ["a"] and "actor_hung" not in kinds(events)

    with_fleet(monkeypatch, SlowAtFirst, body, hang_timeout=4.0)


def test_scaling_down_keeps_the_actor_that_is_nearest_to_work(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(fleet: Fleet, events: Events) -> None:
        room, ready = asyncio.Event(), asyncio.Event()
        made = asyncio.Event()

        async def place(*_: Any) -> None:
            if made.is_set():  # the last of them
                await room.wait()
            made.set()

        async def prepare(handle: Any) -> None:
            await ready.wait()

        monkeypatch.setattr(supervision, "place", place)
        fleet.prepare = prepare
        fleet.resize(3)
        first, built, _ = fleet.replicas
        await until(lambda: built.handle is not None and made.is_set())
        fleet.resize(2)
        assert fleet.replicas == [first, built]
        ready.set()
        await until(lambda: built.takes_work)
        first.handle.awake.clear()
        await until(lambda: first.silent)
        fleet.resize(1)
        assert fleet.replicas == [built], "a silent one goes before one that works"
        first.handle.awake.set()

    with_fleet(monkeypatch, Worker, body, replicas=1)


@pytest.mark.parametrize("encoding", ["dense", "delta"])
def test_an_actor_that_was_left_behind_loads_every_delta_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    class Engine(Worker):
        async def load_weights(self, version: int, base: int | None) -> float:
            assert base in (None, self.version), f"a delta from {base} onto {self.version}"
            self.version = version
            return 0.1

    class Learner:
        version = 0

        async def stream(self, method: str, delta: bool = False, on_item: Any = None) -> list[list[Any]]:
            manifest = SimpleNamespace(version=self.version, nbytes=1, **({"base_version": 0} if delta else {}))
            return [[Reference(manifest)]]

    class Transport(ObjectStoreTransport):
        async def publish(self) -> Published:
            published = await super().publish()
            base = published.version - 1 if published.delta else None
            published.references = [published.version, base]
            return published

    async def body(fleet: Fleet, events: Events) -> None:
        learner: Any = Learner()
        transport = Transport(learner, fleet, WeightsConfig(encoding=encoding))  # type: ignore[arg-type]
        fleet.prepare = transport.give
        first, second = fleet.replicas
        for learner.version in range(5):
            if learner.version == 2:
                first.handle.awake.clear()
            await transport.load(await transport.publish())
        assert (first.version, second.version) == (1, 4) and first.behind
        first.handle.awake.set()
        await until(lambda: first.takes_work)
        assert first.handle._actor.version == first.version == 4
        assert not [kind for kind in kinds(events) if kind in FAULTS]

    with_fleet(monkeypatch, Engine, body)


def test_an_actor_that_cannot_do_what_it_is_told_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Faulty(Worker):
        async def abort(self) -> None:
            raise ActorFaultError("abort failed: RuntimeError: the engine is gone")

    async def body(fleet: Fleet, events: Events) -> None:
        await fleet.tell(fleet.replicas[0], "abort")
        await until(lambda: fleet.replicas[0].restarts == 1)
        assert [fields["cause"] for kind, fields in events if kind == "actor_failed"]

    with_fleet(monkeypatch, Faulty, body)


def test_an_actor_that_waits_for_a_server_is_told_and_not_taken_for_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(fleet: Any, events: Events) -> None:
        first = fleet.replicas[0]
        first.handle.waits = ("http://far/v1: status 503", 12.0)
        await until(lambda: first.waits_for)
        [told] = live_actors([first])
        assert told["waits_for"] == "http://far/v1: status 503" and told["waits_seconds"] >= 12
        first.handle.waits = ("", 0.0)
        await until(lambda: not first.waits_for)
        assert [kind for kind in kinds(events) if kind.startswith("outside")] == ["outside_away", "outside_back"]

    with_fleet(monkeypatch, Worker, scenario)
