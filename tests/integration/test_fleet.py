"""Fleets with real Ray and actors without models: which actor gets a call, and what happens when one dies."""

import asyncio
import itertools
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import OutOfDiskError

from actors.errors import ActorFaultError, CampaignError, LearnerLostError, StoreFullError, UserError
from actors.heartbeat import BUILDS, beat, does
from cluster.fleet import supervision
from cluster.fleet.ray_actor import Resources
from cluster.fleet.ray_fleet import Fleet
from cluster.fleet.restarts import Restarts

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]


class Worker:
    """A role without a model."""

    def __init__(self, folder: str = "", fault: str = ""):
        self.weights, self.noted = 0, False
        if fault == "steady":  # gives signs until the test has seen enough of them
            for step in itertools.count():
                does(f"step {step}")
                beat()
                if Path(folder, "go").exists():
                    break
                time.sleep(0.01)
        if fault == "user":
            raise UserError("student.model", "nothing", "a model", ["model"])
        if fault == "user's words":
            raise UserError("a: found b, expected c", "d: found e, expected f", "g", ["d: found e, expected g"])
        if fault == "campaign":
            raise CampaignError("the disk is full")
        if fault == "defect":
            raise ZeroDivisionError("a defect")
        if fault == "exit":
            os._exit(3)
        if fault == "slow":
            time.sleep(100)
        if fault == "all but second":
            with open(Path(folder, "starts"), "a") as file:
                print(os.getpid(), file=file)
            if len(Path(folder, "starts").read_text().split()) != 2:
                os._exit(3)
        if fault.startswith("only first"):
            with open(Path(folder, "starts"), "a") as file:
                print(os.getpid(), file=file)
            if len(Path(folder, "starts").read_text().split()) > 1:
                if fault.endswith("user"):
                    raise UserError("student.model", "it moved", "a model")
                os._exit(3)

    def status(self) -> dict[str, int]:
        return {"process": os.getpid()}

    def process(self, seconds: float = 0.0) -> int:
        time.sleep(seconds)
        return os.getpid()

    def note(self) -> None:
        self.noted = True

    def wait_for_note(self) -> bool:
        while not self.noted:
            time.sleep(0.01)
        return True

    def hold(self, gate: Path) -> int:
        """Works until this file is there. That it has begun, a file says that has its process in its name."""
        gate.with_suffix(f".{os.getpid()}").touch()
        while not gate.exists():
            beat()
            time.sleep(0.01)
        return os.getpid()

    def load(self, value: int) -> int:
        if value < 0:
            raise ValueError("weights that cannot be")
        self.weights = value
        return os.getpid()

    def seen(self) -> int:
        return self.weights

    def pair(self, value: int) -> tuple[int, np.ndarray]:
        return value, np.full(300_000, value)

    def parts(self, count: int, die: bool = False) -> Iterator[np.ndarray]:
        for i in range(count):
            if die and i == 1:
                os._exit(3)
            yield np.full(200_000, i)

    def dies_of(self, error: str) -> None:
        print(error, file=sys.stderr, flush=True)
        os._exit(3)

    def stuck(self) -> None:
        time.sleep(1000)

    def slow(self, steps: int) -> int:
        for _ in range(steps):
            time.sleep(0.3)
            beat()
        return os.getpid()

    def fails_the_first(self, folder: str, times: int, error: type[Exception]) -> int:
        with open(Path(folder, "failures"), "a") as file:
            print(os.getpid(), file=file)
        if len(Path(folder, "failures").read_text().split()) <= times:
            raise error("a fault")
        return os.getpid()

    def fail(self, kind: str) -> None:
        raise {
            "user": UserError("a.key", "this", "that"),
            "campaign": CampaignError("it broke"),
            "defect": ZeroDivisionError("a defect"),
        }[kind]


OF_A_BUSY_MACHINE = ("actor_starting", "actor_silent", "actor_heard")
"""Events of actors that take their time; tests/unit/cluster/test_fleet.py has their tests."""

BUSY_SECONDS = 6.0
"""A hang time-out that an actor at work keeps on a busy machine, where a sign of life every 0.3 seconds may be seconds late."""


