"""Both halves of batched calls in one process, with a handle that is a fake; with real actors in tests/integration."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.errors import AbortedError, ActorFaultError, StoreFullError
from actors.rollout.batched_calls import BatchedCalls
from actors.trajectory import Requests, RolloutCounts, Trajectories
from cluster.fleet.pauses import LONGEST_SECONDS, Pause
from cluster.fleet.ray_batched_calls import BatchedCaller


def request(sample: int) -> Requests:
    return Requests(
        ids=np.array([[0, 0, sample]]), seeds=np.array([sample]),
        prompt_tokens=np.array([5, 6], np.int32), prompt_offsets=np.array([0, 2]),
    )  # fmt: skip


class Writer(BatchedCalls):
    """Answers a request when its gate is opened, with as many tokens as its sample says."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = [asyncio.Event() for _ in range(9)]
        self.errors: dict[int, Exception] = {}

    async def generate(self, requests: Requests) -> tuple[RolloutCounts, Trajectories]:
        sample = int(requests.ids[0, 2])
        await self.gates[sample].wait()
        if sample in self.errors:
            raise self.errors[sample]
        n = sample + 1
        return RolloutCounts(np.array([n]), np.array([0]), np.array([False]), 0.0), Trajectories(
            ids=requests.ids, prompt_tokens=requests.prompt_tokens, prompt_offsets=requests.prompt_offsets,
            response_tokens=np.full(n, sample, np.int32), response_offsets=np.array([0, n]),
            behaviour_logprobs=np.zeros(n, np.float32), policy_versions=np.zeros(n, np.int32),
            finish_reasons=np.zeros(1, np.uint8),
        )  # fmt: skip


class Handle:
    """Calls the writer as Ray would call an actor, counts the calls, and loses collected answers `lose` times."""

    def __init__(self, writer: Writer, lose: int = 0):
        self.calls: list[str] = []

        def method(name: str) -> SimpleNamespace:
            def remote(*arguments: Any) -> Any:
                self.calls.append(name)
                return asyncio.ensure_future(getattr(writer, name)(*arguments))

            def two(*arguments: Any) -> tuple[Any, Any]:
                both = remote(*arguments)

                async def part(index: int) -> Any:
                    nonlocal lose
                    found = (await both)[index]
                    if lose and index == 0:
                        lose -= 1
                        raise StoreFullError("no room")
                    return found

                return part(0), asyncio.ensure_future(part(1))

            return SimpleNamespace(remote=remote, options=lambda num_returns: SimpleNamespace(remote=two))

        self.submit, self.collect = method("submit"), method("collect")


async def patiently(do: Any) -> Any:
    while True:
        try:
            return await do()
        except StoreFullError:
            await asyncio.sleep(0)


async def check(answer: tuple[RolloutCounts, Any], sample: int) -> None:
    counts, reference = answer
    found = await reference
    [row] = np.flatnonzero(found.ids[:, 2] == sample)
    start, end = found.response_offsets[row : row + 2]
    assert counts.lengths.tolist() == [sample + 1] == [end - start]
    assert (found.response_tokens[start:end] == sample).all()


def test_requests_of_one_turn_share_a_call_and_so_do_answers_that_are_ready_together() -> None:
    async def scenario() -> None:
        writer = Writer()
        handle = Handle(writer)
        caller = BatchedCaller(handle, "one", patiently)
        asked = [asyncio.create_task(caller.generate(request(i))) for i in range(9)]
        while not handle.calls.count("collect"):
            await asyncio.sleep(0)
        assert handle.calls == ["submit", "collect"]
        for gate in writer.gates[1:]:
            gate.set()
        for sample, answer in enumerate(await asyncio.gather(*asked[1:]), 1):
            await check(answer, sample)
        assert handle.calls.count("collect") <= 4 and not asked[0].done(), "no answer waits for a slower one"
        writer.gates[0].set()
        await check(await asked[0], 0)
        assert handle.calls.count("submit") == 1

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_answers_are_collected_together_after_a_pause_of_a_share_of_the_time_that_a_request_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses, now, goes_on = [], 0.0, asyncio.Event()
    turn = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if not seconds:
            return await turn(0)
        pauses.append(seconds)
        await goes_on.wait()

    async def scenario() -> None:
        nonlocal now
        writer = Writer()
        handle = Handle(writer)
        caller = BatchedCaller(handle, "one", patiently, clock=lambda: now)
        asked = [asyncio.create_task(caller.generate(request(i))) for i in range(9)]
        while not handle.calls.count("collect"):
            await turn(0)
        now = 8.0
        writer.gates[0].set()
        await check(await asked[0], 0)
        assert pauses == [8.0 / 16] and handle.calls.count("collect") == 1
        for gate in writer.gates[1:]:
            gate.set()
        while writer._running:
            await turn(0)
        goes_on.set()
        await asyncio.gather(*asked[1:])
        assert handle.calls.count("collect") == 2, "all that were ready after the pause"

    monkeypatch.setattr(asyncio, "sleep", sleep)
    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_pause_follows_the_mean_of_many_requests_and_is_never_long() -> None:
    pause = Pause()
    assert pause.seconds == 0
    pause.answered(8.0)
    pause.answered(4.0)
    assert pause.seconds == pytest.approx((0.95 * 8 + 0.05 * 4) / 16), "one request changes the mean a little"
    for _ in range(200):
        pause.answered(1600.0)
    assert pause.seconds == LONGEST_SECONDS


