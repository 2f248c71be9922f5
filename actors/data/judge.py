"""Judges responses with a verifier in a process of its own, with a deadline for each verdict.

A response without a verdict (the deadline is missed, the verifier raises or ends its process, twice) counts as wrong: its
reward is 0, and the reason is reported. The process is then started again. MOST_IN_A_ROW of them in a row end the campaign.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from actors.config import VerifierConfig
from actors.data.verifiers import Verifier, tells_answers, trial
from actors.errors import CampaignError, UserError
from actors.heartbeat import beat
from actors.import_path import is_import_path
from actors.trajectory import Aside

MOST_IN_A_ROW = 20
"""Responses in a row that may remain without a verdict."""
AT_ONCE = 32
"""Responses that an `async` verifier judges at once."""
GRACE_SECONDS = 5.0
"""For the answer to several responses, beyond the deadline of each."""
START_SECONDS = 120.0
"""Time limit for the process to start, which imports the user's module."""
QUICK = ("exact", "regex", "numeric")
"""Verifiers that try a reference in microseconds, which needs no process."""
MAIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from actors.data.verifier_process import serve; serve(int(sys.argv[2]))"
)


class Verdicts(NamedTuple):
    """The rewards of B responses."""

    rewards: np.ndarray
    """[B] float64; 0 where there is no verdict."""
    failed: list[str]
    """Why there is none, once for each response without one."""
    answers: list[str | None] = []  # noqa: RUF012 (nothing changes it in place)
    """[B] what each response answers (`answer_of` in verifiers.py); empty where it was not asked for."""
    parts: tuple[dict[str, float], ...] = ()
    """[B] named parts of each reward, where the verifier returns any; else ()."""


class Trial(NamedTuple):
    """What came of trying references."""

    tried: int
    """References that the verifier can use, from the first."""
    error: UserError | None
    """What is wrong with the next one; None: nothing, or the time was over."""


