"""One thread for each tracker or channel of alerts, so that one that is slow, stalls or is away never holds the campaign up.

put      the loop adds a step's metrics and goes on
send     the thread delivers them in order, and tries again what failed
return   a tracker that answers again gets what it missed: from memory, and beyond that from metrics.jsonl
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from actors.errors import UserError
from cluster.records.writer import read_jsonl

KEPT_RECORDS = 256
"""Undelivered records in memory; older ones are read from metrics.jsonl later."""
SENT_AGAIN = 10_000
"""Records that are read from metrics.jsonl for a tracker that has come back; older ones are dropped and counted."""
PAUSES_SECONDS = (1.0, 60.0)
"""Between two tries: the first, and the longest after doubling."""
STALL_SECONDS = 30.0
"""A call that takes longer is reported."""
START_SECONDS = 60.0
"""For a new campaign: how long a tracker may take to answer for the first time."""
CLOSE_SECONDS = 5.0
"""How long the end of a campaign waits for all trackers together."""


class Tracker(Protocol):
    """Receives the metrics of each step. Its methods are called from one thread."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """metrics: the finite numbers of one line of metrics.jsonl; of alerts (alerts.py), a number and what is sent."""

    def close(self) -> None:
        """Called after the last step."""


class Outbox:
    """What one tracker is still to get, and the thread that sends it."""

    def __init__(
        self,
        name: str,
        make: Callable[[int], Tracker],
        next_step: int,
        metrics_file: Path | None,
    ):
        """name: its key of `tracking`. make: builds the tracker, given the first step that it will get; it is called again
        after a failure. metrics_file: where records are that had no room in memory; None: nowhere, as with
        alerts."""
        self.name, self.label = name, name.removesuffix("_uri").removesuffix("_project")
        self.first_error: Exception | None = None
        """Why the tracker could not be built the first time."""
        self.tried = threading.Event()
        """Set after the first attempt to build it."""
        self._make, self._metrics_file = make, metrics_file
        self._tracker: Tracker | None = None
        self._sent = next_step - 1
        self._pending: deque[tuple[int, dict[str, Any]]] = deque()
        self._late: deque[tuple[int, dict[str, Any]]] = deque()
        """From metrics.jsonl; older than those that are pending."""
        self._overflow = 0
        """Records that had no room in memory."""
        self._since: float | None = None
        """When the call under way began."""
        self._outage = False
        self._sent_late = self._dropped = 0
        self._news: deque[tuple[str, dict[str, Any]]] = deque()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds the metrics of a step. A step that is not after the last one means that the campaign was rolled back."""
        with self._changed:
            self._sent = min(self._sent, step - 1)
            for queue in (self._late, self._pending):
                while queue and queue[-1][0] >= step:
                    queue.pop()
            self._pending.append((step, metrics))
            if len(self._pending) > KEPT_RECORDS:
                self._pending.popleft()
                self._overflow += 1
            self._changed.notify_all()

    def news(self) -> list[tuple[str, dict[str, Any]]]:
        """Events since the last call: kind and fields."""
        since = self._since
        if since is not None and time.monotonic() - since > STALL_SECONDS:
            self._fails(f"no answer for {STALL_SECONDS:g} s")
        found = []
        while self._news:
            found.append(self._news.popleft())
        return found

    def finish(self) -> None:
        """Asks the thread to deliver what there is, once, and to end; does not wait."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def join(self, seconds: float) -> None:
        """Waits for the thread's end for at most `seconds`, and reports what was not delivered."""
        self._thread.join(max(seconds, 0))
        lost = 0 if self._metrics_file else self._dropped
        if left := len(self._late) + len(self._pending) + self._overflow + lost:
            self.tell("tracker_behind" if self._metrics_file else "alerts_behind", tracker=self.label, missing=left)

    # --------------------------------------------------------------------------------------------- the thread's part

    def _work(self) -> None:
        pause, longest = PAUSES_SECONDS
        while True:
            self._since = time.monotonic()
            try:
                if self._tracker is None:
                    self._tracker = self._make(self._sent + 1)
                    self.tried.set()
                record = self._next()
                if record is None and self._closing:
                    self._tracker.close()
                    return
                if record is not None:
                    self._tracker.log(*record)
                    self._delivered(record)
                    pause = PAUSES_SECONDS[0]
            except Exception as error:  # a foreign library or server may raise anything
                self.first_error = self.first_error or (None if self.tried.is_set() else error)
                self.tried.set()
                self._tracker = None  # it may be broken for good: the next try builds another
                self._fails(f"{type(error).__name__}: {error}".splitlines()[0])
                if self._wait(pause):
                    return
                pause = min(2 * pause, longest)
            else:
                if record is None:
                    self._wait(None)

    def _wait(self, seconds: float | None) -> bool:
        """Waits until there is something to send (None), or for some time; whether the campaign is ending."""
        self._since = None
        with self._changed:
            if seconds is None:
                self._changed.wait_for(lambda: self._pending or self._closing)
            else:
                self._changed.wait_for(lambda: self._closing, seconds)
            return self._closing

    def _next(self) -> tuple[int, dict[str, Any]] | None:
        with self._changed:
            if self._overflow and not self._late:
                self._read_late()
            if self._late:
                return self._late[0]
            return self._pending[0] if self._pending else None

    def _read_late(self) -> None:
        """Reads the records that had no room in memory."""
        end = self._pending[0][0] if self._pending else math.inf
        rows = read_jsonl(self._metrics_file) if self._metrics_file else []
        missed = [row for row in rows if self._sent < row["step"] < end]
        self._late.extend((int(row["step"]), finite_numbers(row)) for row in missed[-SENT_AGAIN:])
        self._dropped += max(self._overflow - len(self._late), 0)
        self._overflow = 0

    def _delivered(self, record: tuple[int, dict[str, Any]]) -> None:
        with self._changed:
            for queue in (self._late, self._pending):
                if queue and queue[0] is record:  # unless a rollback has removed it meanwhile
                    queue.popleft()
                    self._sent = record[0]
            self._sent_late += self._outage
            if self._outage and not (self._late or self._pending or self._overflow):
                self.tell(
                    "tracker_returned" if self._metrics_file else "alerts_returned",
                    tracker=self.label,
                    late=self._sent_late,
                    dropped=self._dropped,
                )
                self._outage, self._sent_late, self._dropped = False, 0, 0

    def _fails(self, cause: str) -> None:
        if not self._outage:
            self._outage = True
            self.tell("tracker_failed" if self._metrics_file else "alerts_failed", tracker=self.label, cause=cause)

    def tell(self, kind: str, **fields: Any) -> None:
        """Keeps an event for `news`."""
        self._news.append((kind, fields))


