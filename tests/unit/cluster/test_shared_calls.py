"""Both halves of shared calls in one process, with a handle that is a fake; with real actors in tests/integration."""

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from actors.config import EnvironmentConfig, SamplingConfig
from actors.environment.actor import EnvironmentActor
from actors.environment.base import Answer, Begun, EnvironmentLostError, Episode
from actors.environment.continuation import Continuation
from actors.environment.shared_calls import LOST_SECONDS, SharedCalls
from actors.errors import ActorFaultError
from actors.rollout.episodes import NO_LIMITS, Episodes
from cluster.fleet.ray_actor import ActorLostError
from cluster.fleet.ray_environments import RayEnvironments
from cluster.fleet.ray_shared_calls import SharedCaller
from tests.unit.actors.test_episodes import END, TOKENIZER, Spells, requests


class Elsewhere:
    """A value that the other side cannot make."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, ()


def _made() -> None:
    raise ImportError("not here")


class Steps(SharedCalls):
    """Answers with the number that it is given, where its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = [asyncio.Event() for _ in range(9)]
        self.began: list[int] = []

    async def step(self, key: int | str) -> Any:
        number = int(str(key).rpartition("/")[2])
        self.began.append(number)
        await self.gates[number].wait()
        return number

    async def at_once(self, number: int) -> int:
        return number

    async def wrong(self, how: str) -> Any:
        if how == "raises":
            raise ValueError("broken")
        if how == "exits":
            raise SystemExit(3)
        if how == "interrupts":
            raise KeyboardInterrupt
        if how == "is cancelled":
            raise asyncio.CancelledError
        return (lambda: None) if how == "no pickle" else Elsewhere()


class Handle:
    """Calls the actor as Ray would, and keeps what each exchange asks. `dies` fails those that are under way."""

    def __init__(self, actor: SharedCalls):
        self.asked: list[list[Any]] = []
        self.dies = asyncio.Event()
        self.exchange = SimpleNamespace(remote=self._exchange)
        self._actor = actor

    def _exchange(self, client: str, asked: list[Any]) -> Awaitable[Any]:
        self.asked.append(asked)
        return self._answered(client, pickle.loads(pickle.dumps(asked)))

    async def _answered(self, client: str, asked: list[Any]) -> Any:
        answers = asyncio.ensure_future(self._actor.exchange(client, asked))
        ended = asyncio.ensure_future(self.dies.wait())
        await asyncio.wait({answers, ended}, return_when=asyncio.FIRST_COMPLETED)
        if self.dies.is_set():
            raise ActorLostError("it is gone")
        ended.cancel()
        return pickle.loads(pickle.dumps(await answers))


def run(scenario: Callable[[Steps, Handle, SharedCaller], Awaitable[None]]) -> None:
    async def begin() -> None:
        actor = Steps()
        handle = Handle(actor)
        await scenario(actor, handle, SharedCaller(handle, "one"))

    asyncio.run(asyncio.wait_for(begin(), 60))


async def gathered(caller: SharedCaller, method: str, values: Any) -> list[Any]:
    return await asyncio.gather(*(caller.call(method, (value,)) for value in values), return_exceptions=True)


def test_calls_of_one_turn_share_an_exchange_and_it_brings_all_that_is_answered_at_once() -> None:
    async def scenario(actor: Steps, handle: Handle, caller: SharedCaller) -> None:
        assert await gathered(caller, "at_once", range(99)) == [*range(99)]
        assert [len(asked) for asked in handle.asked] == [99]
        assert not actor._clients and not actor._calls, "nothing is kept of a client that waits for nothing"

    run(scenario)


def test_no_answer_waits_for_a_slower_one_and_no_call_for_an_answer() -> None:
    async def scenario(actor: Steps, handle: Handle, caller: SharedCaller) -> None:
        slow = asyncio.create_task(caller.call("step", (0,)))
        while not actor.began:
            await asyncio.sleep(0)
        for number in range(1, 9):  # each while the exchange before it waits at the actor
            actor.gates[number].set()
            assert await caller.call("step", (number,)) == number
        assert not slow.done()
        actor.gates[0].set()
        assert await slow == 0
        assert len(handle.asked) <= 2 * 9, "one with each call, and one that waits for the slow answer"
        assert not actor._clients

    run(scenario)


