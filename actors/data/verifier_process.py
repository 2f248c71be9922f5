"""The process in which a verifier runs, apart from the loop and from the engines. Its other half is judge.py.

Python's `re` holds the interpreter while it searches, and a function of the user's own may do anything: only a process
can be ended at any moment. It takes one request at a time, a line of JSON each, and answers with one. An answer repeats the
`id` of its request; what else is written to the socket is no answer.

    {"name", "pattern", "key", "seconds"}   first: the verifier           -> {"asks": names, "async": bool} or {"at_fault": UserError}
    {"response", "reference", "try",        a response to judge; try: a reference to try, without the pattern; answer: also
     "prompt", "record", "answer"}          say what the response answers
                                            -> {"reward", "parts", "answer"}, {"failed": reason} or {"at_fault": UserError}
    {"several": requests}                   to an `async` verifier: all at once   -> {"verdicts": [one for each]}
"""

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from actors.config import VerifierConfig
from actors.data.verifiers import BUILT_IN, Verifier, answer_of, asks_for, make_async_verifier, make_verifier, trial
from actors.errors import UserError

PR_SET_PDEATHSIG = 1
LOWEST_DESCRIPTOR = 200
"""Of the socket."""
MOST_GROWTH = 1 << 30
"""Bytes by which the process may grow; then it ends after an answer, and a new one is started."""


def serve(file_descriptor: int) -> None:
    """Answers requests from this socket until it is closed, or the process that started this one is gone."""
    os.dup2(2, 1)  # a verifier may print; standard output belongs to the command that the user runs
    with contextlib.suppress(
        OSError, AttributeError
    ):  # Linux: the kernel ends this process with the one that started it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # Out of the way of a verifier that writes to or closes low descriptors, and of the programs that it starts.
    ours = fcntl.fcntl(file_descriptor, fcntl.F_DUPFD_CLOEXEC, LOWEST_DESCRIPTOR)
    os.close(file_descriptor)
    try:
        with socket.socket(fileno=ours) as connection, connection.makefile("rw", encoding="utf-8") as file:
            _serve(file.readline, lambda answer: _write(file, answer))
    except OSError:  # the verifier has closed the socket: judge.py tells that the process has ended
        os._exit(1)


def _serve(read: Callable[[], str], answer: Callable[[dict[str, Any]], None]) -> None:
    asked = json.loads(read())
    first = {"id": asked["id"]}
    config, seconds = VerifierConfig(asked["name"], asked["pattern"]), asked["seconds"]
    try:
        verify, attempt = make_verifier(config, asked["key"]), trial(config, asked["key"])
        answers = answer_of(config, asked["key"])
    except UserError as error:
        return answer(first | {"at_fault": error.to_json()})
    at_once = make_async_verifier(config, asked["key"])
    answer(first | {"asks": asks_for(config.name, asked["key"]), "async": at_once is not None})
    at_first = memory()
    while line := read():
        # Where nobody is left to end this process, its processor time does: the kernel needs no interpreter for that.
        signal.setitimer(signal.ITIMER_PROF, 60 + 10 * seconds)
        request = json.loads(line)
        if at_once is not None and "several" in request:
            several = asyncio.run(_verdicts(at_once, answers, request["several"], seconds))
            verdict: dict[str, Any] = {"verdicts": several}
        else:
            verdict = _verdict(attempt if request["try"] else verify, answers, request, config.name in BUILT_IN)
        answer(verdict | {"id": request["id"]})
        if memory() - at_first > MOST_GROWTH:
            return None
    return None


def _verdict(
    verify: Verifier, answers: Callable[[str], str | None], request: dict[str, Any], built_in: bool
) -> dict[str, Any]:
    try:
        return _told(verify(request["response"], request["reference"], **_aside(request)), answers, request)
    except UserError as error:
        if built_in or request["try"]:
            return {"at_fault": error.to_json()}
        return {"failed": f"{error.where}: {error.found}"}
    except BaseException as error:  # of a library, KeyboardInterrupt too; one response must not end the campaign
        return {"failed": f"{type(error).__name__}: {str(error)[:200]}"}


async def _verdicts(
    verify: Callable[..., Coroutine[Any, Any, float]],
    answers: Callable[[str], str | None],
    requests: list[dict[str, Any]],
    seconds: float,
) -> list[dict[str, Any]]:
    """The verdicts of an `async` verifier on several responses, which it judges at once, each within its time."""

    async def one(request: dict[str, Any]) -> dict[str, Any]:
        judged = asyncio.ensure_future(verify(request["response"], request["reference"], **_aside(request)))
        done, _ = await asyncio.wait([judged], timeout=seconds)
        if not done:
            judged.cancel()
            return {"late": True}
        return _verdict(lambda *_, **__: judged.result(), answers, request, built_in=False)

    return list(await asyncio.gather(*map(one, requests)))


def _aside(request: dict[str, Any]) -> dict[str, Any]:
    record = request.get("record")
    return {"prompt": request.get("prompt"), "record": None if record is None else json.loads(record)}


def _told(reward: float, answers: Callable[[str], str | None], request: dict[str, Any]) -> dict[str, Any]:
    verdict: dict[str, Any] = {"reward": reward, "parts": getattr(reward, "parts", {})}
    return verdict | ({"answer": answers(request["response"])} if request.get("answer") else {})


def _write(file: Any, answer: dict[str, Any]) -> None:
    file.write(json.dumps(answer) + "\n")
    file.flush()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def memory() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
