"""Episodes whose environment asks something that is away: they wait, and go on with the same draws. By a clock of the event loop's own."""

import asyncio
from typing import Any, ClassVar

import numpy as np
import pytest

from actors import heartbeat
from actors.config import EnvironmentConfig, SamplingConfig
from actors.environment.actor import EnvironmentActor
from actors.environment.base import AwayError, Episode
from actors.environment.continuation import Continuation
from actors.errors import AbortedError
from actors.rollout.away import Away
from actors.rollout.episodes import NO_LIMITS, Episodes
from actors.rollout.transcript import Transcript
from actors.trajectory import EpisodeCounts, Trajectories
from tests.light_campaign import LocalEnvironments
from tests.unit.actors.test_episodes import END, IDS, SEEDS, TOKENIZER, Spells, requests

HALF_AN_HOUR = EnvironmentConfig().away_timeout_seconds


class Hurried(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer when there is nothing else to do."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        timers: Any = [timer for timer in self._scheduled if not timer._cancelled]  # type: ignore[attr-defined]
        if timers and not self._ready:  # type: ignore[attr-defined]
            self.now = max(self.now, min(timer._when for timer in timers))
        super()._run_once()  # type: ignore[misc]


class Asks:
    """Two turns; asks a server for its second answer, which is away until `back`."""

    begun: ClassVar[list[tuple[float, Episode, str]]] = []
    """(time, episode, what the process says that it waits for) of each beginning."""

    def __init__(self, back: float = 0.0, only: int = -1, fails: bool = False, first: bool = False):
        self.back, self.only, self.fails, self.first, self.turn = back, only, fails, first, 0

    def _ask(self) -> None:
        if asyncio.get_running_loop().time() < self.back and self.only in (-1, self.episode.id.prompt):
            raise AwayError("http://sandbox: no answer")

    async def reset(self, record: dict, episode: Episode) -> None:
        self.episode = episode
        self.begun.append((asyncio.get_running_loop().time(), episode, heartbeat.waiting()[0]))
        if self.first:
            self._ask()

    async def step(self, message: dict) -> Any:
        self.turn += 1
        if self.turn == 1:
            return "go on", False, 0.5
        self._ask()
        if self.fails:
            raise ValueError("of another kind")
        return "", True, 0.25


def made(arguments: dict[str, Any], **settings: Any) -> Episodes:
    """With a single attempt, unless settings say otherwise."""
    Asks.begun.clear()
    config = EnvironmentConfig(name=f"{__name__}:Asks", arguments=arguments, **{"attempts": 1, **settings})
    there = LocalEnvironments([EnvironmentActor(config)])
    episodes: Any = Episodes(Spells(), config, Continuation(TOKENIZER, frozenset({END})), NO_LIMITS, there)
    episodes._away = Away(config.away_timeout_seconds, asyncio.get_running_loop().time)
    return episodes


def run(work: Any) -> Any:
    with asyncio.Runner(loop_factory=Hurried) as runner:
        return runner.run(work)


def played(
    arguments: dict[str, Any], **settings: Any
) -> tuple[Trajectories, tuple[EpisodeCounts, ...], list[Any], float]:
    """(trajectories, counts, what the engine was asked, seconds)"""

    async def play() -> Any:
        episodes = made(arguments, **settings)
        written, counts = await episodes.play(requests(), SamplingConfig(max_response_tokens=100), False)
        assert heartbeat.waiting() == ("", 0.0) and not episodes._away._waiting
        return written, counts, episodes._engine.asked, asyncio.get_running_loop().time()

    return run(play())


@pytest.mark.parametrize("first", [False, True])
def test_an_episode_waits_for_what_is_away_and_goes_on_with_the_same_draws(first: bool) -> None:
    """Longer than an attempt may take, which would be its only one."""
    calm, _, asked, _ = played({})
    outage = 1200.0
    written, counts, again, seconds = played({"back": outage, "first": first})
    for name in ("response_tokens", "response_offsets", "behaviour_logprobs", "trained", "rewards", "finish_reasons"):
        assert np.array_equal(getattr(written, name), getattr(calm, name)), name
    assert [one.failed for one in counts] == ["", ""] and all(one in asked for one in again)
    assert outage <= seconds <= outage + heartbeat.LONGEST_WAIT_SECONDS
    for id_, seed, count in zip(IDS, SEEDS, counts, strict=True):
        times, begun, told = zip(*[one for one in Asks.begun if one[1].id == id_], strict=True)
        assert [(one.seed, one.attempt) for one in begun] == [(seed, attempt) for attempt in range(len(begun))]
        pauses = np.diff(times)
        assert pauses[0] == heartbeat.FIRST_WAIT_SECONDS and pauses.max() == heartbeat.LONGEST_WAIT_SECONDS
        assert (np.diff(pauses) >= 0).all() and len(begun) < 60
        assert all("AwayError: http://sandbox: no answer" in one for one in told[1:])
        assert count.retries == len(begun) - 1 and count.waited_seconds >= outage


def test_a_short_outage_costs_little_more_than_itself() -> None:
    assert played({"back": 4.0})[3] <= 6.0


def test_what_is_away_for_too_long_fails_and_later_episodes_do_not_wait_anew() -> None:
    async def play() -> None:
        episodes = made({"back": 9e9}, attempts=3)
        loop, sampling = asyncio.get_running_loop(), SamplingConfig(max_response_tokens=100)
        _, counts = await episodes.play(requests(), sampling, False)
        assert loop.time() == pytest.approx(HALF_AN_HOUR, abs=1.0)
        assert all("AwayError: http://sandbox" in one.failed for one in counts)
        ended = loop.time()
        _, counts = await episodes.play(requests(), sampling, False)
        assert loop.time() == ended and all(one.failed for one in counts)
        assert [episode.attempt for _, episode, _ in Asks.begun[-6:]] == [0, 0, 1, 1, 2, 2]

    run(play())


def test_other_episodes_go_on_and_what_fails_otherwise_counts_as_ever() -> None:
    async def play() -> None:
        episodes = made({"back": 100.0, "only": IDS[1][1], "fails": True}, attempts=2)
        await episodes.play(requests(), SamplingConfig(max_response_tokens=100), False)
        first = [time for time, episode, _ in Asks.begun if episode.id == IDS[0]]
        assert first == [0.0, 0.0], "two attempts that have failed, while the other episode waits"
        second = [time for time, episode, _ in Asks.begun if episode.id == IDS[1]]
        assert sum(time >= 100.0 for time in second) == 2 < len(second)

    run(play())


def test_an_episode_that_is_given_up_while_it_waits_ends_at_once() -> None:
    async def play() -> None:
        episodes = made({"back": 9e9})
        call = asyncio.create_task(episodes.play(requests(), SamplingConfig(max_response_tokens=100), False))
        while not heartbeat.waiting()[0]:
            await asyncio.sleep(0)
        before = asyncio.get_running_loop().time()
        await asyncio.sleep(300.0)
        assert episodes.thinking._asking == 2 and not episodes.thinking._writing, (
            "the engine is told apart from a busy one"
        )
        episodes.abort()
        with pytest.raises(AbortedError):
            await call
        assert asyncio.get_running_loop().time() == before + 300.0 and heartbeat.waiting() == ("", 0.0)

    run(play())


def test_a_pause_is_no_hang() -> None:
    async def play() -> None:
        episodes, count, text = made({}), heartbeat.count(), Transcript()
        await episodes._wait(text, heartbeat.LONGEST_WAIT_SECONDS)
        assert heartbeat.count() >= count + 10 and text.waited == asyncio.get_running_loop().time() == 30.0

    run(play())
