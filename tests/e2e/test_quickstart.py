"""The demo as a newcomer runs it: a whole campaign that must learn."""

import json
from pathlib import Path

import pytest


@pytest.mark.e2e
def test_the_quickstart_corrects_the_students_habit(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["accuracy_start"] <= 0.4
    assert summary["accuracy_end"] >= 0.95 * summary["accuracy_teacher"]
    assert summary["reverse_kl_end"] < 0.25 * summary["reverse_kl_start"]
    assert summary["ledger"]["trained"] == summary["ledger"]["issued"]
    assert (demo / "report.html").stat().st_size > 10_000
