"""Admission and order: how many trajectories may be under way, and which of them an update takes. Pure.

With B trajectories an update and max_staleness K, at most (K + 1) B are charged: from the moment they are issued until
the rollout actors have loaded the weights that they helped to make. Updates take the oldest first, so a trajectory
that is issued when version v is loaded, and is not overtaken, is trained at the latest by the update after v + K.
K = 0 is strictly on-policy: the next prompts wait until the new weights are there.
"""

import asyncio
import heapq
import itertools
from collections.abc import Sequence

from cluster.loop.work import Work, gather


class Slots:
    """Counts what is charged and what is still to be issued; `acquire` waits, `release` lets the next one in."""

    def __init__(self, trajectories_per_update: int, max_staleness: int, to_issue: int):
        """to_issue: trajectories that the campaign still needs, all its remaining updates together."""
        self.capacity = (max_staleness + 1) * trajectories_per_update
        self.charged = 0
        self.lent = 0
        """Slots beyond the capacity: those that stragglers hold are lent on (`pipeline.oversample`)."""
        self.to_issue = to_issue
        self._changed = asyncio.Condition()

    def has_room(self, count: int) -> bool:
        """Whether `acquire` would return at once."""
        return self.to_issue > 0 and self.charged + min(count, self.to_issue) <= self.capacity + self.lent

    async def acquire(self, count: int) -> int:
        """Waits until `count` more trajectories may be issued, or the fewer that are still needed; charges them, and
        says how many. Waits for ever, once no more are needed."""
        if count > self.capacity:
            raise ValueError(f"{count} slots asked of {self.capacity}")
        async with self._changed:
            await self._changed.wait_for(lambda: self.has_room(count))
            count = min(count, self.to_issue)
            self.charged += count
            self.to_issue -= count
            return count

    async def release(self, count: int, *, replace: bool = False) -> None:
        """`count` trajectories were trained and their weights loaded, or were dropped, and others must replace them."""
        async with self._changed:
            self.charged -= count
            self.to_issue += count if replace else 0
            assert self.charged >= 0, "more slots released than charged"
            self._changed.notify_all()

    async def lend(self, count: int) -> None:
        """From now on `count` slots more than the capacity may be charged."""
        async with self._changed:
            self.lent = count
            self._changed.notify_all()


class Sampling:
    """Works that rollout actors have, since which version, and how long responses are."""

    def __init__(self) -> None:
        self._begun: dict[Work, int] = {}
        self._responses = self._tokens = 0

    def __len__(self) -> int:
        return sum(map(len, self._begun))

    def begin(self, work: Work, version: int) -> None:
        """An actor with the weights of `version` has got it."""
        self._begun[work] = version

    def end(self, work: Work) -> bool:
        """An actor has answered; whether anybody still wants it."""
        return self._begun.pop(work, None) is not None

    def count(self, work: Work) -> None:
        """Takes in the lengths of the responses."""
        self._responses += len(work)
        self._tokens += int(work.lengths.sum())

    def expected_tokens(self, prompt_tokens: int, responses: int) -> int:
        """Of prompts and of responses that are as long as those before: what rollout actors are balanced by."""
        return prompt_tokens + (responses * self._tokens // self._responses if self._responses else responses)

    def stragglers(self, version: int) -> int:
        """Trajectories that were begun before `version`."""
        return sum(len(work) for work, begun in self._begun.items() if begun < version)

    def cut(self, learner_version: int, max_staleness: int) -> list[Work]:
        """Those that could not be trained any more, if they ended now. They are forgotten."""
        late = [work for work, begun in self._begun.items() if too_stale(begun, learner_version, max_staleness)]
        for work in late:
            del self._begun[work]
        return late


class Scored:
    """Scored trajectories that wait for the learner, each by itself: the oldest weights first, whoever brought it."""

    def __init__(self, max_staleness: int):
        self._max_staleness = max_staleness
        self._oldest: list[tuple[int, int, Work, int]] = []
        """Heap of (version of its oldest token, number in the ledger, the work that holds it, its row there)."""

    def __len__(self) -> int:
        return len(self._oldest)

    def add(self, work: Work, learner_version: int) -> list[int]:
        """Takes in every trajectory of a work whose oldest token may still be trained; the numbers of the others."""
        stale = []
        for row, (number, version) in enumerate(zip(work.numbers, work.oldest_versions.tolist(), strict=True)):
            if too_stale(version, learner_version, self._max_staleness):
                stale.append(number)
            else:
                heapq.heappush(self._oldest, (version, number, work, row))
        return stale

    def age(self, learner_version: int) -> list[int]:
        """The learner has taken a step: gives up those that may not be trained any more, and names their numbers."""
        stale = []
        while self._oldest and too_stale(self._oldest[0][0], learner_version, self._max_staleness):
            stale.append(heapq.heappop(self._oldest)[1])
        return stale

    def take(self, count: int) -> Work:
        """The `count` oldest, as one work in the order of the ledger."""
        chosen = sorted((heapq.heappop(self._oldest)[1:] for _ in range(count)), key=lambda entry: entry[0])
        return gather([(work, row) for _, work, row in chosen])


def too_stale(oldest_version: int, learner_version: int, max_staleness: int) -> bool:
    """Whether training now, with the learner at `learner_version`, would break the bound for this token."""
    return learner_version - oldest_version > max_staleness


def staleness_histogram(staleness: Sequence[int], max_staleness: int) -> list[int]:
    """Trajectories at each staleness of their oldest token, from 0 to the bound."""
    counts = [0] * (max_staleness + 1)
    for value in staleness:
        counts[value] += 1
    return counts


def split_evenly(count: int, parts: int) -> list[range]:
    """0 … count-1 in at most `parts` consecutive ranges, none empty, sizes within one of each other."""
    parts = max(1, min(parts, count))
    edges = [count * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]
