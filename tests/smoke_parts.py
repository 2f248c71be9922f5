"""Parts for tests of the smoke test's runner: each ends in another way."""

import faulthandler
import os
import signal
import time
from typing import Any

from benchmarks.gpu.smoke.report import Report


def good(report: Report, _: Any) -> None:
    report.figure("speed", 0.5, "m/s", target=">= 0.4")
    report.check("distance", 0.01, 0.02)


def wrong(report: Report, _: Any) -> None:
    report.check("distance", 0.03, 0.02)
    report.check("no number", float("nan"), 0.02)
    report.figure("speed", 0.3, "m/s", target=">= 0.4")


def raises(report: Report, _: Any) -> None:
    report.figure("speed", 0.5)
    raise ValueError("a wall")


def full(_: Report, __: Any) -> None:
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")


def dies(report: Report, _: Any) -> None:
    report.figure("speed", 0.5)
    faulthandler.disable()  # pytest's, which would print every stack
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(report: Report, _: Any) -> None:
    report.figure("speed", 0.5)
    time.sleep(600)
