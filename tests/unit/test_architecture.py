"""docs/architecture.md says what the code does: its diagrams, its reading order and its index of files."""

import ast
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from actors.teacher.local import LocalTeacher
from benchmarks.sizes import FLOORS, reading_order
from learner.config import ObjectiveConfig
from tests.documented import ROOT
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import make_learner, sampled, teacher_config

PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
MODULES = {
    str(path.relative_to(ROOT)) for floor in FLOORS for path in (ROOT / floor).rglob("*.py") if path.stem != "__init__"
}


def section(title: str) -> str:
    """The text below a heading, up to the next one of its level or above."""
    level = title.partition(" ")[0]
    found = re.search(rf"^{re.escape(title)}\n(.*?)(?=^#{{2,{len(level)}}} |\Z)", PAGE, re.S | re.M)
    assert found, title
    return found[1]


def diagrams() -> str:
    return "\n".join(re.findall(r"^```\n(.*?)^```", PAGE, re.S | re.M))


def names_in(path: str) -> set[str]:
    """Classes, functions and `Class.method` that a module defines."""
    names = set()
    for node in ast.parse((ROOT / path).read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in ast.iter_child_nodes(node) if hasattr(inner, "name")}
    return names


def test_the_reading_order_has_at_most_18_modules_that_exist() -> None:
    order = reading_order()
    assert len(order) == len(set(order)) <= 18
    assert set(order) <= MODULES


def test_every_file_and_function_of_the_diagrams_exists() -> None:
    by_name: dict[str, list[str]] = {}
    for path in [*reading_order(), *MODULES]:  # `learner.py` is the one of the reading order
        by_name.setdefault(path.rpartition("/")[2], []).append(path)
    shown = set(re.findall(r"\b(\w+\.py)(?::([\w.]+))?", diagrams()))
    assert len(shown) > 20
    for file, name in shown:
        assert file in by_name, f"no module is called {file}"
        assert not name or name in names_in(by_name[file][0]), f"{by_name[file][0]} has no {name}"


def test_every_module_of_the_reading_order_is_in_the_diagram() -> None:
    assert {path.rpartition("/")[2] for path in reading_order()} <= set(re.findall(r"\w+\.py", diagrams()))


def test_the_index_has_a_phrase_for_every_module_and_no_other() -> None:
    folder, listed = "", []
    for line in section("## Index of files").splitlines():
        if heading := re.fullmatch(r"### `([\w/]+/)`", line):
            folder = heading[1]
        elif entry := re.fullmatch(r"- `(\w+\.py)`: .+", line):
            listed.append(folder + entry[1])
    assert len(listed) == len(set(listed))
    assert set(listed) >= MODULES


@pytest.mark.parametrize(("signal", "estimator"), [("sampled", "immediate"), ("topk", "full"), ("hidden", "full")])
def test_an_update_runs_through_the_modules_of_the_path_and_those_named_beside_it(
    tmp_path: Path, signal: str, estimator: str
) -> None:
    """Traces every call between a teacher's score and the end of an update: what runs is on the page."""
    models = {name: make_tiny_model(tmp_path / name, hidden=32, layers=1, seed=seed)
              for name, seed in (("student", 0), ("other", 7))}  # fmt: skip
    teachers = {"teacher": teacher_config(models, "other", signal)}
    learner = make_learner(models, teachers=teachers, objective=ObjectiveConfig(estimator=estimator))  # type: ignore[arg-type]
    written, _ = sampled(models, "other", "sampled")
    teacher = LocalTeacher(teachers["teacher"])
    ran: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{ROOT}/"):
            ran.add(frame.f_code.co_filename.removeprefix(f"{ROOT}/"))

    sys.setprofile(note)
    try:
        _, scores = teacher.score(written.ids, written)
        learner.update(written.ids, written, scores)
    finally:
        sys.setprofile(None)
    ran = {path for path in ran if path.startswith(("actors/", "learner/"))}
    path = {module for module in reading_order() if module.startswith(("actors/", "learner/"))}
    beside = set(re.findall(r"^\| `([\w/]+\.py)`", section("### Beside this path"), re.M))
    assert not path & beside and beside <= MODULES
    assert ran <= path | beside, ran - path - beside
    sampling = {"actors/prompts/prompt_set.py", "actors/rollout/actor.py", "actors/rollout/vllm_engine.py"}
    assert ran >= path - sampling, path - sampling - ran
