"""The demo is run once; every test that starts from it gets its directory."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` runs: the run directory of the finished quickstart."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "cluster", "run", "configs/quickstart.yaml", f"output_dir={folder}", "seed=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "quickstart"
