"""The ledger: which trajectories were issued, sampled, scored, trained, or dropped, and why. Pure.

Trajectories are numbered in the order in which they are issued: number = cursor * samples_per_prompt + sample. Only
those that are open (neither trained nor dropped) are held one by one; below them everything is closed, so the ledger
stays small however long the campaign runs. What became of those that are closed is told to `on_close`, which writes
it down in rows of ranges (first number, one past the last):

    {"step": 7, "trained": [[48, 56]]}                           trained on in update 7
    {"step": 7, "dropped": [[56, 58], [60, 62]], "reason": "stale"}   dropped after update 7

An illegal transition is a defect of ours and raises.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any

ROLLED_BACK = "rolled_back"
"""The reason that is given for what was trained on in updates that were undone."""


class State(IntEnum):
    """Where a trajectory is on its way."""

    ISSUED = 1
    SAMPLED = 2
    SCORED = 3
    TRAINED = 4
    DROPPED = 5


class Ledger:
    """Owns every transition: issued -> sampled -> scored -> trained, or dropped from any open state; what was
    lost is issued again."""

    def __init__(self) -> None:
        self.next_number = 0
        """The first number that has not been issued."""
        self.trained = 0
        self.dropped: Counter[str] = Counter()
        """Reason -> trajectories."""
        self.step = 0
        """The last update that has trained."""
        self.on_close: Callable[[dict[str, Any]], None] | None = None
        """Is given a row whenever trajectories are trained or dropped."""
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

    def reopen(self, numbers: Iterable[int]) -> None:
        """What was written or scored is lost: they are issued, as at first."""
        for number in numbers:
            if self._open.get(number) not in {State.SAMPLED, State.SCORED}:
                raise RuntimeError(f"trajectory {number} is {self._name(number)}, cannot be sampled again")
            self._open[number] = State.ISSUED

    def train(self, numbers: Sequence[int], step: int) -> None:
        """The learner has taken its update `step` on them."""
        for number in numbers:
            self._close(number, {State.SCORED})
        self.trained += len(numbers)
        self.step = step
        self._tell({"step": step, "trained": ranges(numbers)})

    def drop(self, numbers: Sequence[int], reason: str) -> None:
        """They will not be trained on, because of `reason`."""
        for number in numbers:
            self._close(number, {State.ISSUED, State.SAMPLED, State.SCORED})
        self.dropped[reason] += len(numbers)
        self._tell({"step": self.step, "dropped": ranges(numbers), "reason": reason})

    def rolled_back(self, then: "Ledger") -> "Ledger":
        """The ledger when the weights go back to what they were `then`: what was trained on since is dropped, and what is
        open is issued again under its old number."""
        assert then.trained <= self.trained
        ledger = Ledger.from_json(self.to_json())
        ledger.step, ledger.trained = then.step, then.trained
        ledger.dropped[ROLLED_BACK] += self.trained - then.trained
        return ledger

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

    def as_known(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """A row that was told, as it stands here: None of what came after a checkpoint, and of what was trained on in an
        update that was rolled back, that it is dropped."""
        spans = row.get("trained", row.get("dropped", []))
        if not all(stop <= self.next_number and self._open.keys().isdisjoint(range(a, stop)) for a, stop in spans):
            return None
        if "trained" in row and row["step"] > self.step:
            return {"step": row["step"], "dropped": spans, "reason": ROLLED_BACK}
        return dict(row)

    def check_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """ValueError where the rows do not say of every closed trajectory, once, what became of it."""
        told = sorted(
            (span[0], span[1], kind) for row in rows for kind in ("trained", "dropped") for span in row.get(kind, [])
        )
        for (_, end, _), (start, _, _) in itertools.pairwise(told):
            if start < end:
                raise ValueError(f"trajectory {start} is there twice")
        for kind, expected in (("trained", self.trained), ("dropped", self.dropped.total())):
            found = sum(stop - start for start, stop, own in told if own == kind)
            if found != expected:
                raise ValueError(f"{found} trajectories {kind}, where the checkpoint knows of {expected}")

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint: what is open now must be sampled again when the campaign goes on from here."""
        closed = self.trained + self.dropped.total()
        if self.next_number != closed + len(self._open):
            raise RuntimeError(f"{self.next_number} issued, but {closed} closed and {len(self._open)} open")
        return {
            "step": self.step,
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
        ledger.step = content["step"]
        ledger.dropped = Counter(content["dropped"])
        ledger._open = dict.fromkeys(content["open"], State.ISSUED)
        return ledger

    def _tell(self, row: dict[str, Any]) -> None:
        if self.on_close is not None:
            self.on_close(row)

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


def ranges(numbers: Iterable[int]) -> list[list[int]]:
    """[[first, one past the last], …], ascending. Example: [3, 1, 2, 7] -> [[1, 4], [7, 8]]."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number:
            found[-1][1] += 1
        else:
            found.append([number, number + 1])
    return found
