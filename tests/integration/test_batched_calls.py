"""Batched calls with real Ray and actors without a model: which request gets which answer, and when."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import OutOfDiskError

from actors.errors import AbortedError, ActorFaultError
from actors.rollout.batched_calls import BatchedCalls
from actors.trajectory import Requests, RolloutCounts, Trajectories
from cluster.fleet.ray_actor import Resources
from cluster.fleet.ray_fleet import Fleet

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]
ABORTED, DEFECT = 1001, 1002
FIRST, LAST = -1, -2
"""In the place of milliseconds: the request is answered when this gate is opened."""


class Writer(BatchedCalls):
    """A rollout actor without a model. The seed of a request says when it is answered: milliseconds, or a gate."""

    def __init__(self, folder: str):
        super().__init__()
        self.gates = {gate: asyncio.Event() for gate in (FIRST, LAST)}
        self.folder, self.seen = Path(folder), {"process": os.getpid(), "submits": 0, "collects": 0, "generated": 0}

    async def status(self) -> dict[str, int]:
        return self.seen

    async def open(self, gate: int) -> None:
        self.gates[gate].set()

    async def submit(self, client: str, numbered: list[tuple[int, Requests]]) -> None:
        self.seen["submits"] += 1
        await super().submit(client, numbered)

    async def collect(self, client: str, again: bool) -> Any:
        self.seen["collects"] += 1
        collected = await super().collect(client, again)
        if (full := self.folder / "full").exists():
            full.unlink()
            raise OutOfDiskError("no room for what was collected")
        return collected

    async def generate(self, requests: Requests) -> tuple[RolloutCounts, Trajectories]:
        self.seen["generated"] += 1
        when = int(requests.seeds[0])
        await (self.gates[when].wait() if when < 0 else asyncio.sleep(when / 1000))
        sample = int(requests.ids[0, 2])
        if sample == ABORTED:
            raise AbortedError("aborted")
        if sample == DEFECT:
            raise ZeroDivisionError("a defect")
        counts = RolloutCounts(np.array([sample + 1]), np.array([0]), np.array([False]), 0.0)
        return counts, Trajectories(
            ids=requests.ids,
            prompt_tokens=requests.prompt_tokens,
            prompt_offsets=requests.prompt_offsets,
            response_tokens=np.full(sample + 1, sample, np.int32),
            response_offsets=np.array([0, sample + 1]),
            behaviour_logprobs=np.zeros(sample + 1, np.float32),
            policy_versions=np.zeros(sample + 1, np.int32),
            finish_reasons=np.zeros(1, np.uint8),
        )


def request(sample: int, milliseconds: int = 0) -> Requests:
    ids, tokens = np.array([[0, 0, sample]]), np.array([5, 6], np.int32)
    return Requests(ids=ids, seeds=np.array([milliseconds]), prompt_tokens=tokens, prompt_offsets=np.array([0, 2]))


def with_fleet(folder: Path, replicas: int, body: Callable[[Fleet, list[str]], Awaitable[None]]) -> None:
    async def run() -> None:
        events: list[str] = []
        fleet = Fleet(
            "rollout", Writer, (str(folder),), {}, replicas=replicas, resources=Resources(0.1, 0.0), max_restarts=2,
            start_timeout_seconds=600.0, on_event=lambda kind, **_: events.append(kind),
        )  # fmt: skip
        try:
            async with asyncio.timeout(600):
                await fleet.start()
                await body(fleet, events)
        finally:
            fleet.close()

    asyncio.run(run())


async def until_generated(fleet: Fleet, count: int) -> None:
    """Until the only actor works on so many requests, or has done so."""
    while (await fleet.call_each("status"))[0]["generated"] < count:
        await asyncio.sleep(0.01)


async def written(answer: tuple[RolloutCounts, Any], sample: int) -> Trajectories:
    """The trajectories behind the reference of an answer. Checks those of this sample."""
    counts, reference = answer
    assert counts.lengths.tolist() == [sample + 1]
    found = await reference
    [row] = np.flatnonzero(found.ids[:, 2] == sample)
    start, end = found.response_offsets[row : row + 2]
    assert (found.response_tokens[start:end] == sample).all() and end - start == sample + 1
    return found


def test_requests_of_one_turn_share_a_call_and_so_do_answers_that_are_ready_together(tmp_path: Path) -> None:
    async def body(fleet: Fleet, _: Any) -> None:
        asked = [asyncio.create_task(fleet.ask(request(i, LAST if i == 0 else FIRST))) for i in range(9)]
        await until_generated(fleet, 9)
        await fleet.call_each("open", FIRST)
        await asyncio.gather(*asked[1:])
        assert not asked[0].done(), "none waits for a slower one"
        await fleet.call_each("open", LAST)
        answers = await asyncio.gather(*asked)
        [seen] = await fleet.call_each("status")
        assert (seen["submits"], seen["generated"]) == (1, 9) and seen["collects"] <= 4
        found = [await written(answer, sample) for sample, answer in enumerate(answers)]
        assert found[0].ids.shape == (1, 3)
        assert max(len(one.ids) for one in found) > 2 and len({answer[1] for answer in answers}) == seen["collects"]
        assert [replica.calls for replica in fleet.replicas] == [0]
        await written(await fleet.ask(request(3)), 3)

    with_fleet(tmp_path, 1, body)


def test_an_error_belongs_to_its_request_and_an_answer_without_a_caller_is_dropped(tmp_path: Path) -> None:
    async def body(fleet: Fleet, events: list[str]) -> None:
        given_up = asyncio.create_task(fleet.ask(request(1, FIRST)))
        aborted = asyncio.create_task(fleet.ask(request(ABORTED, FIRST)))
        fine = asyncio.create_task(fleet.ask(request(2, LAST)))
        await until_generated(fleet, 3)
        given_up.cancel()
        await fleet.call_each("open", FIRST)
        with pytest.raises(AbortedError):
            await aborted
        await fleet.call_each("open", LAST)
        await written(await fine, 2)
        assert [event for event in events if event not in ("waiting_for_resources", "actor_starting")] == [
            "actor_started"
        ]
        with pytest.raises(ActorFaultError, match="generate failed: ZeroDivisionError: a defect"):
            await fleet.ask(request(DEFECT))
        assert events.count("actor_failed") == 1
        await written(await fleet.ask(request(3)), 3)

    with_fleet(tmp_path, 1, body)


def test_requests_to_an_actor_that_dies_are_answered_by_another(tmp_path: Path) -> None:
    async def body(fleet: Fleet, events: list[str]) -> None:
        first = fleet.replicas[0]
        asked = [asyncio.create_task(fleet.ask(request(i, 0 if i < 2 else LAST), at=first)) for i in range(6)]
        await asyncio.gather(*asked[:2])
        os.kill(first.process, signal.SIGKILL)
        while not all(call.done() for call in asked):
            if "actor_died" in events:
                await fleet.call_each("open", LAST)
            await asyncio.sleep(0.01)
        for sample, answer in enumerate(await asyncio.gather(*asked)):
            await written(answer, sample)
        assert events.count("actor_died") == 1
        await written(await fleet.ask(request(7), at=first), 7)

    with_fleet(tmp_path, 2, body)


def test_answers_that_did_not_fit_into_the_store_are_collected_again_and_not_generated_again(tmp_path: Path) -> None:
    async def body(fleet: Fleet, events: list[str]) -> None:
        (tmp_path / "full").touch()
        asked = [asyncio.create_task(fleet.ask(request(i, 100 if i < 3 else 400))) for i in range(5)]
        for sample, answer in enumerate(await asyncio.gather(*asked)):
            await written(answer, sample)
        [seen] = await fleet.call_each("status")
        assert seen["generated"] == 5 and not (tmp_path / "full").exists()
        told = [
            event for event in events if event not in ("waiting_for_resources", "actor_starting")
        ]  # on a busy machine
        assert told == ["actor_started", "object_store_full"]

    with_fleet(tmp_path, 1, body)
