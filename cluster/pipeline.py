"""Admission: how many trajectories may be under way, so that none is trained too stale. Pure.

With B trajectories an update and max_staleness K, at most (K + 1) B are charged: from the moment they are issued until
the rollout actors have loaded the weights that they helped to make. Updates take the oldest first, so a trajectory
that enters when version v is loaded is trained at the latest by the update after v + K. K = 0 is strictly on-policy:
the next prompts wait until the new weights are there.
"""

import asyncio
import itertools


class Slots:
    """Counts what is charged and what is still to be issued; `acquire` waits, `release` lets the next one in."""

    def __init__(self, trajectories_per_update: int, max_staleness: int, to_issue: int):
        """to_issue: trajectories that the campaign still needs, all its remaining updates together."""
        self.capacity = (max_staleness + 1) * trajectories_per_update
        self.charged = 0
        self.to_issue = to_issue
        self._changed = asyncio.Condition()

    async def acquire(self, count: int) -> None:
        """Waits until `count` more trajectories may be issued, and charges them; for ever, once no more are needed."""
        if count > self.capacity:
            raise ValueError(f"{count} slots asked of {self.capacity}")
        async with self._changed:
            await self._changed.wait_for(lambda: self.charged + count <= self.capacity and count <= self.to_issue)
            self.charged += count
            self.to_issue -= count

    async def release(self, count: int, *, replace: bool = False) -> None:
        """`count` trajectories were trained and their weights loaded, or were dropped, and others must replace them."""
        async with self._changed:
            self.charged -= count
            self.to_issue += count if replace else 0
            assert self.charged >= 0, "more slots released than charged"
            self._changed.notify_all()


def too_stale(oldest_version: int, learner_version: int, max_staleness: int) -> bool:
    """Whether training now, with the learner at `learner_version`, would break the bound for this token."""
    return learner_version - oldest_version > max_staleness


def split_evenly(count: int, parts: int) -> list[range]:
    """0 … count-1 in at most `parts` consecutive ranges, none empty, sizes within one of each other."""
    parts = max(1, min(parts, count))
    edges = [count * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]
