"""How much processor time an actor's process has used. Standard library only."""

import time


class ProcessorTime:
    """Processor seconds of this process, of all its threads, from one report to the next.

    Wall-clock seconds on a machine that others use say as much about the others; these do not.
    """

    def __init__(self) -> None:
        self._reported = time.process_time()

    def since_report(self) -> float:
        """Seconds since the last call, or since the object was made."""
        now = time.process_time()
        spent, self._reported = now - self._reported, now
        return spent
