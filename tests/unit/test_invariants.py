"""The table of invariants in CONTRIBUTING.md names tests that exist and that `make test` runs."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M)


def in_make_test(file: Path, name: str) -> bool:
    """Whether the file defines this test, without the marker `nightly` on it or on the whole module."""
    tree = ast.parse(file.read_text("utf-8"))
    marks = [
        ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)
    ]
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    marks += [ast.unparse(decorator) for node in found for decorator in node.decorator_list]
    return bool(found) and "nightly" not in " ".join(marks)


def test_every_invariant_has_a_row() -> None:
    assert [int(number) for number, _ in ROWS] == list(range(1, 13))


@pytest.mark.parametrize(("number", "tests"), ROWS)
def test_the_tests_of_an_invariant_are_part_of_make_test(number: str, tests: str) -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
    assert named and [f"{file}::{name}" for file, name in named if not in_make_test(ROOT / file, name)] == []


@pytest.mark.parametrize("mark", ["@pytest.mark.nightly", "pytestmark = pytest.mark.nightly\n"])
def test_a_nightly_test_does_not_count(tmp_path: Path, mark: str) -> None:
    (tmp_path / "test_it.py").write_text(f"{mark}\ndef test_it() -> None: ...\n")
    assert not in_make_test(tmp_path / "test_it.py", "test_it")


def test_only_what_is_shown_reads_the_wall_clock() -> None:
    """A clock that is set, or a machine that sleeps, must not end a wait, spend a budget or change a duration."""
    console = {"cluster/console/status.py", "cluster/console/control.py", "cluster/console/runs.py"}
    shown = {"cluster/records/writer.py", *console}
    readers = {
        str(path.relative_to(ROOT))
        for folder in ("actors", "learner", "cluster")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\btime\.time(_ns)?\(|datetime\.(now|today|utcnow)\(", path.read_text())
    }
    assert readers - {"cluster/tracking/trackers.py"} == shown