class Judge:
    """A verifier. Its process starts with the first response; nothing starts where nothing is judged."""

    def __init__(
        self,
        config: VerifierConfig,
        key: str = "evaluation.verifier",
        by_domain: Mapping[str, VerifierConfig] | None = None,
    ):
        """key: where the configuration stands, for errors. by_domain: the verifiers of prompts of these domains, in its place."""
        self._config, self._key = config, key
        self._others = {name: Judge(own, f"evaluation.verifiers.{name}") for name, own in (by_domain or {}).items()}
        self._all = [self, *self._others.values()]
        self._asks: list[str] = []
        self._async = False
        self._lock = threading.Lock()  # calls come from several threads
        self._process: subprocess.Popen | None = None
        self._connection: _Connection | None = None
        self._in_a_row = 0
        self._closed = False

    def of(self, domain: str | None) -> Judge:
        """The verifier of a domain; this one where it has none of its own."""
        return self._others.get(domain, self) if domain is not None else self

    def beside(self, config: VerifierConfig, key: str) -> Judge:
        """Another verifier, with the same ones of domains: their processes serve both. It ends with this one."""
        found = Judge(config, key)
        found._others = self._others
        self._all.append(found)
        return found

    @property
    def name(self) -> str:
        """The verifier's name."""
        return self._config.name

    def tells_answers(self, domains: Iterable[str | None]) -> bool:
        """Whether `rewards` can say what the responses to prompts of these domains answer."""
        return all(tells_answers(self.of(domain)._config) for domain in set(domains))

    @property
    def settings(self) -> dict[str, Any]:
        """The verifier's configuration, and under `domains` those of domains that have their own."""
        others = {name: asdict(own._config) for name, own in self._others.items()}
        return asdict(self._config) | ({"domains": others} if others else {})

    @property
    def asks(self) -> list[str]:
        """What the verifier has parameters for, of `verifiers.ASIDE`. Starts its process. UserError: it cannot be made."""
        if is_import_path(self._config.name):
            with self._lock:
                self._running()
        return self._asks

    def rewards(
        self,
        responses: Sequence[str],
        references: Sequence[str | None],
        asides: Sequence[Aside] = (),
        *,
        answers: bool = False,
    ) -> Verdicts:
        """Judges B responses with their reference answers.

        asides: [B] what else is known of each prompt, or (). answers: also says what each response answers.

        UserError: the verifier cannot be made, or cannot use a reference. CampaignError: too many responses in a row
        without a verdict, or `close` was called.
        """
        rewards, failed, told, parts = [], [], [], []
        requests: dict[Judge, dict[int, dict[str, Any]]] = {}
        rows = zip(responses, references, asides or [Aside()] * len(responses), strict=True)
        for row, (response, reference, aside) in enumerate(rows):
            known = {"prompt": aside.prompt, "record": aside.record, "answer": answers}
            request = {"response": response, "reference": reference, "try": False, **known}
            requests.setdefault(self.of(aside.domain), {})[row] = request
        found = {
            row: answer
            for its, own in requests.items()
            for row, answer in zip(own, its._ask_all(list(own.values())), strict=True)
        }
        for row in range(len(responses)):
            answer = found[row]
            rewards.append(answer.get("reward", 0.0))
            told.append(answer.get("answer"))
            parts.append(answer.get("parts") or {})
            if "failed" in answer:
                failed.append(answer["failed"])
        return Verdicts(
            np.array(rewards, np.float64), failed, told if answers else [], tuple(parts) if any(parts) else ()
        )

    def try_references(self, references: Sequence[str | None], seconds: float, asides: Sequence[Aside] = ()) -> Trial:
        """Tries the references in their order, the first at least, for at most `seconds`.

        Each is also the response to judge, or the prompt's text where there is none: verifiers may raise on an empty response.
        A pattern, which need not match it, is left out. UserError: the verifier cannot be made.
        """
        if self._config.name in QUICK:
            return _try_here(trial(self._config, self._key), references)
        end = time.monotonic() + seconds
        for place, reference in enumerate(references):
            aside = asides[place] if asides else Aside()
            response = (aside.prompt or "") if reference is None else reference
            known = {"prompt": aside.prompt, "record": aside.record}
            answer = self._ask({"response": response, "reference": reference, "try": True, **known})
            if "failed" in answer:
                found = f"{self._config.name}, which failed ({answer['failed']})"
                return Trial(place, UserError(f"{self._key}.name", found, "a reward for (response, reference)"))
            if "at_fault" in answer:
                return Trial(place, UserError.from_json(answer["at_fault"]))
            if time.monotonic() > end:
                return Trial(place + 1, None)
        return Trial(len(references), None)

    def start(self) -> None:
        """Starts the process. UserError: the verifier cannot be made."""
        for judge in (self, *self._others.values()):
            with judge._lock:
                judge._running()

    def end(self) -> None:
        """Ends the process; the next response starts another."""
        for judge in self._all:
            with judge._lock:
                judge._kill()

    def close(self) -> None:
        """Ends the process for good, also while it works: a call that waits for a verdict ends with a CampaignError."""
        for judge in self._all:
            judge._closed = True
            judge._kill()

    def _ask_all(self, requests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The answers to requests, in their order; an `async` verifier has AT_ONCE of them at once."""
        for begin in range(0, len(requests), AT_ONCE):
            batch = requests[begin : begin + AT_ONCE]
            for request, verdict in zip(batch, self._verdicts(batch), strict=True):
                answer = self._ask(request, verdict)
                beat()
                yield answer
                if "at_fault" in answer:
                    raise UserError.from_json(answer["at_fault"])

    def _verdicts(self, requests: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
        """Verdicts on several responses that are judged at once; None: to be judged alone."""
        alone: list[dict[str, Any] | None] = [None] * len(requests)
        if len(requests) < 2 or not is_import_path(self._config.name):
            return alone
        limit = self._config.timeout_seconds
        late = {"failed": f"no verdict within {limit:g} s ({self._key}.timeout_seconds)"}
        with self._lock:
            self._refuse_closed()
            connection = self._running()
            if not self._async:
                return alone
            try:
                answer = connection.exchange({"several": requests}, limit + GRACE_SECONDS)
            except (OSError, EOFError):  # one of them has blocked or ended the process: which, is found one by one
                self._kill()
                return alone
        return [late if "late" in one else one for one in answer["verdicts"]]

    def _ask(self, request: dict[str, Any], known: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to one request: with `reward`, `failed` or `at_fault`. known: it is there already."""
        with self._lock:
            answer = self._answer(request) if known is None else known
            self._refuse_closed()
            self._in_a_row = self._in_a_row + 1 if "failed" in answer else 0
            if self._in_a_row >= MOST_IN_A_ROW:
                raise CampaignError(
                    f"{self._key}: {self._in_a_row} responses in a row have no verdict (the last: {answer['failed']}); "
                    "mend the verifier or its pattern, or give it more time, and run the same command again"
                )
            return answer

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        limit, answer = self._config.timeout_seconds, {}
        for _ in range(2):  # the process may have been killed, and the response be innocent
            self._refuse_closed()
            connection = self._running()
            try:
                return connection.exchange(request, limit)
            except TimeoutError:
                self._kill()
                return {"failed": f"no verdict within {limit:g} s ({self._key}.timeout_seconds)"}
            except (OSError, EOFError):
                answer = {"failed": self._last_words()}
        return answer

    def _refuse_closed(self) -> None:
        if self._closed:
            raise CampaignError(f"{self._key}: closed while a response was judged")

    def _running(self) -> _Connection:
        """The connection to the process, which is started where there is none. UserError: it does not start."""
        if self._process is not None and self._process.poll() is None and self._connection is not None:
            return self._connection
        self._kill()
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [sys.executable, "-c", MAIN, json.dumps(sys.path), str(theirs.fileno())]
            # A session of its own: a signal to the terminal's processes is the campaign's to handle.
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
            )
        self._connection = _Connection(ours)
        what = {"name": self._config.name, "pattern": self._config.pattern, "key": self._key}
        try:
            answer = self._connection.exchange({**what, "seconds": self._config.timeout_seconds}, START_SECONDS)
        except (OSError, EOFError) as error:  # a TimeoutError is an OSError
            found = "which does not start in time" if isinstance(error, TimeoutError) else self._last_words()
            raise UserError(f"{self._key}.name", f"{self._config.name}, {found}", "a verifier that starts") from error
        if "at_fault" in answer:
            raise UserError.from_json(answer["at_fault"])
        self._asks, self._async = list(answer.get("asks") or []), bool(answer.get("async"))
        return self._connection

    def _last_words(self) -> str:
        process, status = self._process, None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(1.0)  # the socket closes a moment before the process has ended
        self._kill()
        return "its process ended (" + (f"signal {-status})" if status and status < 0 else f"exit status {status})")

    def _kill(self) -> None:
        process, connection = self._process, self._connection
        self._process, self._connection = None, None
        if process is not None:
            started = _descendants(process.pid)  # also in sessions of their own
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            for child in started:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(child, signal.SIGKILL)
            process.wait()
        if connection is not None:
            connection.close()


