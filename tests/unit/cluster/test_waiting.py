"""Waiting for something to change."""

import asyncio

from cluster.fleet.changes import Changes


def test_all_who_wait_look_again_once_for_all_changes_of_a_turn() -> None:
    async def scenario() -> None:
        changes, looks, free = Changes(), [0, 0], False

        def look(place: int) -> bool:
            looks[place] += 1
            return free

        waiting = [asyncio.create_task(changes.wait_for(lambda place=place: look(place))) for place in (0, 1)]
        await asyncio.sleep(0)
        assert looks == [1, 1]
        for _ in range(3):
            changes.tell()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert looks == [2, 2] and not any(one.done() for one in waiting)
        waiting[0].cancel()
        free = True
        changes.tell()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert waiting[0].cancelled() and not waiting[1].cancelled()
        assert not changes._waiting, "nothing of a campaign of many updates stays"

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_nobody_comes_between_the_last_look_and_the_next_step() -> None:
    async def scenario() -> None:
        changes, left, most = Changes(), 0, 0

        async def take() -> None:
            nonlocal left, most
            await changes.wait_for(lambda: left)
            left -= 1
            most = min(most, left)

        waiting = [asyncio.create_task(take()) for _ in range(5)]
        await asyncio.sleep(0)
        for _ in range(5):
            left += 1
            changes.tell()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)
        assert left == 0 == most

    asyncio.run(asyncio.wait_for(scenario(), 60))