def with_fleet(
    body: Callable[[Fleet, list[tuple[str, dict[str, Any]]]], Awaitable[None]],
    *arguments: Any,
    replicas: int = 1,
    max_restarts: int | None = 2,
    timeout: float = 600.0,
    hang_timeout: float = 600.0,
    start: bool = True,
) -> None:
    """Runs the body with a fleet, which is closed after it."""

    async def run() -> None:
        events: list[tuple[str, dict[str, Any]]] = []
        fleet = Fleet(
            "worker",
            Worker,
            arguments,
            {},
            replicas=replicas,
            resources=Resources(0.1, 0.0),
            max_restarts=max_restarts,
            start_timeout_seconds=timeout,
            hang_timeout_seconds=hang_timeout,
            on_event=lambda kind, **fields: None if kind in OF_A_BUSY_MACHINE else events.append((kind, fields)),
        )
        try:
            async with asyncio.timeout(600):
                if start:
                    await fleet.start()
                await body(fleet, events)
        finally:
            fleet.close()

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(600):
        while not condition():
            await asyncio.sleep(0.01)


def begun(gate: Path) -> list[int]:
    """The processes that wait at this gate, or have waited."""
    return [int(file.suffix[1:]) for file in gate.parent.glob(f"{gate.name}.*")]


def test_a_call_goes_to_the_least_busy_replica(tmp_path: Path) -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        heavy = asyncio.create_task(fleet.call("hold", tmp_path / "gate", units=10))
        await until(lambda: any(r.under_way == 10 for r in fleet.replicas))
        light = {await fleet.call("process", units=3) for _ in range(4)}
        (tmp_path / "gate").touch()
        assert len(light) == 1 and await heavy not in light
        assert [r.under_way for r in fleet.replicas] == [0, 0]
        spread = await asyncio.gather(*(fleet.call("process", 0.05) for _ in range(6)))
        assert sorted(spread.count(process) for process in set(spread)) == [3, 3]

    with_fleet(body, replicas=2)


def test_room_is_at_the_least_busy_replica_that_takes_another_call_and_a_call_can_be_sent_there(tmp_path: Path) -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        first, second = fleet.replicas
        works = [asyncio.create_task(fleet.call("hold", tmp_path / "first", units=9, at=first))]
        works += [asyncio.create_task(fleet.call("hold", tmp_path / "second", units=1, at=second)) for _ in range(2)]
        await asyncio.sleep(0)
        assert (first.calls, first.under_way, second.calls, second.under_way) == (1, 9, 2, 2)
        assert await fleet.room(2) is first
        assert await fleet.room(3) is second
        waiting = asyncio.create_task(fleet.room(1))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        (tmp_path / "first").touch()
        assert await waiting is first and works[0].done()
        (tmp_path / "second").touch()
        answers = await asyncio.gather(*works)
        assert answers[0] != answers[1] == answers[2]

    with_fleet(body, replicas=2)


def test_a_call_returns_its_first_value_and_references_of_the_others() -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        value, reference = await fleet.call("pair", 7, returns=2)
        assert value == 7
        assert type(reference).__name__ == "ObjectRef"
        assert (await reference == 7).all()

    with_fleet(body)


def test_a_call_whose_actor_is_killed_is_answered_by_another_and_the_lost_one_comes_back_prepared(
    tmp_path: Path,
) -> None:
    async def body(fleet: Fleet, events: list[tuple[str, dict[str, Any]]]) -> None:
        prepared, gate = [], tmp_path / "gate"

        async def prepare(handle: Any) -> None:
            prepared.append(await handle.load.remote(5))

        fleet.prepare = prepare
        before = await fleet.call_each("process")
        call = asyncio.create_task(fleet.call("hold", gate))
        await until(lambda: begun(gate))
        [victim] = [i for i, r in enumerate(fleet.replicas) if r.under_way]
        assert begun(gate) == [before[victim]]
        os.kill(before[victim], signal.SIGKILL)
        await until(lambda: before[1 - victim] in begun(gate))
        gate.touch()
        assert await call == before[1 - victim]
        await until(lambda: all(r.alive for r in fleet.replicas))
        after = await fleet.call_each("process")
        assert after[1 - victim] == before[1 - victim]
        assert prepared == [after[victim]] and after[victim] not in before
        assert (await fleet.call_each("seen"))[victim] == 5
        assert fleet.restarts == 1
        kinds = [kind for kind, _ in events]
        assert kinds == ["actor_started"] * 2 + ["actor_died", "actor_started", "actor_restarted"]
        died = next(fields for kind, fields in events if kind == "actor_died")
        assert died["actor"] == f"worker-{victim}" and died["cause"]
        started = next(fields for kind, fields in events if kind == "actor_started")
        assert list(started["phases"]) == ["process", BUILDS] and started["phases"]["process"] > 0

    with_fleet(body, replicas=2)


