"""The table of events covers exactly the events that the code records."""

import ast
import string
from pathlib import Path

import pytest

from cluster.records.event_table import EVENTS, FAULTS, GUARD_EVENTS, describe
from cluster.records.writer import RunRecords

ROOT = Path(__file__).resolve().parents[3]
RECORDERS = {"event", "on_event", "_on_event", "on_failure", "_on_failure", "tell", "_lost"}
"""Functions that record an event; the kind is one of their positional arguments."""


def recorded_kinds() -> dict[str, list[set[str]]]:
    """Kind -> the names of the fields that each call in cluster/ passes with it."""
    found: dict[str, list[set[str]]] = {}
    for path in sorted((ROOT / "cluster").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name not in RECORDERS:
                continue
            arguments = call.args if name == "_lost" else call.args[:1]
            fields = {keyword.arg or "**" for keyword in call.keywords}
            fields |= {"cause"} if len(call.args) > 1 else set()
            if name == "_lost":
                fields |= {"actor", "cause"}  # the fleet adds them
            for argument in arguments:
                for node in [argument.body, argument.orelse] if isinstance(argument, ast.IfExp) else [argument]:
                    if isinstance(node, ast.Constant) and isinstance(node.value, str):
                        found.setdefault(node.value, []).append(fields)
    return found


def test_every_event_that_the_code_records_has_a_row_and_every_row_is_recorded() -> None:
    assert set(recorded_kinds()) | set(FAULTS) | set(GUARD_EVENTS.values()) == set(EVENTS)


def test_a_sentence_uses_fields_that_the_events_have() -> None:
    guards = {"step", "guard", "metric", "value", "bound", "cause", "rate_scale", "to_step", "dropped"}
    calls = recorded_kinds()
    for kind, event in EVENTS.items():
        used = {name for _, name, _, _ in string.Formatter().parse(event.sentence) if name}
        for fields in calls.get(kind, [guards]):
            if kind == "lost_objects" and "evaluation" in fields:
                continue  # its fields are listed instead
            assert used <= fields | {"cause"}, f"{kind}: {used - fields}"


def test_each_guard_action_has_one_event_from_the_mildest_to_the_strongest() -> None:
    assert list(GUARD_EVENTS) == ["warn", "lower_rate", "roll_back", "stop"]


def test_a_kind_without_a_row_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"actor_vanished has no row in cluster/records/event_table\.py"):
        RunRecords(tmp_path).event("actor_vanished", actor="rollout-0")
    assert not (tmp_path / "events.jsonl").exists()


def test_an_event_is_described_by_its_sentence_or_by_its_fields() -> None:
    assert describe("scaled", {"role": "rollout", "before": 1, "after": 2}) == "rollout: 1 -> 2 actors"
    died = {"actor": "rollout-0", "cause": "SIGKILL", "time": 1.0, "kind": "actor_died"}
    assert describe("actor_died", died) == "rollout-0 died; its work is done again (SIGKILL)"
    assert describe("short_of_resources", {"cause": ""}).endswith("when there is room")
    assert describe("lost_objects", {"evaluation": 4, "cause": "gone"}) == "lost objects evaluation=4 gone"
    assert describe("of_the_future", {"x": 1, "wall_seconds": 2.0, "traceback": "…"}) == "of the future x=1"
