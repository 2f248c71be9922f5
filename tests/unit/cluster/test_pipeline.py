"""Admission never charges more than its capacity, and issues exactly what is needed."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.pipeline import Slots, split_evenly, too_stale


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
                        await slots.release(1, replace=True)
                    else:
                        have += 1
                trained += have
                await slots.release(have)

        issuers = [asyncio.create_task(issue()) for _ in range(3)]
        await asyncio.wait_for(train(), 10)
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
        await slots.release(3)
        assert await is_blocked(waiting)
        await slots.release(1)
        await asyncio.wait_for(waiting, 1)
        assert slots.charged == 8

    asyncio.run(schedule())


def test_acquire_waits_once_nothing_more_is_needed_and_a_replacement_lets_it_on() -> None:
    async def schedule() -> None:
        slots = Slots(2, 3, 4)
        await slots.acquire(2)
        await slots.acquire(2)
        waiting = asyncio.create_task(slots.acquire(1))
        await slots.release(2)
        assert await is_blocked(waiting)
        await slots.release(1, replace=True)
        await asyncio.wait_for(waiting, 1)
        assert (slots.charged, slots.to_issue) == (2, 0)

    asyncio.run(schedule())


def test_more_than_can_ever_fit_and_more_than_was_charged_are_defects() -> None:
    async def schedule() -> None:
        slots = Slots(2, 0, 4)
        with pytest.raises(ValueError, match="3 slots asked of 2"):
            await slots.acquire(3)
        with pytest.raises(AssertionError):
            await slots.release(1)

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
