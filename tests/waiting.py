"""Waiting for events. The limit guards against hanging; on a machine of any speed nothing else depends on it."""

import time
from collections.abc import Callable

PATIENCE_SECONDS = 600.0


def until(condition: Callable[[], object], what: str, alive: Callable[[], object] = lambda: True) -> None:
    """Waits until the condition holds. AssertionError if it cannot any more, since what should bring it about has ended.

    alive: whether it can still be brought about.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert (alive() and time.monotonic() < deadline) or condition(), f"in vain: {what}"
        time.sleep(0.02)