class Trackers:
    """All trackers of a campaign. None of them can end it or hold it up."""

    def __init__(
        self,
        makers: Mapping[str, Callable[[int], Tracker]],
        on_event: Callable[..., None],
        *,
        next_step: int,
        metrics_file: Path,
    ):
        """makers: name -> what builds the tracker. on_event: called with a kind of event and its fields, by `report`."""
        self._on_event = on_event
        self._boxes = [Outbox(name, make, next_step, metrics_file) for name, make in makers.items()]

    def wait(self) -> None:
        """Gives all trackers a moment to answer for the first time, for a campaign that goes on without them too."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for box in self._boxes:
            box.tried.wait(max(deadline - time.monotonic(), 0))

    def require(self) -> None:
        """Waits until all trackers have answered once. UserError: one refuses, or does not answer in START_SECONDS."""
        deadline = time.monotonic() + START_SECONDS
        for box in self._boxes:
            in_time = box.tried.wait(max(deadline - time.monotonic(), 0))
            error = box.first_error or (None if in_time else TimeoutError(f"no answer within {START_SECONDS:g} s"))
            if error is not None:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise UserError(f"tracking.{box.name}", reason, "a tracker that answers, or none") from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Gives the finite numbers of a line of metrics.jsonl to all trackers; returns at once."""
        numbers = finite_numbers(record)
        for box in self._boxes:
            box.put(int(record["step"]), numbers)
        self.report()

    def report(self) -> None:
        """Records what has happened since the last call."""
        for box in self._boxes:
            for kind, fields in box.news():
                self._on_event(kind, **fields)

    def close(self) -> None:
        """Lets all trackers get what they miss, for at most CLOSE_SECONDS."""
        finish_all(self._boxes, CLOSE_SECONDS)
        self.report()


def finish_all(boxes: Sequence[Outbox], seconds: float) -> None:
    """Asks all threads to deliver what there is, and waits for them for at most so long together."""
    for box in boxes:
        box.finish()
    deadline = time.monotonic() + seconds
    for box in boxes:
        box.join(deadline - time.monotonic())


def finite_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line of metrics.jsonl, without its step."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
