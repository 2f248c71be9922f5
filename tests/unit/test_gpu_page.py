"""docs/gpu.md: each row says whether it has run on a GPU, and names a test that exists and a command."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "gpu.md").read_text("utf-8")
TABLES = [
    [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    for block in re.findall(r"(?:^\|.*\n?)+", PAGE, re.M)
]
ROWS = [row for table in TABLES for row in table[2:]]


def test_every_table_has_the_same_columns_and_no_statement_is_there_twice() -> None:
    assert len(TABLES) == 2 and len(ROWS) > 15
    assert all(table[0] == ["statement", "on a GPU", "without one", "test", "command"] for table in TABLES)
    assert len({row[0] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_a_row_says_whether_it_has_run_and_names_a_test_that_exists_and_a_command(row: list[str]) -> None:
    assert len(row) == 5 and all(row)
    _, on_a_gpu, _, test, command = row
    assert on_a_gpu == "never" or re.fullmatch(r"\d{4}-\d\d-\d\d, .+", on_a_gpu), "never, or a date and a card"
    named = re.fullmatch(r"`([\w/]+\.py)::(\w+)`", test)
    assert named, test
    tree = ast.parse((ROOT / named[1]).read_text("utf-8"))
    assert named[2] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert re.fullmatch(r"`(python|understudy|make|pytest|sbatch|kubectl) [^`]+`", command), command


def test_the_first_lines_say_nothing_has_run_while_every_row_does() -> None:
    assert ("So far nothing" in PAGE) == all(row[1] == "never" for row in ROWS)
