"""How long an actor's episodes wait for their environments: what of it leaves the engine idle, and how many to have under way."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RECENT = 64
"""Episodes that the share of waiting is a running mean of."""


class Thinking:
    """Counts turns that the engine writes, and environments that are waited for. For one event loop, without locks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """clock: in seconds."""
        self.idle_seconds = 0.0
        """Seconds for which the engine had nothing to write and at least one environment was waited for. Only grows."""
        self._clock, self._since = clock, clock()
        self._writing = self._asking = 0
        self._waited = self._taken = 0.0
        """Seconds of the recent episodes: waiting for their environments, and in all."""

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The engine writes a turn."""
        self._change(1, 0)
        try:
            yield
        finally:
            self._change(-1, 0)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """An environment is waited for."""
        self._change(0, 1)
        try:
            yield
        finally:
            self._change(0, -1)

    def ended(self, waited: float, taken: float) -> None:
        """An episode has ended: seconds for which it waited for its environment, and in all."""
        keep = 1 - 1 / RECENT
        self._waited, self._taken = keep * self._waited + waited, keep * self._taken + taken

    def at_once(self, seats: int) -> int:
        """Episodes to have under way, so that an engine of so many seats is full though some of them wait.

        With n episodes, of whose time a share w is waiting, (1 - w) n are with the engine. These are its seats at
        n = seats / (1 - w).
        """
        written = self._taken - self._waited
        return seats if written <= 0 else round(seats * self._taken / written)

    def _change(self, writing: int, asking: int) -> None:
        now = self._clock()
        if not self._writing and self._asking:
            self.idle_seconds += now - self._since
        self._since = now
        self._writing += writing
        self._asking += asking
