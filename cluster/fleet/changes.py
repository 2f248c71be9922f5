"""Wakes the coroutines that wait for something to change. For one event loop, which needs no lock."""

import asyncio
from collections.abc import Callable


class Changes:
    """What asyncio.Condition does, without its lock: however much changes in one turn of the event loop, a waiting coroutine
    looks again once."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def tell(self) -> None:
        """Something has changed."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if not one.done():  # its coroutine was cancelled
                one.set_result(None)

    async def wait(self) -> None:
        """Waits for the next change."""
        one = asyncio.get_running_loop().create_future()
        self._waiting.append(one)
        await one

    async def wait_for(self, holds: Callable[[], object]) -> None:
        """Waits until this holds; nothing else runs between the last look and the caller's next step."""
        while not holds():
            await self.wait()
