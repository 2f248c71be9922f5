"""Runs the demo once for all tests that start from it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the finished quickstart, which is what `make demo` runs."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "cluster", "run", "configs/quickstart.yaml", f"output_dir={folder}", "seed=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "quickstart"
