"""Every Python example of docs/extending.md can be imported as it stands there.

What an example then does in a campaign is tested by the tests of its part, which read it with `python_examples`.
"""

import importlib.util
from pathlib import Path

import pytest

from tests.documented import python_examples

PAGE = "docs/extending.md"


@pytest.mark.parametrize("number", range(len(python_examples(PAGE))))
def test_the_example_can_be_imported_and_is_short(number: int, tmp_path: Path) -> None:
    text = python_examples(PAGE)[number]
    assert len(text.splitlines()) <= 30
    path = tmp_path / f"example_{number}.py"
    path.write_text(text, "utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_page_has_a_section_for_each_door() -> None:
    for section in ("An estimator, a divergence or a cost", "An engine", "A teacher backend", "A verifier"):
        python_examples(PAGE, section)
