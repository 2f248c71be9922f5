"""The demo as a newcomer runs it: a whole campaign that must learn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_the_quickstart_corrects_the_students_habit(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "run", "configs/quickstart.yaml", f"output_dir={tmp_path}", "seed=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    assert summary["accuracy_start"] <= 0.4
    assert summary["accuracy_end"] >= 0.95 * summary["accuracy_teacher"]
    assert summary["reverse_kl_end"] < 0.25 * summary["reverse_kl_start"]
    assert summary["ledger"]["trained"] == summary["ledger"]["issued"]
    assert (tmp_path / "quickstart" / "report.html").stat().st_size > 10_000
