"""What fails the same way at the first step of each start ends the campaign soon, with its cause. No Ray."""

from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from actors.errors import CampaignError, EngineError, WeightError
from cluster.fleet.ray_actor import ActorLostError, errors_of
from cluster.fleet.ray_fleet import Fleet
from cluster.fleet.restarts import Restarts
from tests.actors_of_this_process import Events, with_fleet


class Engine:
    """Its steps raise these, one after the other; then they work."""

    faults: list[Exception]

    async def status(self) -> dict[str, Any]:
        return {}

    async def load(self, version: int) -> int:
        return version

    async def generate(self) -> str:
        if self.faults:
            raise self.faults.pop(0)
        return "written"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Restarts, "pause", lambda _: 0.0)


def engine(*faults: Exception) -> type[Engine]:
    return type("Engine", (Engine,), {"faults": list(faults)})


def failed(cause: str) -> EngineError:
    return EngineError(f"the vLLM engine has failed: RuntimeError: {cause}")


def causes(events: Events) -> list[str]:
    return [fields["cause"] for kind, fields in events if kind in ("actor_failed", "actor_died")]


@pytest.mark.parametrize("replicas", [1, 2])
def test_an_engine_that_fails_in_the_same_way_in_each_first_step_is_not_tried_a_third_time(
    monkeypatch: pytest.MonkeyPatch, replicas: int
) -> None:
    async def body(fleet: Fleet, events: Events) -> None:
        with pytest.raises(
            EngineError, match=r"^worker-\d: the vLLM .*: Unsupported head_dim: 40; another .* third time$"
        ):
            await fleet.call("generate")
        assert causes(events) == [str(failed("Unsupported head_dim: 40"))]

    faults = [failed("Unsupported head_dim: 40") for _ in range(9)]
    with_fleet(monkeypatch, engine(*faults), body, replicas=replicas)


def test_engines_that_fail_for_different_reasons_are_tried_as_often_as_processes_that_die(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(fleet: Fleet, events: Events) -> None:
        assert await fleet.call("generate") == "written" and fleet.restarts == 2
        assert causes(events) == [str(failed("out of memory")), str(failed("a device is gone"))]

    with_fleet(monkeypatch, engine(failed("out of memory"), failed("a device is gone")), body, replicas=1)


def test_a_call_that_ends_three_processes_before_any_work_was_done_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(fleet: Fleet, events: Events) -> None:
        told = r"^generate: 3 actors of worker died of the same first call: SIGSEGV$"
        with pytest.raises(CampaignError, match=told):
            await fleet.call("generate")
        assert causes(events) == ["SIGSEGV"] * 3

    with_fleet(monkeypatch, engine(*(ActorLostError("SIGSEGV") for _ in range(9))), body, replicas=1, max_restarts=9)


def test_processes_that_die_once_there_was_work_have_the_whole_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(fleet: Fleet, events: Events) -> None:
        assert await fleet.call("status") == {}  # which is no work
        assert await fleet.call("generate") == "written"
        Faulty.faults = [ActorLostError("SIGKILL") for _ in range(3)]
        assert await fleet.call("generate") == "written" and causes(events) == ["SIGKILL"] * 3

    Faulty = engine()
    with_fleet(monkeypatch, Faulty, body, replicas=1)


def test_an_actor_whose_first_weights_cannot_be_loaded_starts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(fleet: Fleet, events: Events) -> None:
        async def prepare(_: Any) -> None:
            raise WeightError("version 0 could not be loaded: KeyError: 'fused'")

        fleet.prepare = prepare
        fleet.replicas[0].handle.dead.set()
        with pytest.raises(
            CampaignError, match=r"worker-0 could not start, twice in the same way: version 0 could not"
        ):
            await fleet.watched()
        assert fleet.restarts == 2

    with_fleet(monkeypatch, engine(), body, replicas=1)


@pytest.mark.parametrize(
    "error",
    [OutOfMemoryError("Task was killed due to the node running low on memory.\nUse advice"), WorkerCrashedError()],
)
def test_a_process_that_ray_has_ended_is_a_lost_actor(error: Exception) -> None:
    with pytest.raises(ActorLostError) as lost, errors_of("generate"):
        raise error
    assert "\n" not in str(lost.value) and str(lost.value)