class _Connection:
    """Lines of JSON over a socket, each with a deadline."""

    def __init__(self, end: socket.socket):
        self._socket, self._received = end, b""

    def exchange(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Sends a request and returns the answer. TimeoutError; OSError or EOFError: the process is gone."""
        identity = secrets.token_hex(8)
        end = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        self._socket.sendall(json.dumps({**request, "id": identity}).encode() + b"\n")
        while True:
            line, newline, rest = self._received.partition(b"\n")
            if newline:
                self._received = rest
                answer = _object(line)
                if answer.pop("id", None) == identity:
                    return answer
                continue  # not an answer of the process, but of the verifier, which found the descriptor
            self._socket.settimeout(max(end - time.monotonic(), 0.001))
            part = self._socket.recv(1 << 16)
            if not part:
                raise EOFError
            self._received += part

    def close(self) -> None:
        """Closes this end, which ends the process."""
        self._socket.close()


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _descendants(parent: int) -> list[int]:
    """The processes that this one has started, and those that they have; none where the system does not say."""
    found: list[int] = []
    for file in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            for child in map(int, file.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _try_here(verify: Verifier, references: Sequence[str | None]) -> Trial:
    for place, reference in enumerate(references):
        try:
            verify(reference or "", reference)
        except UserError as error:
            return Trial(place, error)
    return Trial(len(references), None)


def texts_to_judge(
    tokenizer: Any, tokens: np.ndarray, offsets: np.ndarray, turns: np.ndarray | None = None
) -> list[str]:
    """[B] what the student wrote, without special tokens: tokens [N], offsets [B + 1].

    turns: [N] as in Trajectories, None where there is one. Several turns are separated by line ends. What others wrote is left
    out: an answer in a tool's result is not the student's.
    """
    if turns is None or not turns.any():
        return tokenizer.batch_decode(np.split(tokens, offsets[1:-1]), skip_special_tokens=True)
    texts = []
    for row, of in zip(np.split(tokens, offsets[1:-1]), np.split(turns, offsets[1:-1]), strict=True):
        own = [row[of == turn] for turn in range(int(of.max(initial=-1)) + 1)]
        texts.append("\n".join(tokenizer.batch_decode(own, skip_special_tokens=True)))
    return texts
