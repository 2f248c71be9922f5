"""What is read from the log of a process that has failed or died."""

import subprocess
import sys
from pathlib import Path

import pytest

from actors.last_words import TAIL_BYTES, last_error


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (
            "Traceback (most recent call last):\n  File\nRuntimeError: Unsupported head_dim: 40\n",
            "RuntimeError: Unsupported",
        ),
        ("ERROR 11-29 22:00:01 [core.py:10] torch.cuda.OutOfMemoryError: CUDA out of memory\nbye\n", "torch.cuda.Out"),
        (
            "(Worker_TP1 pid=12) ERROR 11-29 22:00:01 [executor.py:1] Worker proc x died unexpectedly (exit",
            "Worker proc",
        ),
        ("ValueError: first\n*** SIGSEGV received at time=1 on cpu 0 ***\nPC: @ 0x0\n", "*** SIGSEGV received"),
        ("WARNING: nothing is wrong\n", ""),
        ("", ""),
    ],
)
def test_the_last_line_with_an_error_is_found(tmp_path: Path, log: str, found: str) -> None:
    (tmp_path / "log").write_text(log)
    assert last_error(tmp_path / "log").startswith(found) and bool(last_error(tmp_path / "log")) == bool(found)


def test_an_error_long_before_the_end_is_not_taken_for_the_cause(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("ValueError: old\n" + "more\n" * TAIL_BYTES)
    assert last_error(tmp_path / "log") == "" == last_error(tmp_path / "missing")


def test_a_process_knows_the_file_that_it_writes_its_errors_to(tmp_path: Path) -> None:
    code = "from actors.last_words import own_log; print(own_log())"
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=log, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "log")
