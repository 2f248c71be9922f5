"""The ledger against a model that remembers every trajectory's whole life."""

import json

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.ledger import Ledger

OPEN = ("waiting", "sampled", "scored")
FOLLOWS = {"sampled": ("waiting",), "scored": ("sampled",), "train": ("scored",), "drop": OPEN}
BECOMES = {"sampled": "sampled", "scored": "scored", "train": "trained", "drop": "dropped"}


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.model: list[str] = []
        self.reasons: dict[str, int] = {}

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
        arguments = ([number], reason) if action == "drop" else ([number],)
        state = self.model[number] if number < len(self.model) else "not issued"
        if state in FOLLOWS[action]:
            getattr(self.ledger, action)(*arguments)
            self.model[number] = BECOMES[action]
            if action == "drop":
                self.reasons[reason] = self.reasons.get(reason, 0) + 1
        else:
            with pytest.raises(RuntimeError, match=f"trajectory {number} is"):
                getattr(self.ledger, action)(*arguments)

    @rule()
    def restart(self) -> None:
        self.ledger = Ledger.from_json(json.loads(json.dumps(self.ledger.to_json())))
        self.model = ["waiting" if state in OPEN else state for state in self.model]

    @invariant()
    def counts_are_those_of_the_model_and_add_up(self) -> None:
        counts = self.ledger.counts()
        states = (*OPEN, "trained", "dropped")
        assert counts == {"issued": len(self.model)} | {state: self.model.count(state) for state in states}
        assert counts["issued"] == sum(counts[state] for state in states)
        assert dict(self.ledger.dropped) == self.reasons

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
    ledger.train(numbers)
    for again in (ledger.sampled, ledger.scored, ledger.train, lambda n: ledger.drop(n, "stale")):
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