def test_a_call_waits_for_the_replacement_where_there_is_no_other_replica(tmp_path: Path) -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        process, gate = await fleet.call("process"), tmp_path / "gate"
        call = asyncio.create_task(fleet.call("hold", gate))
        await until(lambda: begun(gate))
        os.kill(process, signal.SIGKILL)
        await until(lambda: len(begun(gate)) == 2)
        gate.touch()
        assert await call != process

    with_fleet(body)


def test_a_replica_that_dies_under_a_call_to_each_is_left_out_and_replaced() -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        before = await fleet.call_each("process")
        os.kill(before[0], signal.SIGKILL)
        assert before[1] in await fleet.call_each("process")
        await until(lambda: all(r.alive for r in fleet.replicas))
        assert len(await fleet.call_each("process")) == 2

    with_fleet(body, replicas=2)


def test_a_value_that_a_killed_actor_returned_can_still_be_read() -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        process, (_, reference) = await fleet.call("process"), await fleet.call("pair", 3, returns=2)
        [streamed] = await fleet.stream("parts", 2)
        os.kill(process, signal.SIGKILL)
        assert await fleet.call("process") != process
        assert (await reference == 3).all()
        assert [int((await part)[0]) for part in streamed] == [0, 1]

    with_fleet(body)


def test_a_stream_gives_references_in_order() -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        [references] = await fleet.stream("parts", 6)
        assert [int((await reference)[0]) for reference in references] == list(range(6))

    with_fleet(body)


@pytest.mark.parametrize(("kind", "error"), [("user", UserError), ("campaign", CampaignError)])
def test_our_own_errors_arrive_from_a_method_as_they_are(kind: str, error: type[Exception]) -> None:
    async def body(fleet: Fleet, events: list[Any]) -> None:
        with pytest.raises(error) as caught:
            await fleet.call("fail", kind)
        assert type(caught.value) is error
        assert str(caught.value) in ("a.key: found this, expected that", "it broke")
        assert await fleet.call("process"), "the actor lives on"
        assert len(events) == 1

    with_fleet(body)


def test_a_defect_in_a_method_costs_two_actors_and_is_an_error_with_its_cause() -> None:
    async def body(fleet: Fleet, events: list[tuple[str, dict[str, Any]]]) -> None:
        with pytest.raises(ActorFaultError, match="fail failed: ZeroDivisionError: a defect") as caught:
            await fleet.call("fail", "defect")
        assert "in fail" in str(caught.value.__cause__)
        [(_, failed)] = [event for event in events if event[0] == "actor_failed"]
        assert failed["cause"] == "fail failed: ZeroDivisionError: a defect"
        assert await fleet.call("process")

    with_fleet(body)


def test_a_call_that_ends_each_process_is_told_with_the_last_error_in_its_log() -> None:
    async def body(fleet: Fleet, events: list[tuple[str, dict[str, Any]]]) -> None:
        told = "The last error in its log: RuntimeError: Unsupported head_dim: 40"
        with pytest.raises(
            CampaignError, match=rf"^dies_of: 3 actors of worker died of the same first call: .*{told}$"
        ):
            await fleet.call("dies_of", "RuntimeError: Unsupported head_dim: 40")
        causes = [fields["cause"] for kind, fields in events if kind == "actor_died"]
        assert len(causes) == 3 and all(cause.endswith(told) for cause in causes)

    with_fleet(body, max_restarts=9)


def test_what_fails_on_one_actor_is_done_by_another(tmp_path: Path) -> None:
    async def body(fleet: Fleet, events: list[tuple[str, dict[str, Any]]]) -> None:
        before = await fleet.call_each("process")
        done = await fleet.call("fails_the_first", str(tmp_path), 1, ZeroDivisionError)
        failed = int((tmp_path / "failures").read_text().split()[0])
        assert failed in before and done in before and done != failed
        await until(lambda: all(r.alive for r in fleet.replicas))
        assert failed not in await fleet.call_each("process")

    with_fleet(body, replicas=2)


