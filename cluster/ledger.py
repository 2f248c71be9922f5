"""The ledger: which trajectories were issued, sampled, scored, trained, or dropped, and why. Pure.

Trajectories are numbered in the order in which they are issued: number = cursor * samples_per_prompt + sample. Only
those that are open (neither trained nor dropped) are held one by one; below them everything is closed, so the ledger
stays small however long the campaign runs. An illegal transition is a defect of ours and raises.
"""

from collections import Counter
from collections.abc import Iterable
from enum import IntEnum
from typing import Any


class State(IntEnum):
    """Where a trajectory is on its way."""

    ISSUED = 1
    SAMPLED = 2
    SCORED = 3
    TRAINED = 4
    DROPPED = 5


class Ledger:
    """Owns every transition: issued -> sampled -> scored -> trained, or dropped from any open state."""

    def __init__(self) -> None:
        self.next_number = 0
        """The first number that has not been issued."""
        self.trained = 0
        self.dropped: Counter[str] = Counter()
        """Reason -> trajectories."""
        self._open: dict[int, State] = {}

    def issue(self, count: int) -> range:
        """The next `count` numbers, now issued."""
        numbers = range(self.next_number, self.next_number + count)
        self._open.update(dict.fromkeys(numbers, State.ISSUED))
        self.next_number += count
        return numbers

    def sampled(self, numbers: Iterable[int]) -> None:
        """A rollout actor has written them."""
        self._move(numbers, State.ISSUED, State.SAMPLED)

    def scored(self, numbers: Iterable[int]) -> None:
        """A teacher actor has scored them."""
        self._move(numbers, State.SAMPLED, State.SCORED)

    def train(self, numbers: Iterable[int]) -> None:
        """The learner has taken a step on them."""
        for number in numbers:
            self._close(number, {State.SCORED})
            self.trained += 1

    def drop(self, numbers: Iterable[int], reason: str) -> None:
        """They will not be trained on, because of `reason`."""
        for number in numbers:
            self._close(number, {State.ISSUED, State.SAMPLED, State.SCORED})
            self.dropped[reason] += 1

    def counts(self) -> dict[str, int]:
        """Trajectories by state; `issued` counts all that ever were, the others add up to it."""
        states = Counter(self._open.values())
        return {
            "issued": self.next_number,
            "waiting": states[State.ISSUED],
            "sampled": states[State.SAMPLED],
            "scored": states[State.SCORED],
            "trained": self.trained,
            "dropped": self.dropped.total(),
        }

    def open_numbers(self) -> list[int]:
        """Those that are neither trained nor dropped, in order."""
        return sorted(self._open)

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint: what is open now must be sampled again when the campaign goes on from here."""
        return {
            "next_number": self.next_number,
            "trained": self.trained,
            "dropped": dict(self.dropped),
            "open": self.open_numbers(),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Ledger":
        """The ledger of a checkpoint; whatever was open is issued again under its old number."""
        ledger = cls()
        ledger.next_number, ledger.trained = content["next_number"], content["trained"]
        ledger.dropped = Counter(content["dropped"])
        ledger._open = dict.fromkeys(content["open"], State.ISSUED)
        return ledger

    def _move(self, numbers: Iterable[int], before: State, after: State) -> None:
        for number in numbers:
            if self._open.get(number) != before:
                raise RuntimeError(f"trajectory {number} is {self._name(number)}, cannot become {after.name}")
            self._open[number] = after

    def _close(self, number: int, allowed: set[State]) -> None:
        if self._open.get(number) not in allowed:
            raise RuntimeError(f"trajectory {number} is {self._name(number)}, cannot be closed")
        del self._open[number]

    def _name(self, number: int) -> str:
        if number in self._open:
            return self._open[number].name
        return "closed already" if number < self.next_number else "not issued"
