"""Signals that ask a campaign to end, from the first import to the last line of output. Standard library only.

    starting   a signal ends the process at once, with one line: nothing is lost
    running    the first signal asks the loop for a checkpoint and says at once what it waits for; a second ends the process
    ending     as while running, but nothing is asked any more

Python's own handlers are used, not asyncio's: those would wait for the event loop, which may be busy.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

REQUESTS = (signal.SIGINT, signal.SIGTERM)
WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Sent by a terminal that closes, and by schedulers some time before SIGTERM. They never count as a second signal."""
SAME_SECONDS = 0.3
"""`timeout` and others signal the process and then its group: signals this close are one request."""
INTERRUPTED_STATUS = 130


class Interrupts:
    """What signals do in this process."""

    def __init__(self) -> None:
        self.last_acts: list[Callable[[], Any]] = []
        """Called, the newest first, before the process ends at once."""
        self._process = 0
        self._heard: tuple[signal.Signals, ...] = ()
        self._phase = "starting"
        self._ask: Callable[[], str] = str
        self._first: float | None = None
        """When the first signal of this campaign came."""
        self._insisted = False
        """Whether SIGINT or SIGTERM has come, not only warnings."""

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within the block, signals are handled as the phase says. Without effect in a thread other than the first."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._process = os.getpid()
        before = {number: signal.getsignal(number) for number in (*REQUESTS, *WARNINGS)}
        if before[signal.SIGHUP] is signal.SIG_IGN:  # started by `nohup`
            del before[signal.SIGHUP]
        self._heard = tuple(before)
        self.hear_again()
        self.starts()
        try:
            yield
        finally:
            self._heard = ()
            for number, handler in before.items():
                if handler is not None:  # None: not set from Python, so it cannot be set back either
                    signal.signal(number, handler)

    def hear_again(self) -> None:
        """Sets the handlers again, after a library has replaced them: Ray's C++ code takes SIGTERM for a crash."""
        for number in self._heard:
            signal.signal(number, self._received)

    def starts(self) -> None:
        """A campaign starts: until `runs` there is nothing that an end would lose."""
        self._phase, self._first, self._insisted, self.last_acts = "starting", None, False, []

    @contextmanager
    def runs(self, ask: Callable[[], str]) -> Iterator[None]:
        """Within the block, the first signal calls `ask`, which asks for the end and returns what it waits for.

        `ask` is called between any two instructions of the main thread, so it must not take a lock.
        """
        self._phase, self._ask = "running", ask
        try:
            yield
        finally:
            self._phase = "ending"

    def end_now(self, line: str) -> None:
        """Ends this process with status 130, whatever its threads do. Prints the line first."""
        for act in reversed(self.last_acts):
            with suppress(Exception):
                act()
        say(line)
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(INTERRUPTED_STATUS)

    def _received(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork of this process: the signal does what it does by default
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        name = signal.Signals(number).name
        if self._phase == "starting":
            self.end_now(f"interrupted ({name}) before there was anything to save; the same command begins again")
        now, first = time.monotonic(), self._first
        if first is None:
            self._first, self._insisted = now, number in REQUESTS
            waits = self._ask() if self._phase == "running" else "the campaign is ending"
            say(f"{name}: {waits}; a second SIGINT or SIGTERM ends it now, with what is saved")
            return
        insists = number == signal.SIGINT or (number == signal.SIGTERM and self._insisted)
        self._insisted |= number in REQUESTS
        if insists and now - first > SAME_SECONDS:
            self.end_now(f"{name} again: ended now, with what is saved; the same command continues it")


def say(line: str) -> None:
    """Writes a line to standard error without Python's buffers: a signal may come while they are being written to."""
    with suppress(OSError):
        os.write(2, f"understudy: {line}\n".encode(errors="backslashreplace"))


INTERRUPTS = Interrupts()
"""Of this process: signals belong to a process, not to an object."""
