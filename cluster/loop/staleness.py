"""What bounds the staleness: slots for trajectories under way, those that actors have, and those that wait for the learner.

Nothing here knows actors or files.

With B trajectories an update and `max_staleness` K, at most (K + 1) B trajectories are under way: from the moment they
are issued until the rollout actors have loaded the weights that were trained on them. Updates take the oldest first.
So a trajectory that is issued when version v is loaded, and is not overtaken, is trained at the latest by the update
after v + K. K = 0 is strictly on-policy: the next prompts wait until the new weights are loaded.
"""

import heapq
import time
from collections.abc import Callable, Iterable, Sequence

from cluster.fleet.changes import Changes
from cluster.fleet.pauses import Pause
from cluster.loop.work import Issued, Scored


class Slots:
    """Limits the trajectories under way: `acquire` waits for free slots, `release` frees them."""

    def __init__(self, trajectories_per_update: int, max_staleness: int, to_issue: int):
        """to_issue: trajectories that all remaining updates of the campaign need together."""
        self.capacity = (max_staleness + 1) * trajectories_per_update
        self.charged = 0
        """Slots that are taken."""
        self.lent = 0
        """Slots beyond the capacity, in place of those that stragglers hold (`pipeline.oversample`)."""
        self.to_issue = to_issue
        self._changed = Changes()

    def has_room(self, count: int) -> bool:
        """Whether `acquire(count)` would return at once."""
        return self.to_issue > 0 and self.charged + min(count, self.to_issue) <= self.capacity + self.lent

    async def acquire(self, count: int) -> int:
        """Waits for `count` free slots, or for the fewer that are still needed, and takes them; returns how many.

        Waits for ever once no more trajectories are needed, unless one is dropped.
        """
        if count > self.capacity:
            raise ValueError(f"{count} slots asked of {self.capacity}")
        await self._changed.wait_for(lambda: self.has_room(count))
        count = min(count, self.to_issue)  # the last group of a campaign may be smaller
        self.charged += count
        self.to_issue -= count
        return count

    def release(self, count: int, *, replace: bool = False) -> None:
        """Frees `count` slots. replace: their trajectories were dropped, and as many more are to be issued."""
        self.charged -= count
        self.to_issue += count if replace else 0
        assert self.charged >= 0, "more slots released than charged"
        self._changed.tell()

    def lend(self, count: int) -> None:
        """Sets the number of slots beyond the capacity."""
        self.lent = count
        self._changed.tell()


class InFlight:
    """The trajectories that rollout actors have, the weight version that each was begun with, and a mean length and time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._begun: dict[Issued, tuple[int, float]] = {}
        """-> (the weight version that it was begun with, when)."""
        self._clock = clock
        self.pause = Pause()
        """While which an idle teacher waits for more of what comes."""
        self._responses = self._tokens = 0

    def __len__(self) -> int:
        return sum(map(len, self._begun))

    def begin(self, issued: Issued, version: int) -> None:
        """An actor that holds the weights of `version` gets them."""
        self._begun[issued] = version, self._clock()

    def end(self, issued: Issued) -> bool:
        """An actor has answered. False: they were cut meanwhile, and the answer is not wanted."""
        if (begun := self._begun.pop(issued, None)) is None:
            return False
        self.pause.answered(self._clock() - begun[1])
        return True

    def count(self, lengths: Sequence[int]) -> None:
        """Adds response lengths, in tokens, to the mean."""
        self._responses += len(lengths)
        self._tokens += sum(lengths)

    def expected_tokens(self, prompt_tokens: int, responses: int) -> int:
        """The expected size of a call, by which rollout actors are balanced: its prompts, and responses of mean length."""
        return prompt_tokens + (responses * self._tokens // self._responses if self._responses else responses)

    def stragglers(self, version: int) -> int:
        """Trajectories that were begun with weights older than `version`."""
        return sum(len(issued) for issued, (begun, _) in self._begun.items() if begun < version)

    def cut(self, learner_version: int, max_staleness: int) -> list[Issued]:
        """Removes and returns those that would be too stale to train on even if they ended now."""
        late = [
            issued for issued, (begun, _) in self._begun.items() if too_stale(begun, learner_version, max_staleness)
        ]
        for issued in late:
            del self._begun[issued]
        return late


class ReadyToTrain:
    """Scored trajectories that wait for the learner; those with the oldest weights come first."""

    def __init__(self, max_staleness: int):
        self._max_staleness = max_staleness
        self._heap: list[tuple[int, int, Scored]] = []
        """(version of its oldest token, its number in the ledger, the trajectory)."""
        # Numbers differ, so heapq never compares two trajectories, which have no order.

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, scored: Iterable[Scored], learner_version: int) -> list[int]:
        """Takes in those that may still be trained on; returns the numbers of the others."""
        stale = []
        for one in scored:
            version, number = one.sampled.oldest_version, one.sampled.number
            if too_stale(version, learner_version, self._max_staleness):
                stale.append(number)
            else:
                heapq.heappush(self._heap, (version, number, one))
        return stale

    def age(self, learner_version: int) -> list[int]:
        """The learner has taken a step: removes those that are too stale now, and returns their numbers."""
        stale = []
        while self._heap and too_stale(self._heap[0][0], learner_version, self._max_staleness):
            stale.append(heapq.heappop(self._heap)[1])
        return stale

    def take(self, count: int) -> list[Scored]:
        """Removes the `count` oldest; returns them in the order of the ledger."""
        taken = [heapq.heappop(self._heap)[-1] for _ in range(count)]
        # Sorted, so that the minibatches of the same trajectories do not depend on which actor was faster.
        return sorted(taken, key=lambda one: one.sampled.number)


def too_stale(oldest_version: int, learner_version: int, max_staleness: int) -> bool:
    """Whether training now, with the learner at `learner_version`, would break the bound for this token."""
    return learner_version - oldest_version > max_staleness


def staleness_histogram(staleness: Sequence[int], max_staleness: int) -> list[int]:
    """Trajectories at each staleness of their oldest token, from 0 to the bound."""
    counts = [0] * (max_staleness + 1)
    for value in staleness:
        counts[value] += 1
    return counts
