"""What bounds the staleness: slots, trajectories in flight, and the order of updates."""

import asyncio
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.trajectory import TrajectoryId
from cluster.loop.staleness import InFlight, ReadyToTrain, Slots, too_stale
from cluster.loop.work import Issued, Sampled, Scored, split_evenly, trajectories_of


async def is_blocked(waiting: asyncio.Task) -> bool:
    for _ in range(10):
        await asyncio.sleep(0)
    return not waiting.done()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(0, 4), st.integers(1, 6), st.integers(0, 2**32))
def test_a_random_schedule_never_exceeds_the_capacity_and_issues_what_is_needed(
    size: int, staleness: int, updates: int, seed: int
) -> None:
    draw = random.Random(seed)

    async def schedule() -> None:
        slots = Slots(size, staleness, size * updates)
        issued = dropped = trained = 0
        ready: asyncio.Queue[None] = asyncio.Queue()

        async def issue() -> None:
            nonlocal issued
            while True:
                await slots.acquire(1)
                issued += 1
                assert 0 < slots.charged <= slots.capacity == (staleness + 1) * size
                for _ in range(draw.randrange(3)):
                    await asyncio.sleep(0)
                ready.put_nowait(None)

        async def train() -> None:
            nonlocal dropped, trained
            for _ in range(updates):
                have = 0
                while have < size:
                    await ready.get()
                    if draw.random() < 0.2:
                        dropped += 1
                        slots.release(1, replace=True)
                    else:
                        have += 1
                trained += have
                slots.release(have)

        issuers = [asyncio.create_task(issue()) for _ in range(3)]
        await asyncio.wait_for(train(), 600)
        for task in issuers:
            assert await is_blocked(task)
            task.cancel()
        assert trained == size * updates
        assert issued == trained + dropped
        assert slots.charged == slots.to_issue == 0

    asyncio.run(schedule())


def test_acquire_waits_for_room_and_release_gives_it() -> None:
    async def schedule() -> None:
        slots = Slots(4, 1, 100)
        await slots.acquire(8)
        waiting = asyncio.create_task(slots.acquire(4))
        assert await is_blocked(waiting)
        slots.release(3)
        assert await is_blocked(waiting)
        slots.release(1)
        await asyncio.wait_for(waiting, 600)
        assert slots.charged == 8

    asyncio.run(schedule())


def test_acquire_waits_once_nothing_more_is_needed_and_a_replacement_lets_it_on() -> None:
    async def schedule() -> None:
        slots = Slots(2, 3, 4)
        await slots.acquire(2)
        await slots.acquire(2)
        waiting = asyncio.create_task(slots.acquire(1))
        slots.release(2)
        assert await is_blocked(waiting)
        slots.release(1, replace=True)
        await asyncio.wait_for(waiting, 600)
        assert (slots.charged, slots.to_issue) == (2, 0)

    asyncio.run(schedule())


def test_more_than_can_ever_fit_and_more_than_was_charged_are_defects() -> None:
    async def schedule() -> None:
        slots = Slots(2, 0, 4)
        with pytest.raises(ValueError, match="3 slots asked of 2"):
            await slots.acquire(3)
        with pytest.raises(AssertionError):
            slots.release(1)

    asyncio.run(schedule())


@given(st.integers(0, 10), st.integers(0, 10), st.integers(0, 4))
def test_too_stale_is_more_than_the_bound(version: int, behind: int, bound: int) -> None:
    assert too_stale(version, version + behind, bound) == (behind > bound)


