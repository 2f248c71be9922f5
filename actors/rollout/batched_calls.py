"""Many requests in one call to an actor, and their answers in another: what a call costs is shared by all that it carries."""

import asyncio
import traceback
from collections import defaultdict

import numpy as np

from actors.errors import ActorFaultError, CampaignError, UserError
from actors.trajectory import Requests, RolloutCounts, Trajectories, select_trajectories

Answer = RolloutCounts | Exception
"""To one request: what is to be known of its trajectories, or why there are none."""


class Box:
    """Answers that have not arrived yet, in the order in which they came."""

    def __init__(self) -> None:
        self._answers: list[tuple[int, Answer, Trajectories | None]] = []
        self._sent = 0
        self._filled = asyncio.Event()

    def put(self, number: int, answer: Answer, written: Trajectories | None) -> None:
        """To the request of this number."""
        self._answers.append((number, answer, written))
        self._filled.set()

    def clear(self) -> None:
        """As if there had been none."""
        self._answers, self._sent = [], 0

    async def take(self, again: bool) -> tuple[list[tuple[int, Answer]], Trajectories | None]:
        """All of them, as soon as there is one. again: what was sent last has not arrived, and is sent once more."""
        del self._answers[: 0 if again else self._sent]
        while not self._answers:
            self._filled.clear()
            await self._filled.wait()
        self._sent = len(self._answers)
        written = [one for *_, one in self._answers if one is not None]
        return [(number, answer) for number, answer, _ in self._answers], joined(written)


class Answering:
    """Mixed into an actor whose coroutine `generate` answers requests."""

    def __init__(self) -> None:
        self._boxes: defaultdict[str, Box] = defaultdict(Box)
        self._writing: set[asyncio.Task] = set()

    async def generate(self, requests: Requests) -> tuple[RolloutCounts, Trajectories]:
        """Samples every request."""
        raise NotImplementedError

    async def post(self, box: str, asked: list[tuple[int, Requests]]) -> None:
        """Begins to answer these, each under its number, for whoever takes from this box."""
        for number, requests in asked:
            task = asyncio.create_task(self._answer(self._boxes[box], number, requests))
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)

    async def take(self, box: str, again: bool) -> tuple[list[tuple[int, Answer]], Trajectories | None]:
        """The answers that are there, by number, and their trajectories as one; waits until there is one.

        again: what was taken last has not arrived, as when the object store was full.
        """
        return await self._boxes[box].take(again)

    def forget(self) -> None:
        """Nobody wants the answers any more that have not been taken."""
        for task in self._writing:
            task.cancel()
        for box in self._boxes.values():
            box.clear()

    async def _answer(self, box: Box, number: int, requests: Requests) -> None:
        try:
            box.put(number, *await self.generate(requests))
        except (UserError, CampaignError) as error:
            box.put(number, error, None)
        except Exception as error:  # whoever asked is told, as by a call of its own
            traceback.print_exc()
            box.put(number, ActorFaultError(f"generate failed: {type(error).__name__}: {error}"), None)


def joined(written: list[Trajectories]) -> Trajectories | None:
    """One after the other; None where there are none."""
    return select_trajectories(np.concatenate([one.ids for one in written]), written) if written else None
