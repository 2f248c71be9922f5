"""The tables of docs/objective.md are those of the enumeration, and support the statements of the text."""

import re
from pathlib import Path
from typing import get_args, get_type_hints

from learner.config import MismatchConfig, ObjectiveConfig, TrustRegionConfig
from tests.unit.actors.signal_bytes import table as bytes_table
from tests.unit.learner.bias_variance import (
    bounded_table,
    make_case,
    off_policy_table,
    row_moments,
    support_moments,
    support_table,
    table,
)

DOCUMENT = Path(__file__).parents[3] / "docs" / "objective.md"


def test_the_documented_tables_are_the_computed_ones():
    page = DOCUMENT.read_text()
    for computed in (table, support_table, bounded_table, off_policy_table, bytes_table):
        assert computed() in page, computed


def test_expected_terms_cost_no_more_than_immediate_near_the_teacher_and_full_costs_least():
    case = make_case(4, 4, near=True)
    variance = {
        name: row_moments(case, name, "none", 1.0)[1] for name in ("to_go", "to_go_expected", "immediate", "full")
    }
    assert variance["to_go_expected"] < 1.01 * variance["immediate"] < 0.5 * variance["to_go"]
    assert variance["full"] < 0.3 * variance["immediate"]


def test_a_bucket_is_nearer_than_renormalising_and_a_support_where_the_divergence_has_its_weight():
    case = make_case(4, 4)

    def bias(estimator: str, divergence: str, whose: str, close: str) -> float:
        wanted, found = (support_moments(case, estimator, divergence, *x)[0] for x in (("all", ""), (whose, close)))
        return (found - wanted).norm().item()

    for kind in (("full", "reverse_kl"), ("full", "forward_kl"), ("to_go_expected", "reverse_kl")):
        for whose in ("teacher", "student"):
            assert bias(*kind, whose, "tail") < 0.6 * bias(*kind, whose, "renormalised")
    assert bias("full", "reverse_kl", "student", "tail") < bias("full", "reverse_kl", "teacher", "tail")
    assert bias("full", "forward_kl", "teacher", "tail") < bias("full", "forward_kl", "student", "tail")


def test_every_key_and_choice_of_the_objective_is_on_the_page():
    marked = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", DOCUMENT.read_text()))))
    for config in (ObjectiveConfig, MismatchConfig, TrustRegionConfig):
        for name, hint in get_type_hints(config).items():
            choices = [
                choice for part in (hint, *get_args(hint)) for choice in get_args(part) if isinstance(choice, str)
            ]
            assert {name, *choices} <= marked, {name, *choices} - marked


def test_every_test_that_the_page_names_exists():
    names = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)[…`]", DOCUMENT.read_text()):
        assert f"def {name}" in names or f"{name}.py" in {p.name for p in Path(__file__).parent.glob("*")}, name