def test_a_request_that_comes_when_no_other_waits_is_collected_without_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses, turn = [], asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await turn(0)

    async def scenario() -> None:
        now, writer = 0.0, Writer()
        handle = Handle(writer)
        caller = BatchedCaller(handle, "one", patiently, clock=lambda: now)
        for sample in range(3):
            asked = asyncio.create_task(caller.generate(request(sample)))
            while not writer._running:
                await turn(0)
            now += 8.0
            writer.gates[sample].set()
            await check(await asked, sample)
        assert handle.calls == 3 * ["submit", "collect"] and not pauses

    monkeypatch.setattr(asyncio, "sleep", sleep)
    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize("method", ["submit", "collect"])
def test_a_call_that_fails_fails_its_requests_and_the_next_request_is_served(method: str) -> None:
    async def scenario() -> None:
        writer = Writer()
        caller, works = BatchedCaller(Handle(writer), "one", patiently), getattr(writer, method)

        async def fails(*arguments: Any) -> None:
            raise ActorFaultError("the actor is gone")

        setattr(writer, method, fails)
        asked = [asyncio.create_task(caller.generate(request(sample))) for sample in range(2)]
        done, _ = await asyncio.wait(asked, timeout=10)
        assert [str(one.exception()) for one in done] == 2 * ["the actor is gone"]
        setattr(writer, method, works)
        for gate in writer.gates:
            gate.set()
        await check(await caller.generate(request(2)), 2)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_request_without_a_caller_is_not_waited_for() -> None:
    async def scenario() -> None:
        caller = BatchedCaller(Handle(Writer()), "one", patiently)
        asked = asyncio.create_task(caller.generate(request(0)))
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert not caller._waiting

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_requests_that_come_during_a_call_are_sent_together_in_the_next() -> None:
    async def scenario() -> None:
        writer = Writer()
        handle = Handle(writer)
        arrives, submit = asyncio.Event(), writer.submit

        async def slow(*arguments: Any) -> None:
            await arrives.wait()
            await submit(*arguments)

        writer.submit = slow  # type: ignore[method-assign]
        caller = BatchedCaller(handle, "one", patiently)
        for gate in writer.gates:
            gate.set()
        asked = []
        for sample in range(5):
            asked.append(asyncio.create_task(caller.generate(request(sample))))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        arrives.set()
        for sample, answer in enumerate(await asyncio.gather(*asked)):
            await check(answer, sample)
        assert handle.calls.count("submit") == 2

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_an_error_belongs_to_its_request_and_an_answer_without_a_caller_is_dropped() -> None:
    async def scenario() -> None:
        writer = Writer()
        caller = BatchedCaller(Handle(writer), "one", patiently)
        writer.errors = {1: AbortedError("aborted"), 2: ZeroDivisionError("a defect")}
        asked = [asyncio.create_task(caller.generate(request(i))) for i in range(4)]
        await asyncio.sleep(0)
        asked[3].cancel()
        for gate in writer.gates:
            gate.set()
        await check(await asked[0], 0)
        with pytest.raises(AbortedError):
            await asked[1]
        with pytest.raises(ActorFaultError, match="generate failed: ZeroDivisionError: a defect"):
            await asked[2]
        await check(await caller.generate(request(5)), 5)

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_answers_that_did_not_arrive_are_collected_again_and_not_generated_again() -> None:
    async def scenario() -> None:
        writer = Writer()
        caller = BatchedCaller(Handle(writer, lose=2), "one", patiently)
        for gate in writer.gates:
            gate.set()
        for sample, answer in enumerate(await asyncio.gather(*(caller.generate(request(i)) for i in range(4)))):
            await check(answer, sample)
        assert not writer._running

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_clients_of_one_actor_get_their_own_answers_and_none_after_a_discard() -> None:
    async def scenario() -> None:
        writer = Writer()
        handle = Handle(writer)
        first, second = (BatchedCaller(handle, name, patiently) for name in ("one", "two"))
        asked = [asyncio.create_task(caller.generate(request(i))) for i, caller in enumerate((first, second))]
        writer.gates[0].set()
        writer.gates[1].set()
        for sample, answer in enumerate(await asyncio.gather(*asked)):
            await check(answer, sample)
        await writer.submit("three", [(0, request(0))])  # ready, and not collected
        while writer._running:
            await asyncio.sleep(0)
        lost = asyncio.create_task(first.generate(request(2)))
        while not writer._running:
            await asyncio.sleep(0)
        writer.discard()
        writer.gates[2].set()
        await check(await first.generate(request(1)), 1)
        assert not lost.done()
        lost.cancel()
        await writer.submit("three", [(1, request(1))])
        answers, _ = await writer.collect("three", False)
        assert [number for number, _ in answers] == [1]

    asyncio.run(asyncio.wait_for(scenario(), 60))