@given(st.integers(0, 200), st.integers(0, 20))
def test_split_evenly_is_a_balanced_partition_in_order(count: int, parts: int) -> None:
    ranges = split_evenly(count, parts)
    assert [i for part in ranges for i in part] == list(range(count))
    sizes = [len(part) for part in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert len(ranges) == max(1, min(parts, count))
    assert count == 0 or min(sizes) > 0


def issued(*numbers: int) -> Issued:
    return Issued(list(numbers), np.array([(0, number, 0) for number in numbers]))


def scored(numbers: list[int], oldest_versions: list[int]) -> list[Scored]:
    """Trajectories that were sampled together, and scored together."""
    trajectories, scores = f"trajectories {numbers}", (f"scores {numbers}",)
    return [
        Scored(Sampled(number, TrajectoryId(0, number, 0), trajectories, 0, 3, version, False), scores, 0)
        for number, version in zip(numbers, oldest_versions, strict=True)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_updates_take_the_oldest_whoever_brought_it_and_each_once(seed: int) -> None:
    draw, ready = random.Random(seed), ReadyToTrain(max_staleness=2)
    versions = [draw.randrange(4) for _ in range(60)]
    there, taken, given_up, left = set(), [], [], list(range(60))
    draw.shuffle(left)
    learner = 0
    while left or len(ready) >= 5:
        if left and draw.random() < 0.7:
            mine = [left.pop() for _ in range(min(len(left), draw.randint(1, 4)))]
            stale = ready.add(scored(mine, [versions[number] for number in mine]), learner)
            assert set(stale) == {number for number in mine if learner - versions[number] > 2}
            given_up += stale
            there |= set(mine) - set(stale)
        elif len(ready) >= 5:
            update = ready.take(5)
            numbers = [one.sampled.number for one in update]
            assert numbers == sorted(sorted(there, key=lambda number: (versions[number], number))[:5])
            assert [one.sampled.id.prompt for one in update] == numbers
            assert [one.sampled.oldest_version for one in update] == [versions[number] for number in numbers]
            references = trajectories_of(one.sampled for one in update)
            assert len(set(references)) == len(references) == len({one.scores for one in update})
            there -= set(numbers)
            taken += numbers
            learner += 1
            stale = ready.age(learner)
            assert set(stale) == {number for number in there if learner - versions[number] > 2}
            there -= set(stale)
            given_up += stale
        assert len(ready) == len(there)
    assert sorted([*taken, *given_up, *there]) == list(range(60))


def test_what_could_not_be_trained_any_more_is_cut_and_its_late_answer_is_not_wanted() -> None:
    in_flight = InFlight()
    slow, new = issued(0, 1), issued(2)
    in_flight.begin(slow, 3)
    in_flight.begin(new, 4)
    assert (len(in_flight), in_flight.stragglers(4), in_flight.stragglers(5)) == (3, 2, 3)
    assert in_flight.cut(4, 1) == []
    assert in_flight.cut(5, 1) == [slow]
    assert in_flight.end(new) and not in_flight.end(slow)
    assert len(in_flight) == 0


def test_the_pause_is_a_share_of_the_time_of_the_answers_that_were_wanted() -> None:
    now = 0.0
    in_flight = InFlight(clock=lambda: now)
    assert in_flight.pause.seconds == 0
    first, late, slow = issued(0), issued(1), issued(2)
    in_flight.begin(first, 0)
    in_flight.begin(late, 0)
    now = 8.0
    assert in_flight.end(first) and in_flight.pause.seconds == 8 / 16
    assert in_flight.cut(5, 1) == [late]
    now = 1000.0
    assert not in_flight.end(late) and in_flight.pause.seconds == 8 / 16
    in_flight.begin(slow, 5)
    now = 1e6
    assert in_flight.end(slow) and in_flight.pause.seconds == 1, "never longer"


def test_the_load_of_an_actor_is_what_responses_were_long_before() -> None:
    in_flight = InFlight()
    assert in_flight.expected_tokens(10, 4) == 14
    in_flight.count([30, 30])
    in_flight.count([60])
    assert in_flight.expected_tokens(10, 4) == 10 + 4 * 40


def test_lent_slots_let_more_in_and_are_not_lent_for_ever() -> None:
    async def schedule() -> None:
        slots = Slots(4, 1, 100)
        await slots.acquire(8)
        assert not slots.has_room(1)
        slots.lend(2)
        assert await slots.acquire(2) == 2
        assert not slots.has_room(1)
        slots.lend(0)
        slots.release(2)
        assert not slots.has_room(1)
        slots.release(1)
        assert slots.has_room(1)

    asyncio.run(schedule())
