"""The documentation says what the code says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config_file import load_config
from cluster.records.metric_table import METRICS, guardable

ROOT = Path(__file__).resolve().parents[3]


def test_the_configuration_reference_is_what_the_dataclasses_say() -> None:
    done = subprocess.run([sys.executable, "docs/make_configuration.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run: python docs/make_configuration.py"


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_every_relative_link_of_a_page_leads_to_a_file(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_loads_alone(path: Path) -> None:
    assert load_config(path).name


def test_the_readme_has_a_phrase_for_every_folder_of_the_code_and_no_other() -> None:
    tree = re.search(r"```\n(actors/.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert tree is not None
    floor, listed = "", set()
    for line in tree[1].splitlines():
        if match := re.match(r"( *)(\w+)/  ", line):
            floor = floor if match[1] else match[2]
            listed.add(f"{floor}/{match[2]}" if match[1] else floor)
    there = {
        str(path.parent.relative_to(ROOT))
        for floor in ("actors", "learner", "cluster")
        for path in (ROOT / floor).rglob("__init__.py")
    }
    assert {name for name in listed if name.split("/")[0] in ("actors", "learner", "cluster")} == there


def test_the_page_of_metrics_is_what_the_table_says() -> None:
    done = subprocess.run([sys.executable, "docs/make_metrics.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run: python docs/make_metrics.py"
    page = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| (G?)", page, re.M)
    states = {"busy", "loading", "environment", "blocked", "waiting", "away"}
    assert {key for key, _ in rows} - states == set(METRICS)
    guarded = {key.replace("<name>", "x") for key, mark in rows if mark}
    assert guarded == set(guardable("topk", ["x"], ["x"]))