def test_a_full_store_is_waited_for_and_costs_no_actor(tmp_path: Path) -> None:
    async def body(fleet: Fleet, events: list[tuple[str, dict[str, Any]]]) -> None:
        before = await fleet.call("process")
        assert await fleet.call("fails_the_first", str(tmp_path), 2, OutOfDiskError) == before
        assert [kind for kind, _ in events] == ["actor_started", "object_store_full"]
        fleet._hang_timeout = 1.5
        with pytest.raises(StoreFullError, match="OutOfDiskError: a fault"):
            await fleet.call("fails_the_first", str(tmp_path), 100, OutOfDiskError)

    with_fleet(body)


@pytest.mark.parametrize("at_work", [False, True])
def test_an_actor_that_is_stopped_is_killed_and_replaced_and_its_work_done_by_another(
    at_work: bool, tmp_path: Path
) -> None:
    async def body(fleet: Fleet, events: list[tuple[str, dict[str, Any]]]) -> None:
        before, gate = await fleet.call_each("process"), tmp_path / "gate"
        call = asyncio.create_task(fleet.call("hold", gate)) if at_work else None
        await until(lambda: len(begun(gate)) == at_work)
        [victim, *_] = [i for i, r in enumerate(fleet.replicas) if r.calls or not at_work]
        os.kill(before[victim], signal.SIGSTOP)
        await until(lambda: fleet.replicas[victim].restarts == 1 and fleet.replicas[victim].alive)
        gate.touch()
        if call:
            assert await call == before[1 - victim]
        [(_, hung)] = [event for event in events if event[0] == "actor_hung"]
        assert hung["actor"] == f"worker-{victim}" and "has not answered for 6 s" in hung["cause"]
        await until(lambda: not Path(f"/proc/{before[victim]}").exists())
        assert before[1 - victim] in await fleet.call_each("process"), "the other one was left alone"

    with_fleet(body, replicas=2, hang_timeout=BUSY_SECONDS)


def test_an_actor_at_work_without_progress_is_replaced_and_one_with_progress_is_not() -> None:
    async def body(fleet: Fleet, events: list[tuple[str, dict[str, Any]]]) -> None:
        assert await fleet.call("slow", 25) and not [event for event in events if event[0] == "actor_hung"]
        await asyncio.sleep(BUSY_SECONDS + 1)
        assert not [event for event in events if event[0] == "actor_hung"], "what is idle need not progress"
        call = asyncio.create_task(fleet.call("stuck"))
        await until(lambda: any(event[0] == "actor_hung" for event in events))
        [cause] = [fields["cause"] for kind, fields in events if kind == "actor_hung"]
        assert cause == "it has made no progress for 6 s (ray.hang_timeout_seconds)"
        call.cancel()

    with_fleet(body, hang_timeout=BUSY_SECONDS)


def test_an_actor_that_dies_idle_is_replaced_before_anybody_calls_it() -> None:
    async def body(fleet: Fleet, events: list[tuple[str, dict[str, Any]]]) -> None:
        os.kill(await fleet.call("process"), signal.SIGKILL)
        await until(lambda: fleet.replicas[0].restarts == 1 and fleet.replicas[0].alive)
        assert [kind for kind, _ in events] == ["actor_started", "actor_died", "actor_started", "actor_restarted"]

    with_fleet(body, hang_timeout=BUSY_SECONDS)


def test_a_fleet_of_one_that_hangs_and_is_not_replaced_is_lost() -> None:
    async def body(fleet: Fleet, events: list[tuple[str, dict[str, Any]]]) -> None:
        call = asyncio.create_task(fleet.call("process", 1000))
        with pytest.raises(
            LearnerLostError, match=r"worker-0 hangs: it has (made no progress|not answered) for 1\.5 s"
        ):
            await fleet.watched()
        with pytest.raises(LearnerLostError, match="worker-0 hangs"):
            await call
        with pytest.raises(LearnerLostError, match="worker-0 hangs"):
            await fleet.call("process")

    with_fleet(body, max_restarts=None, hang_timeout=1.5)


