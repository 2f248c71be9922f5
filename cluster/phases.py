"""The phases of a campaign's start: what is being done, since when, and how long each phase has taken.

Lines go to standard output until the campaign's screen takes them over (`tell`). On a terminal a live line shows what is
going on. Standard library only, so that the first line comes before anything large is imported.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from shutil import get_terminal_size
from typing import Any

from actors.heartbeat import doing

REFRESH_SECONDS = 0.25
"""Between two pictures of the live line."""
SHORT_SECONDS = 0.1
"""The end of a phase that was shorter gets no line."""
CLEAR_LINE = "\r\x1b[2K"


class Start:
    """The start of one campaign in this process. Any thread may begin and end phases; several may be under way."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, stream: Any = None):
        """stream: where lines go; None: standard output, as it is when a line is written."""
        self._clock, self._stream = clock, stream
        self._lock = threading.RLock()
        self.begin()

    def begin(self) -> None:
        """The clock begins, and no phase is known."""
        self.began = self._clock()
        self.over = False
        """Whether the first update has ended."""
        self._taken = False
        self._phases: list[dict[str, Any]] = []
        self._tell: Callable[[str], None] | None = None
        self._live = threading.Event()

    def of_a_campaign(self) -> None:
        """A campaign starts. The phases before belong to it, unless they were of another one; without any, the clock begins."""
        if self._taken or not self._phases:
            self.begin()
        self._taken = True

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within the block, this is being done. The phase ends with the block, also where it raises an error."""
        end = self.opened(name)
        try:
            yield
        finally:
            end()

    def opened(self, name: str) -> Callable[[], None]:
        """Begins a phase; returns what ends it. Without effect once the start is over."""
        if self.over:
            return lambda: None
        row: dict[str, Any] = {"phase": name, "began": self._clock() - self.began, "seconds": None}
        with self._lock:
            self._phases.append(row)
            if not self._live.is_set():
                self._line(f"{name} ...")

        def end() -> None:
            if row["seconds"] is None:
                seconds = row["seconds"] = self._clock() - self.began - row["began"]
                if seconds >= SHORT_SECONDS:
                    self._line(f"{name}: {seconds:.1f} s")

        return end

    def rows(self) -> list[dict[str, Any]]:
        """`phase`, `began` (seconds since the start) and `seconds` of each phase; the seconds are those so far while it is
        under way, and `ended` says whether it is over."""
        now = self._clock() - self.began
        with self._lock:
            rows = [dict(row) for row in self._phases]
        return [
            {
                "phase": row["phase"],
                "began": round(row["began"], 3),
                "seconds": round(now - row["began"] if row["seconds"] is None else row["seconds"], 3),
                "ended": row["seconds"] is not None,
            }
            for row in rows
        ]

    def now(self) -> str:
        """What is under way, in one line, each phase with its seconds."""
        return "; ".join(f"{row['phase']} ({row['seconds']:.0f} s)" for row in self.rows() if not row["ended"])

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._clock() - self.began

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block, a terminal has a live line, until `tell` is called."""
        stream = self._stream or sys.stdout
        if not stream.isatty():
            yield
            return
        live = self._live = threading.Event()
        live.set()
        thread = threading.Thread(target=self._draw, args=(live,), name="phases", daemon=True)
        thread.start()
        try:
            yield
        finally:
            live.clear()
            thread.join()

    def tell(self, tell: Callable[[str], None]) -> None:
        """From now on lines go to `tell`, which shows what is under way by itself: the live line ends."""
        with self._lock:
            if self._live.is_set():
                self._live.clear()
                self._write(CLEAR_LINE)
            self._tell = tell

    def _line(self, text: str) -> None:
        with self._lock:
            if self._tell is not None:
                self._tell(text)
            else:
                clear = CLEAR_LINE if self._live.is_set() else ""
                self._write(f"{clear}{self.seconds:>7.0f}s  {text}\n")

    def _draw(self, live: threading.Event) -> None:
        while live.is_set():
            with self._lock:
                if live.is_set() and (now := self.now()):
                    line = f"{CLEAR_LINE}{self.seconds:>7.0f}s  {now}  {doing()}".rstrip()
                    self._write(line[: get_terminal_size().columns + len(CLEAR_LINE) - 1])
            time.sleep(REFRESH_SECONDS)
        with self._lock:
            if self._tell is None:
                self._write(CLEAR_LINE)

    def _write(self, text: str) -> None:
        stream = self._stream or sys.stdout
        with suppress(OSError, ValueError):
            stream.write(text)
            stream.flush()


START = Start()
"""Of this process: one campaign starts at a time."""