@pytest.mark.parametrize(("turn_seconds", "pause"), [(0.08, 0.01), (8.0, 0.02)])
def test_calls_that_come_within_a_pause_go_together(
    turn_seconds: float, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eighth of the time from an answer to the episode's next call, and 20 ms at most."""
    pauses: list[float] = []
    now = 0.0
    turn, goes_on = asyncio.sleep, asyncio.Event()

    async def sleep(seconds: float) -> None:
        if seconds > 0:
            pauses.append(seconds)
            await goes_on.wait()
        await turn(0)

    async def scenario(actor: Steps, handle: Handle, caller: SharedCaller) -> None:
        nonlocal now
        caller = SharedCaller(handle, "one", lambda: now)
        for gate in actor.gates:
            gate.set()
        await caller.call("at_once", (0,))
        now = turn_seconds
        await caller.call("step", (0,))
        now *= 3
        await caller.call("at_once", (0,))  # which is no turn
        assert not pauses
        calls = []
        for number in range(1, 10):
            calls.append(asyncio.create_task(caller.call("at_once", (number,))))
            await turn(0)
        assert len(handle.asked) == 3 and pauses == [pytest.approx(pause)]
        goes_on.set()
        assert await asyncio.gather(*calls) == [*range(1, 10)]
        assert [len(asked) for asked in handle.asked] == [1, 1, 1, 9]

    monkeypatch.setattr(asyncio, "sleep", sleep)
    run(scenario)


def test_what_is_wrong_with_one_call_is_told_to_it_alone() -> None:
    async def scenario(actor: Steps, handle: Handle, caller: SharedCaller) -> None:
        told = {"raises": "wrong failed: ValueError: broken", "exits": "wrong failed: SystemExit: 3",
                "interrupts": "wrong failed: KeyboardInterrupt",
                "is cancelled": "wrong failed: CancelledError", "no pickle": "wrong failed: ",
                "no class": "its answer cannot be read: ImportError: not here"}  # fmt: skip
        calls = [gathered(caller, "wrong", told), gathered(caller, "at_once", range(9))]
        errors, answers = await asyncio.gather(*calls)
        assert answers == [*range(9)] and len(handle.asked) == 1
        for error, expected in zip(errors, told.values(), strict=True):
            assert type(error) is ActorFaultError and str(error).startswith(expected), error

    run(scenario)


def test_the_end_of_the_actor_fails_the_calls_that_it_has_got_and_no_later_ones() -> None:
    async def scenario(actor: Steps, handle: Handle, caller: SharedCaller) -> None:
        places = RayEnvironments([handle])
        calls = [asyncio.create_task(places.call(handle, "step", number)) for number in range(9)]
        while len(actor.began) < 9:
            await asyncio.sleep(0)
        handle.dies.set()
        for call in calls:
            with pytest.raises(EnvironmentLostError, match="step: its process was lost"):
                await call
        handle.dies.clear()
        assert await places.call(handle, "at_once", 5) == "/5"

    run(scenario)


def test_a_call_that_is_given_up_before_it_is_sent_is_not_sent() -> None:
    async def scenario(actor: Steps, handle: Handle, caller: SharedCaller) -> None:
        calls = [asyncio.create_task(caller.call("at_once", (number,))) for number in range(2)]
        await asyncio.sleep(0)
        calls[0].cancel()
        assert await calls[1] == 1
        assert [[one.arguments for one in asked] for asked in handle.asked] == [[(1,)]]

    run(scenario)


def test_answers_of_a_client_that_is_gone_are_forgotten_when_another_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(actor: Steps, handle: Handle, caller: SharedCaller) -> None:
        given_up = asyncio.create_task(caller.call("step", (0,)))
        while not actor.began:
            await asyncio.sleep(0)
        client = actor._clients["one"]
        client.exchanges += 1  # as when the process of its exchange has died
        actor.gates[0].set()
        client.wake.set()
        await given_up
        client.ready, client.heard = [object()], client.heard - LOST_SECONDS - 1
        assert await SharedCaller(handle, "two").call("at_once", (2,)) == 2
        assert not actor._clients

    run(scenario)


def test_the_turns_of_episodes_that_are_played_together_share_calls_to_their_environments() -> None:
    """Eight episodes of three turns are 8 (1 + 3) calls, each kind from all of them at a time. None is remembered after it."""

    class Hosts(EnvironmentActor):
        async def reset(self, key: str, episode: Episode, record: dict) -> Begun:
            self.turns = {**getattr(self, "turns", {}), key: 0}
            return Begun()

        async def step(self, key: str, *arguments: Any) -> Answer:
            self.turns[key] += 1
            return Answer("go", self.turns[key] == 3, 1.0)

    async def play() -> None:
        config = EnvironmentConfig(name="tests.guessing:Guess")
        handle = Handle(Hosts(config))
        there = RayEnvironments([handle])
        engine, write = Spells(), Continuation(TOKENIZER, frozenset({END}))
        episodes = Episodes(engine, config, write, NO_LIMITS, there)
        sampling = SamplingConfig(max_response_tokens=100)
        found = await asyncio.gather(*(episodes.play(requests(), sampling, False) for _ in range(4)))
        assert all(written.turn_counts.tolist() == [3, 3] for written, _ in found)
        assert [len(asked) for asked in handle.asked] == [8, 8, 8, 8], "an environment that is done needs no word of it"
        assert not there._callers[handle]._answered

    asyncio.run(asyncio.wait_for(play(), 60))