def test_restarts_are_counted_within_the_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("cluster.fleet.restarts.time.monotonic", lambda: now)
    budget = Restarts(3)
    pauses = []
    for moment in (0.0, 10.0, 20.0):
        now = moment
        assert not budget.spent()
        pauses.append(budget.pause())
        budget.count()
    assert pauses == [0.0, 1.0, 2.0]
    now = 3599.0
    assert budget.spent()
    now = 3605.0
    assert not budget.spent() and budget.pause() == 0.0


@pytest.mark.parametrize(
    ("fault", "error", "line"),
    [
        ("user", UserError, "student.model: found nothing, expected a model"),
        ("campaign", CampaignError, "^worker-0 could not start: the disk is full$"),
        ("defect", CampaignError, "worker-0 could not start: .*ZeroDivisionError: a defect"),
        ("exit", CampaignError, "worker-0 could not start: "),
    ],
)
def test_an_actor_that_cannot_start_says_why(fault: str, error: type[Exception], line: str) -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        with pytest.raises(error, match=line) as caught:
            await fleet.start()
        assert "\n" not in str(caught.value)

    with_fleet(body, "", fault, start=False)


def test_an_error_in_a_constructor_arrives_with_all_its_fields() -> None:
    """The message alone would be ambiguous: its fields contain the words that separate them."""

    async def body(fleet: Fleet, _: Any) -> None:
        with pytest.raises(UserError) as caught:
            await fleet.start()
        error = caught.value
        assert (error.where, error.found) == ("a: found b, expected c", "d: found e, expected f")
        assert error.expected == "g"
        assert "did you mean 'd: found e, expected g'?" in str(error)

    with_fleet(body, "", "user's words", start=False)


def test_a_process_that_dies_at_the_start_is_tried_again(tmp_path: Path) -> None:
    async def body(fleet: Fleet, events: list[tuple[str, dict[str, Any]]]) -> None:
        (tmp_path / "starts").write_text("")
        await fleet.start()
        assert await fleet.call("process")
        assert [kind for kind, _ in events] == ["start_failed", "actor_started"]

    with_fleet(body, str(tmp_path), "all but second", start=False, max_restarts=None)


def test_an_actor_that_takes_too_long_to_start_is_an_error() -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        with pytest.raises(CampaignError, match=r"worker-0 did not start within 1\.5 s \(ray\.start_timeout_seconds\)"):
            await fleet.start()

    with_fleet(body, "", "slow", timeout=1.5, start=False)


