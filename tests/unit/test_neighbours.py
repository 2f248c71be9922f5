"""The table of neighbours in docs/reliability.md: each cell names a test of `make test`. Remedies of troubleshooting work."""

import re
from pathlib import Path

import pytest

from cluster.config_file import load_config
from cluster.records.metric_table import METRICS
from tests.unit.test_invariants import in_make_test

ROOT = Path(__file__).resolve().parents[2]
SECTION = (ROOT / "docs" / "reliability.md").read_text("utf-8").partition("## Neighbours")[2].partition("\n## ")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in SECTION.splitlines() if line.startswith("| ")]
NEIGHBOURS = {
    "disk", "tracker", "teacher's server", "control store", "shared memory", "terminal", "scheduler's signals", "clock",
}  # fmt: skip
NONE = "–"
"""A cell that means nothing, as a clock that is full."""


def test_every_neighbour_has_a_row_with_a_test() -> None:
    assert ROWS[0] == ["neighbour", "slow", "away", "full", "wrong"]
    assert [name for name in NEIGHBOURS if not any(name in row[0] for row in ROWS[1:])] == []
    assert [row[0] for row in ROWS[1:] if set(row[1:]) == {NONE}] == []


@pytest.mark.parametrize("row", ROWS[1:], ids=lambda row: row[0])
def test_every_cell_names_a_test_of_make_test(row: list[str]) -> None:
    assert len(row) == 5
    for cell in row[1:]:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", cell)
        assert bool(named) == (cell != NONE and not cell.startswith("as ")), cell
        assert [name for file, name in named if not in_make_test(ROOT / file, name)] == []


def test_the_remedy_for_an_engine_that_differs_is_accepted_by_every_recipe_and_has_one_limit() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    [row] = [line for line in text.splitlines() if line.startswith("| `engine_logprob_abs_diff`")]
    assert METRICS["engine_logprob_abs_diff"].bad_sign in row
    [remedy] = re.findall(r"`(learner\.objective\.mismatch=[^`]*)`", row)
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        if load_config(path).learner.objective.estimator == "sft":
            continue  # no engine has written what it trains on
        assert load_config(path, [remedy]).learner.objective.mismatch.correction == "truncate"
