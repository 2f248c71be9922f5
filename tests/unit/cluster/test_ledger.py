"""Compares the ledger with a model that keeps the whole history of every trajectory."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.state.ledger import Ledger, ranges

OPEN = ("waiting", "sampled", "scored")
FOLLOWS = {"sampled": ("waiting",), "scored": ("sampled",), "train": ("scored",), "drop": OPEN}
BECOMES = {"sampled": "sampled", "scored": "scored", "train": "trained", "drop": "dropped"}


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.ledger.on_close = self.tell
        self.model: list[str] = []
        self.reasons: dict[str, int] = {}
        self.step = 0
        self.rows: list[dict] = []
        self.fates: dict[int, tuple] = {}
        self.saved: tuple | None = None

    def tell(self, row: dict) -> None:
        self.rows.append(json.loads(json.dumps(row)))

    @rule(count=st.integers(0, 5))
    def issue(self, count: int) -> None:
        assert list(self.ledger.issue(count)) == list(range(len(self.model), len(self.model) + count))
        self.model += ["waiting"] * count

    @rule(
        data=st.data(),
        action=st.sampled_from(sorted(FOLLOWS)),
        reason=st.sampled_from(["stale", "lost"]),
    )
    def move(self, data: st.DataObject, action: str, reason: str) -> None:
        number = data.draw(st.integers(0, len(self.model)))
        arguments = {"drop": ([number], reason), "train": ([number], self.step + 1)}.get(action, ([number],))
        state = self.model[number] if number < len(self.model) else "not issued"
        if state in FOLLOWS[action]:
            getattr(self.ledger, action)(*arguments)
            self.model[number] = BECOMES[action]
            self.step += action == "train"
            if action == "drop":
                self.reasons[reason] = self.reasons.get(reason, 0) + 1
                self.fates[number] = ("dropped", self.step, reason)
            if action == "train":
                self.fates[number] = ("trained", self.step, None)
        else:
            with pytest.raises(RuntimeError, match=f"trajectory {number} is"):
                getattr(self.ledger, action)(*arguments)

    @rule()
    def save(self) -> None:
        model = ["waiting" if state in OPEN else state for state in self.model]
        self.saved = (json.dumps(self.ledger.to_json()), model, dict(self.reasons), dict(self.fates), self.step)

    @precondition(lambda self: self.saved)
    @rule()
    def die_and_go_on_from_what_was_saved(self) -> None:
        content, model, reasons, fates, self.step = self.saved  # type: ignore[misc]
        self.model, self.reasons, self.fates = list(model), dict(reasons), dict(fates)
        self.ledger = Ledger.from_json(json.loads(content))
        self.ledger.on_close = self.tell
        self.fit()

    @precondition(lambda self: self.saved)
    @rule()
    def roll_back_to_what_was_saved(self) -> None:
        content, then, *_, self.step = self.saved  # type: ignore[misc]
        self.ledger = self.ledger.rolled_back(Ledger.from_json(json.loads(content)))
        for number, state in enumerate(self.model):
            if state in OPEN:
                self.model[number] = "waiting"
            elif state == "trained" and (number >= len(then) or then[number] != "trained"):
                self.model[number], (_, step, _) = "dropped", self.fates[number]
                self.fates[number] = ("dropped", step, "rolled_back")
                self.reasons["rolled_back"] = self.reasons.get("rolled_back", 0) + 1
        self.ledger.on_close = self.tell
        self.fit()
        self.save()

    def fit(self) -> None:
        self.rows = [known for row in self.rows if (known := self.ledger.as_known(row)) is not None]
        self.ledger.check_rows(self.rows)

    @invariant()
    def counts_are_those_of_the_model_and_add_up(self) -> None:
        counts = self.ledger.counts()
        states = (*OPEN, "trained", "dropped")
        assert counts == {"issued": len(self.model)} | {state: self.model.count(state) for state in states}
        assert counts["issued"] == sum(counts[state] for state in states)
        assert {reason: count for reason, count in self.ledger.dropped.items() if count} == self.reasons

    @invariant()
    def what_was_told_is_the_fate_of_every_closed_number(self) -> None:
        told = [
            (number, (kind, row["step"], row.get("reason")))
            for row in self.rows
            for kind in ("trained", "dropped")
            for start, stop in row.get(kind, [])
            for number in range(start, stop)
        ]
        assert len(told) == len(self.fates) and dict(told) == self.fates

    @invariant()
    def what_is_open_is_known_by_number(self) -> None:
        assert self.ledger.open_numbers() == [i for i, state in enumerate(self.model) if state in OPEN]


TestLedger = Life.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_number_is_trained_once_only() -> None:
    ledger = Ledger()
    numbers = ledger.issue(2)
    ledger.sampled(numbers)
    ledger.scored(numbers)
    ledger.train(numbers, 1)
    for again in (ledger.sampled, ledger.scored, lambda n: ledger.train(n, 2), lambda n: ledger.drop(n, "stale")):
        with pytest.raises(RuntimeError, match="closed already"):
            again([0])
    assert ledger.trained == 2


def test_a_reopened_ledger_issues_no_old_number_anew() -> None:
    ledger = Ledger()
    ledger.sampled(ledger.issue(3))
    ledger.drop([1], "stale")
    again = Ledger.from_json(ledger.to_json())
    assert again.open_numbers() == [0, 2]
    assert list(again.issue(2)) == [3, 4]
    again.sampled([0, 2, 3, 4])
    assert again.to_json()["dropped"] == {"stale": 1}


@given(st.sets(st.integers(0, 60)))
def test_ranges_hold_the_numbers_and_nothing_else(numbers: set[int]) -> None:
    found = ranges(numbers)
    assert [number for start, stop in found for number in range(start, stop)] == sorted(numbers)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(found))


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"step": 1, "trained": [[0, 2]]}], "2 trajectories trained, where the checkpoint knows of 3"),
        ([{"step": 1, "trained": [[0, 2], [1, 2]]}], "trajectory 1 is there twice"),
        ([{"step": 1, "trained": [[0, 3]]}], "0 trajectories dropped, where the checkpoint knows of 1"),
    ],
)
def test_rows_that_do_not_add_up_are_refused(rows: list[dict], what: str) -> None:
    ledger = Ledger()
    ledger.sampled(ledger.issue(5))
    ledger.scored(range(5))
    ledger.train(range(3), 1)
    ledger.drop([3], "stale")
    with pytest.raises(ValueError, match=what):
        ledger.check_rows(rows)
    ledger.check_rows([{"step": 1, "trained": [[0, 3]]}, {"step": 1, "dropped": [[3, 4]], "reason": "stale"}])


def test_a_ledger_that_does_not_add_up_is_not_saved() -> None:
    ledger = Ledger()
    ledger.issue(3)
    ledger.trained += 1
    with pytest.raises(RuntimeError, match="3 issued, but 1 closed and 3 open"):
        ledger.to_json()
