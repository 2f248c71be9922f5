"""The servers of an `http` teacher: which one is asked, what counts as a failure, and how long one that is away is waited for.

A failing server gets requests again after growing pauses, once it has answered a probe as it did before. While others answer,
they take its work. While none does, the request waits, up to a limit. A request that a server refuses, or fails
at again and again while it answers the probe, is at fault itself: `RefusedError`.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import numpy as np

from actors.errors import CampaignError
from actors.heartbeat import FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, beat, wait_for
from actors.teacher.http_answers import decoded

Value = TypeVar("Value")

ATTEMPTS = 6
"""Failures of one request after which it, or all servers, are at fault."""
FAILURES_TO_OPEN = 3
"""Failures in a row after which a server has to answer the probe before it gets work."""
REFUSALS = {400, 413, 414, 422}
"""Statuses that are about the request. All others but 200 are about the server."""
BUSY = {429, 502, 503, 504}
"""Statuses that say nothing about the request."""
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}
"""Statuses that may be another one soon. At the start only these are tried again."""
ERROR_BYTES = 4096
"""Read of an answer that is an error."""


class RefusedError(Exception):
    """The servers work, and cannot answer this request."""


class ServerFault(Exception):
    """A server did not answer, or not as it should."""

    def __init__(self, problem: str, *, status: int = 0, wait_seconds: float = 0.0):
        """status: of the answer; 0: there was none, or it could not be read. wait_seconds: for which it asks to be left alone."""
        super().__init__(problem)
        self.status, self.wait_seconds = status, wait_seconds


@dataclass(eq=False)
class Server:
    """One server."""

    url: str
    under_way: int = 0
    failures: int = 0
    """In a row. Requests that were under way together and fail in one outage are one failure."""
    failed_at: float = 0.0
    """When the last of them was counted (time.monotonic)."""
    away_since: float = 0.0
    """When the first of them was counted."""
    open_until: float = 0.0
    """It gets no requests until this time (time.monotonic)."""
    probe: np.ndarray | None = None
    """Its answer to the probe."""
    model: str | None = None
    """What it calls the model in its answers."""


class Servers:
    """Servers of one model, asked from several threads."""

    def __init__(
        self,
        key: str,
        urls: list[str],
        secret: str,
        *,
        timeout_seconds: float,
        per_url: int,
        away_timeout_seconds: float,
    ):
        """key: the teacher's, for messages. secret: the servers' key; it never appears in a message."""
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.patient = False
        """Whether servers that are away are waited for. False at the start, when a wrong url must be told at once."""
        self.try_probe: Callable[[Server], np.ndarray] | None = None
        """Asks one server for the log-probs of the probe; see `ask_one`."""
        self._key, self._secret, self._timeout, self._away_timeout = key, secret, timeout_seconds, away_timeout_seconds
        self._lock = threading.Lock()
        self._away_since: float | None = None
        self._gave_up: tuple[float, str] | None = None
        """When, and the message: requests that began before have waited for as long, and end with it too."""
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {secret}"} if secret else {})
        # The environment may hold proxies and keys for other servers. A redirect would take the key to another host.
        self._client = httpx.AsyncClient(
            headers=headers,
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(timeout_seconds),
            limits=httpx.Limits(max_connections=per_url * len(urls)),
        )

    def ask(self, body: dict[str, Any], most_bytes: int, read: Callable[[dict[str, Any]], Value]) -> Value:
        """What `read` makes of an answer to the request. CampaignError: no server answers for too long. RefusedError."""
        attempts = failures = 0
        asked = time.monotonic()
        while True:
            server = self._next_server(asked)
            began = time.monotonic()
            try:
                if server.failures >= FAILURES_TO_OPEN:
                    self._check_probe(server)
                value = self.ask_one(server, body, most_bytes, read)
                self._succeeded(server)
                return value
            except ServerFault as fault:
                attempts += 1
                failures += fault.status not in BUSY
                if (fault.status in REFUSALS or failures >= ATTEMPTS) and self._is_well(server):
                    raise RefusedError(str(fault)) from None
                self._failed(server, fault, attempts, began)
            finally:
                with self._lock:
                    server.under_way -= 1

    def ask_one(
        self, server: Server, body: dict[str, Any], most_bytes: int, read: Callable[[dict[str, Any]], Value]
    ) -> Value:
        """The same of one server, with one attempt. ServerFault: no answer, an error, or `read` raises ValueError."""
        beat()
        status, wait_seconds, content = self._post(server, body, most_bytes)
        if status != 200:
            detail = "" if status in (401, 403) else f", {content[:200].decode('utf-8', 'replace')}"
            detail = " (a redirect, which is not followed)" if 300 <= status < 400 else detail
            problem = self._clean(f"{server.url}: status {status}{detail}")
            raise ServerFault(problem, status=status, wait_seconds=wait_seconds)
        try:
            answer = decoded(content)
            model = answer.get("model")
            if isinstance(model, str) and model != (server.model or model):
                raise ValueError(f"an answer of the model {model}, after answers of {server.model}")
            value = read(answer)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise ServerFault(self._clean(f"{server.url}: {error}")) from None
        server.model = model if isinstance(model, str) else server.model
        return value

    def _post(self, server: Server, body: dict[str, Any], most_bytes: int) -> tuple[int, float, bytes]:
        """(status, seconds of Retry-After, content) of one request. ServerFault: no whole answer in time."""
        url = f"{server.url}/completions"
        future: Future = asyncio.run_coroutine_threadsafe(
            fetch(self._client, url, body, most_bytes, self._timeout), self._loop
        )
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if future.done():  # the request's own time limit, not that of this wait
                    raise ServerFault(f"{server.url}: TimeoutError, no answer within {self._timeout:g} s") from None
                beat()
            except Exception as error:  # of the client library and what lies below it, for example an ExceptionGroup
                cause: BaseException = error.__cause__ or error
                while isinstance(cause, BaseExceptionGroup):
                    cause = cause.exceptions[0]
                raise ServerFault(self._clean(f"{server.url}: {type(error).__name__} {cause}".strip())) from None

    def _next_server(self, asked: float) -> Server:
        """The least busy server that may be asked; waits for one. CampaignError: none has answered for too long.

        asked: when the caller began to wait.
        """
        while True:
            with self._lock:
                if self._gave_up is not None and self._gave_up[0] >= asked:
                    raise CampaignError(self._gave_up[1])
                now = time.monotonic()
                # One request at a time finds out whether a failing server is back.
                free = [s for s in self.servers if s.open_until <= now and not (s.failures and s.under_way)]
                if free:
                    server = min(free, key=lambda s: (s.under_way, s.failures))
                    server.under_way += 1
                    return server
                soonest = min(s.open_until for s in self.servers) - now
            beat()
            time.sleep(min(max(soonest, 0.01), 1.0))

    def _succeeded(self, server: Server) -> None:
        with self._lock:
            server.failures, self._away_since = 0, None
        wait_for("")

    def _failed(self, server: Server, fault: ServerFault, attempts: int, began: float) -> None:
        """Leaves the server alone for a while. CampaignError: it is time to give up. began: when the request did."""
        with self._lock:
            now = time.monotonic()
            # Whatever was under way when the last failure was counted failed in the same outage, and tells nothing new.
            new = not server.failures or began > server.failed_at
            if new:
                server.away_since = server.away_since if server.failures and server.failed_at else now
                server.failures, server.failed_at = server.failures + 1, now
            pause = self._pause(server, attempts, now)
            asked_for = now + min(fault.wait_seconds, self._away_timeout)
            server.open_until = max(now + pause, asked_for) if new else max(server.open_until, asked_for)
            if self._away_since is None and all(s.failures for s in self.servers):
                self._away_since = now
            away_since = self._away_since
            if self.patient and away_since is not None:
                # There is a try when the time is over, of each server.
                end = max(away_since + self._away_timeout, now + FIRST_WAIT_SECONDS)
                for one in self.servers:
                    one.open_until = min(one.open_until, end)
        if not self.patient:
            if attempts >= ATTEMPTS or (fault.status and fault.status not in TRANSIENT and len(self.servers) == 1):
                tries = f"no server answers after {attempts} attempt{'s' * (attempts > 1)}"
                raise CampaignError(f"{self._key}: {tries}; the last: {fault}")
        elif away_since is not None:
            wait_for(str(fault))
            tried = new and all(one.failed_at >= away_since for one in self.servers)
            if tried and now - away_since >= self._away_timeout:
                limit = f"for {self._away_timeout:g} s ({self._key}.away_timeout_seconds)"
                message = f"{self._key}: no server has answered {limit}; the last: {fault}"
                self._gave_up = now, message
                raise CampaignError(message)

    def _pause(self, server: Server, attempts: int, now: float) -> float:
        """Seconds for which a server that has failed is left alone."""
        # At the start nothing else bounds the time; later a short outage must cost little more than itself.
        growing = (now - server.away_since) / 2 if self.patient else FIRST_WAIT_SECONDS * 2 ** min(attempts - 1, 20)
        return min(max(growing, FIRST_WAIT_SECONDS), LONGEST_WAIT_SECONDS)

    def _is_well(self, server: Server) -> bool:
        """Whether the server answers the probe: then a request that it does not answer is itself at fault."""
        try:
            self._check_probe(server)
        except ServerFault:
            return False
        return self.try_probe is not None

    def _check_probe(self, server: Server) -> None:
        """ServerFault: the server does not answer the probe, or otherwise than the servers did before."""
        if self.try_probe is None:
            return
        found = self.try_probe(server)
        known = next((s.probe for s in (server, *self.servers) if s.probe is not None), None)
        if known is not None and not np.abs(found - known).max() <= PROBE_TOLERANCE:
            server.failures = max(server.failures, FAILURES_TO_OPEN)
            raise ServerFault(f"{server.url}: other log-probs for the self-test's text than before: another model?")
        server.probe = found

    def _clean(self, text: str) -> str:
        """The text without the key and without control characters, in one line."""
        text = text.replace(self._secret, "***") if self._secret else text
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:400]


PROBE_TOLERANCE = 0.05
"""Nats by which a server's answer to the probe may differ from an earlier one: it batches requests of many clients."""


async def fetch(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], most_bytes: int, seconds: float
) -> tuple[int, float, bytes]:
    """(status, seconds of Retry-After, content) of one request.

    TimeoutError: the whole answer is not there within `seconds`, however steadily it drips. ValueError: it is too long.
    """
    async with asyncio.timeout(seconds), client.stream("POST", url, json=body) as response:
        limit = most_bytes if response.status_code == 200 else ERROR_BYTES
        content = bytearray()
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > limit and response.status_code == 200:
                raise ValueError(f"an answer of more than {limit} bytes")
            if len(content) > limit:
                break
        return response.status_code, retry_after(response.headers.get("Retry-After", "")), bytes(content)


def retry_after(header: str) -> float:
    """Seconds of a Retry-After header; 0 for none. A date is not read: it would need both clocks to agree."""
    return float(header) if header.isascii() and header.isdigit() and len(header) < 8 else 0.0
