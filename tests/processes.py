"""Looking at processes that may end meanwhile."""

import contextlib
from collections.abc import Iterable

import psutil

from tests.waiting import PATIENCE_SECONDS


def command_of(process: psutil.Process) -> list[str]:
    """Its command and arguments; [] once it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def below(pid: int | None = None) -> list[psutil.Process]:
    """All that this process has started, directly or not; without a number, of the test's own process."""
    return psutil.Process(pid).children(recursive=True)


def ended(process: psutil.Process) -> bool:
    """Whether it does nothing any more, even if nobody has asked yet how it ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL for each, and waits until all have ended."""
    found = list(processes)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(found, timeout=PATIENCE_SECONDS)
