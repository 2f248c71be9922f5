"""The ledger: which trajectories were issued, sampled, scored, trained, or dropped, and why. Pure.

Trajectories are numbered in the order in which they are issued: number = cursor * samples_per_prompt + sample. The
ledger holds one entry for each open trajectory (neither trained nor dropped) and only counts the closed ones, so it
stays small however long the campaign runs. When trajectories are closed, `on_close` is called with a row of ranges
(first number, one past the last), which the campaign appends to ledger.jsonl:

    {"step": 7, "trained": [[48, 56]]}                           trained on in update 7
    {"step": 7, "dropped": [[56, 58], [60, 62]], "reason": "stale"}   dropped after update 7
    {"step": 7, "dropped": [[59, 60]], "reason": "refused", "cause": "..."}   the same, with a cause of its own

An illegal transition is a programming error and raises RuntimeError.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any

ROLLED_BACK = "rolled_back"
"""The reason for dropping trajectories of updates that a guard has undone."""


class State(IntEnum):
    """The state of a trajectory, in the order in which it passes through them."""

    ISSUED = 1
    SAMPLED = 2
    SCORED = 3
    TRAINED = 4
    DROPPED = 5


class Ledger:
    """Checks and counts every transition: issued -> sampled -> scored -> trained.

    From any open state a trajectory may be dropped. One that was lost after sampling goes back to issued.
    """

    def __init__(self) -> None:
        self.next_number = 0
        """The number that is issued next; all below it have been issued."""
        self.trained = 0
        self.dropped: Counter[str] = Counter()
        """Reason -> trajectories."""
        self.step = 0
        """The last update that was trained."""
        self.on_close: Callable[[dict[str, Any]], None] | None = None
        """Called with a row whenever trajectories are trained or dropped."""
        self._open: dict[int, State] = {}

    def issue(self, count: int) -> range:
        """Issues `count` new trajectories; returns their numbers."""
        numbers = range(self.next_number, self.next_number + count)
        self._open.update(dict.fromkeys(numbers, State.ISSUED))
        self.next_number += count
        return numbers

    def sampled(self, numbers: Iterable[int]) -> None:
        """A rollout actor has sampled them."""
        self._move(numbers, State.ISSUED, State.SAMPLED)

    def scored(self, numbers: Iterable[int]) -> None:
        """A teacher actor has scored them."""
        self._move(numbers, State.SAMPLED, State.SCORED)

    def reopen(self, numbers: Iterable[int]) -> None:
        """Sampled or scored trajectories were lost; they are in the state issued again, to be sampled anew."""
        for number in numbers:
            if self._open.get(number) not in {State.SAMPLED, State.SCORED}:
                raise RuntimeError(f"trajectory {number} is {self._name(number)}, cannot be sampled again")
            self._open[number] = State.ISSUED

    def train(self, numbers: Sequence[int], step: int) -> None:
        """The learner has trained on them in update `step`."""
        for number in numbers:
            self._close(number, {State.SCORED})
        self.trained += len(numbers)
        self.step = step
        self._report({"step": step, "trained": ranges(numbers)})

    def drop(self, numbers: Sequence[int], reason: str, cause: str = "") -> None:
        """They will not be trained on, for this reason (`stale`, `cut`, `refused` ...). cause: in words, where it differs."""
        for number in numbers:
            self._close(number, {State.ISSUED, State.SAMPLED, State.SCORED})
        self.dropped[reason] += len(numbers)
        row = {"step": self.step, "dropped": ranges(numbers), "reason": reason}
        self._report(row | ({"cause": cause} if cause else {}))

    def rolled_back(self, then: "Ledger") -> "Ledger":
        """The ledger after the weights have gone back to the checkpoint whose ledger is `then`.

        Trajectories that were trained since then are dropped (`rolled_back`): they are no longer in the weights. Open
        ones are issued again under their old numbers.
        """
        assert then.trained <= self.trained
        ledger = Ledger.from_json(self.to_json())  # a copy with all open trajectories in the state issued
        ledger.step, ledger.trained = then.step, then.trained
        ledger.dropped[ROLLED_BACK] += self.trained - then.trained
        return ledger

    def counts(self) -> dict[str, int]:
        """State -> trajectories. `issued` is the total; the others add up to it, `waiting` are issued and not sampled."""
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
        """The numbers that are neither trained nor dropped, ascending."""
        return sorted(self._open)

    def as_known(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """A row of ledger.jsonl as this ledger, read from a checkpoint, knows it.

        None: the row was written after the checkpoint, so its trajectories are open or not issued here. A row of an
        update that was rolled back becomes a row of dropped trajectories.
        """
        spans = row.get("trained", row.get("dropped", []))
        # A number that is open here was closed after the checkpoint, and will be closed again.
        if not all(stop <= self.next_number and self._open.keys().isdisjoint(range(a, stop)) for a, stop in spans):
            return None
        if "trained" in row and row["step"] > self.step:
            return {"step": row["step"], "dropped": spans, "reason": ROLLED_BACK}
        return dict(row)

    def check_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Checks that the rows name every closed trajectory exactly once. ValueError: they do not."""
        closed = sorted(
            (span[0], span[1], kind) for row in rows for kind in ("trained", "dropped") for span in row.get(kind, [])
        )
        # Sorted by start, so any overlap shows between neighbours.
        for (_, end, _), (start, _, _) in itertools.pairwise(closed):
            if start < end:
                raise ValueError(f"trajectory {start} is there twice")
        for kind, expected in (("trained", self.trained), ("dropped", self.dropped.total())):
            found = sum(stop - start for start, stop, of_kind in closed if of_kind == kind)
            if found != expected:
                raise ValueError(f"{found} trajectories {kind}, where the checkpoint knows of {expected}")

    def to_json(self) -> dict[str, Any]:
        """The ledger for a checkpoint. Open trajectories keep only their numbers: a resumed campaign samples them again."""
        closed = self.trained + self.dropped.total()
        # Checked before it is written: a ledger that does not add up must not become the only record.
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
        """The ledger in a checkpoint; what was open is in the state issued, under its old number."""
        ledger = cls()
        ledger.next_number, ledger.trained = content["next_number"], content["trained"]
        ledger.step = content["step"]
        ledger.dropped = Counter(content["dropped"])
        ledger._open = dict.fromkeys(content["open"], State.ISSUED)
        return ledger

    def _report(self, row: dict[str, Any]) -> None:
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
    """The numbers as ascending ranges [first, one past the last]. Example: [3, 1, 2, 7] -> [[1, 4], [7, 8]]."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number:
            found[-1][1] += 1
        else:
            found.append([number, number + 1])
    return found
