"""Calls a program or a URL when a guard acts, something breaks, or the campaign ends. None of them can hold it up.

What is sent is one JSON object (docs/alerts.md). Each channel has a thread and a bounded queue of its own (outbox.py): what
fails is tried again, and what a channel refuses for good, or has no room for, is dropped and told.
"""

import contextlib
import http.client
import json
import os
import shlex
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from actors.errors import UserError
from cluster.config import AlertsConfig, CampaignConfig
from cluster.records.event_table import describe, row_of
from cluster.tracking.outbox import Outbox, finish_all

OWN_FIELDS = ("traceback",)
"""Fields of an event that are too long for an alert."""
AGAIN = (408, 425, 429)
"""Statuses below 500 after which the same request may be taken."""


class Channel(Protocol):
    """Where alerts go: called from one thread, with a number that grows and the alert."""

    def log(self, number: int, alert: Mapping[str, Any]) -> None:
        """Exception: it was not taken, and is tried again."""

    def close(self) -> None:
        """Called after the last one."""


class Command:
    """A program that gets the alert as JSON on its standard input. Exit status 0: it has taken it."""

    def __init__(self, command: str, timeout_seconds: float):
        self._words, self._timeout = shlex.split(command), timeout_seconds
        self._running: subprocess.Popen[bytes] | None = None

    def log(self, number: int, alert: Mapping[str, Any]) -> None:
        """RuntimeError: it failed. TimeoutError: it took too long, and was killed with all that it started."""
        process = self._running = subprocess.Popen(
            self._words,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.communicate((json.dumps(alert) + "\n").encode(), timeout=self._timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{self._words[0]} has not ended after {self._timeout:g} s") from error
        finally:
            self.kill()
            process.wait()
            self._running = None  # its number may be another process's from now on
        if process.returncode:
            raise RuntimeError(f"{self._words[0]} ended with exit status {process.returncode}")

    def kill(self) -> None:
        """Ends the program, and what it has left running."""
        if (running := self._running) is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(running.pid, signal.SIGKILL)

    def close(self) -> None:
        """Nothing is open."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it could lead to a server that the user did not name."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follows none."""


class Webhook:
    """POSTs the alert as JSON to a URL. Any status from 200 to 299: it was taken."""

    def __init__(self, url: str, timeout_seconds: float, refused: Callable[[str], None]):
        """refused: told why an alert was refused for good."""
        self._url, self._timeout, self._refused = url, timeout_seconds, refused
        self._open = urllib.request.build_opener(_NoRedirect).open

    def log(self, number: int, alert: Mapping[str, Any]) -> None:
        """OSError, HTTPException: it was not taken, and may be later."""
        body = json.dumps(alert).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        try:
            with self._open(request, timeout=self._timeout) as answer:
                answer.read(1)
        except urllib.error.HTTPError as error:
            with error:
                if error.code >= 500 or error.code in AGAIN:
                    raise ConnectionError(f"status {error.code}") from None  # the message has no URL: it may hold a key
                self._refused(f"status {error.code}")
        except (urllib.error.URLError, http.client.HTTPException) as error:
            raise ConnectionError(str(getattr(error, "reason", "") or type(error).__name__)) from None

    def close(self) -> None:
        """Nothing is open."""


class Alerts:
    """All channels of one campaign."""

    def __init__(self, config: CampaignConfig, on_event: Callable[..., None]):
        """on_event: called with a kind of event and its fields, by `report`."""
        self._config, self._on_event, self._number = config, on_event, 0
        self._boxes: list[Outbox] = []
        self._program: Command | None = None
        alerts = config.alerts
        if alerts.command:
            program = self._program = Command(alerts.command, alerts.timeout_seconds)
            self._add("command", lambda: program)
        if alerts.webhook:
            url = alerts.webhook
            box: list[Outbox] = []

            def refused(cause: str) -> None:
                box[0].tell("alert_refused", channel="webhook", cause=cause)

            box.append(self._add("webhook", lambda: Webhook(url, alerts.timeout_seconds, refused)))

    def _add(self, name: str, make: Callable[[], Channel]) -> Outbox:
        self._boxes.append(Outbox(name, lambda _: make(), 1, None))
        return self._boxes[-1]

    def event(self, row: Mapping[str, Any]) -> None:
        """Given every line of events.jsonl, sends those that call; returns at once."""
        if not calls(str(row["kind"])) or not self._boxes:
            return
        self._number += 1
        alert = alert_of(self._config.name, self._config.run_dir, row)
        for box in self._boxes:
            box.put(self._number, alert)

    def report(self) -> None:
        """Records what has happened to the channels since the last call."""
        for box in self._boxes:
            for kind, fields in box.news():
                self._on_event(kind, **fields)

    def close(self) -> None:
        """Lets all channels take what there is, once, for at most `alerts.timeout_seconds`."""
        finish_all(self._boxes, self._config.alerts.timeout_seconds if self._boxes else 0.0)
        if self._program is not None:
            self._program.kill()
        self.report()


def calls(kind: str) -> bool:
    """Whether events of this kind are sent: guards' actions, faults, ends of the campaign, and all that is marked as bad."""
    row = row_of(kind)
    return bool(row.guard_action) or row.fault or row.ends or row.tone == "bad"


def alert_of(name: str, run_dir: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object that is sent. `text` is a line for people, which chat services show as it is."""
    fields = {key: value for key, value in row.items() if key not in OWN_FIELDS}
    text = f"{name}: {describe(str(row['kind']), row)}"
    return {"campaign": name, "run_dir": str(run_dir.resolve()), "text": text, **fields}


def check_alerts(alerts: AlertsConfig) -> str:
    """What is configured, in a few words. UserError: there is no such program on this machine. Nothing is sent."""
    if alerts.command:
        try:
            words = shlex.split(alerts.command)
        except ValueError as error:
            raise UserError("alerts.command", f"{alerts.command!r} ({error})", "a program and its arguments") from error
        if not words or shutil.which(words[0]) is None:
            found = repr(words[0]) if words else "no word"
            raise UserError("alerts.command", found, "a program that can be run on the campaign's machine")
    return ", ".join(name for name in ("command", "webhook") if getattr(alerts, name)) or "none"