def test_the_progress_of_a_start_is_seen_while_it_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it may take longer than the limit: tests/unit/cluster/test_starts.py."""
    monkeypatch.setattr(supervision, "LOOK_SECONDS", 0.02)

    async def body(fleet: Fleet, _: Any) -> None:
        look, progress, doing = fleet._look, set(), {fleet.replicas[0].doing}

        async def looks(replicas: list[Any]) -> list[Any]:
            found = await look(replicas)
            progress.update(found[1:])  # beside the handle
            doing.add(replicas[0].doing)
            if len(progress) > 3 and len(doing) > 3:
                (tmp_path / "go").touch()
            return found

        fleet._look = looks  # type: ignore[method-assign]
        await fleet.start()
        assert {what.rpartition(" ")[0] for what in doing} == {"", "step"} and fleet.replicas[0].doing == ""
        assert await fleet.call("process")

    with_fleet(body, str(tmp_path), "steady", start=False)


def test_a_call_beside_reaches_an_actor_that_works() -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        work = asyncio.create_task(fleet.call("wait_for_note"))
        await until(lambda: fleet.replicas[0].under_way == 1)
        await fleet.call_beside("note")
        assert await work

    with_fleet(body)


def test_a_spent_restart_budget_ends_every_call_with_the_actors_name(tmp_path: Path) -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        for gate in (tmp_path / "first", tmp_path / "second"):
            process = await fleet.call("process")
            call = asyncio.create_task(fleet.call("hold", gate))
            await until(lambda gate=gate: begun(gate))
            os.kill(process, signal.SIGKILL)
            if gate.name == "first":
                await until(lambda gate=gate: len(begun(gate)) == 2)
                gate.touch()
                assert await call != process
        with pytest.raises(CampaignError, match=r"worker-0 was lost 1 times within an hour and once more \(ray"):
            await call
        with pytest.raises(CampaignError, match="worker-0 was lost"):
            await fleet.call("process")
        with pytest.raises(CampaignError, match="worker-0 was lost"):
            await fleet.room(1)

    with_fleet(body, max_restarts=1)


def test_a_replacement_that_dies_while_it_starts_is_replaced_within_the_budget(tmp_path: Path) -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        os.kill(await fleet.call("process"), signal.SIGKILL)
        with pytest.raises(CampaignError, match="worker-0"):
            await fleet.call("process")
        assert len((tmp_path / "starts").read_text().split()) == 3

    with_fleet(body, str(tmp_path), "only first", max_restarts=2)


def test_a_replacement_that_finds_the_input_at_fault_ends_the_calls_with_that(tmp_path: Path) -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        os.kill(await fleet.call("process"), signal.SIGKILL)
        with pytest.raises(UserError, match=r"student\.model: found it moved, expected a model"):
            await fleet.call("process")

    with_fleet(body, str(tmp_path), "only first user")


def test_a_replacement_that_cannot_be_prepared_ends_the_calls_and_nothing_hangs() -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        async def prepare(handle: Any) -> None:
            await handle.load.remote(-1)

        fleet.prepare = prepare
        os.kill(await fleet.call("process"), signal.SIGKILL)
        with pytest.raises(Exception, match="weights that cannot be"):
            await fleet.call("process")

    with_fleet(body)


def test_an_actor_that_hangs_while_it_is_prepared_is_an_error() -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        async def prepare(handle: Any) -> None:
            await handle.process.remote(100)

        fleet.prepare = prepare
        with pytest.raises(CampaignError, match="did not start within"):
            await fleet.start()

    with_fleet(body, timeout=3, start=False)


def test_a_fleet_that_is_not_replaced_says_that_it_is_lost() -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        with pytest.raises(LearnerLostError, match="worker-0 died"):
            await fleet.stream("parts", 3, True)
        assert not fleet.replicas[0].alive

    with_fleet(body, max_restarts=None)
    with_fleet(lost_under_a_call, max_restarts=None)


async def lost_under_a_call(fleet: Fleet, _: Any) -> None:
    process = await fleet.call("process")
    call = asyncio.create_task(fleet.call("stuck"))
    await until(lambda: fleet.replicas[0].under_way == 1)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(LearnerLostError, match="worker-0 died"):
        await call


def test_closing_ends_the_actors() -> None:
    processes: list[int] = []

    async def body(fleet: Fleet, _: Any) -> None:
        processes.extend(await fleet.call_each("process"))

    with_fleet(body, replicas=2)
    deadline = time.monotonic() + 600
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_fleet_grows_and_shrinks_and_what_leaves_finishes_its_work() -> None:
    async def body(fleet: Fleet, events: list[tuple[str, dict[str, Any]]]) -> None:
        fleet.resize(3)
        await until(lambda: all(r.alive for r in fleet.replicas))
        assert [r.name for r in fleet.replicas] == ["worker-0", "worker-1", "worker-2"]
        assert len(set(await fleet.call_each("process"))) == 3
        works = [asyncio.create_task(fleet.call("process", 1.0)) for _ in range(3)]
        await until(lambda: [r.calls for r in fleet.replicas] == [1, 1, 1])
        fleet.resize(1)
        assert len(fleet.replicas) == 1
        later = {await fleet.call("process") for _ in range(3)}
        done = set(await asyncio.gather(*works))
        assert len(done) == 3 and later < done, "what had begun was finished, and nothing new given to those that leave"
        await until(lambda: sum(kind == "actor_ended" for kind, _ in events) == 2)
        assert not [fields for kind, fields in events if kind == "actor_died"]
        fleet.resize(2)
        await until(lambda: all(r.alive for r in fleet.replicas))
        assert fleet.replicas[1].name == "worker-3", "a name is not used a second time"

    with_fleet(body)


def test_an_actor_that_cannot_join_is_told_and_the_fleet_goes_on(tmp_path: Path) -> None:
    async def body(fleet: Fleet, events: list[tuple[str, dict[str, Any]]]) -> None:
        fleet.resize(2)
        await until(lambda: any(kind == "scaling_failed" for kind, _ in events))
        assert len(fleet.replicas) == 1 and await fleet.call("process")

    with_fleet(body, str(tmp_path), "only first user")
