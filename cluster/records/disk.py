"""A disk that is full, over its quota, or away for a moment is waited for, like Ray's object store.

lines of metrics, events, ledger     kept in memory in their order (RunRecords), and written when there is room;
                                     the next update waits until they are
checkpoints, samples, the summary    tried again until they are written (`patiently`)
status.json                          written in place, since a new file would need room
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from actors.errors import DiskFullError, is_full_disk
from cluster.records.writer import Full, RunRecords, told_cause

PATIENCE_SECONDS = 1800.0
"""How long a full disk is waited for; then the campaign ends with the error."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 5.0
"""Between two tries."""


class Disk:
    """Writes to one run directory and waits while its disk is full."""

    def __init__(self, records: RunRecords, on_event: Callable[..., None]):
        """on_event: called with the kind and the fields of the events `disk_full` and `disk_back`."""
        self._records, self._on_event = records, on_event

    async def lines_written(self) -> None:
        """Waits until all lines of metrics, events and ledger are on the disk. Errors: see `patiently`."""
        if self._records.unwritten:
            await self.patiently(self._records.write_lines)

    async def patiently(self, write: Callable[[], Any]) -> Any:
        """Runs `write` (a function or a coroutine function), again while the disk is full: each time from the start.

        DiskFullError, OSError: it was full for PATIENCE_SECONDS.
        """
        before = self._records.full
        began, pause, told = before.since if before else time.monotonic(), FIRST_PAUSE_SECONDS, False
        while True:
            try:
                result = write()
                result = await result if isinstance(result, Awaitable) else result
                break
            except (OSError, DiskFullError) as error:
                if not is_full_disk(error) or time.monotonic() - began > PATIENCE_SECONDS:
                    raise
                self._records.full = self._records.full or Full(told_cause(error), began)
                if not told:
                    told = True
                    self._on_event("disk_full", cause=told_cause(error))
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        if told or before:
            self._records.full = None
            self._on_event("disk_back", seconds=round(time.monotonic() - began, 1))
        return result
