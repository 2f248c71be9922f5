"""An environment that is a program (`environment.command`): it asks an OpenAI-compatible endpoint, and the student answers.

    start -> its first request: the prompt -> [the student's turn] -> its next request: the new messages -> ... -> it ends: the reward

A request may go on from any of the episode's turns, or begin another conversation (conversation.py).

Each episode starts the program anew, as a process group of its own, which ends with the episode. Should this process die, a small
one beside it ends the programs that are left.
"""

import asyncio
import itertools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from actors.config import EnvironmentConfig, SamplingConfig
from actors.environment.base import Episode, Message, ProgramError, Turn
from actors.environment.endpoint import LOOPBACK, Endpoint
from actors.errors import UserError

TAIL = 2000
"""Bytes that are kept of the end of what a program writes to standard error."""
SHOWN = 300
"""Characters of it that messages show."""
GRACE_SECONDS = 2.0
"""A program gets SIGTERM, and so much later SIGKILL."""
LONGEST_VARIABLE = 2**17 - 100
"""Bytes of a variable, by Linux."""

# A process group is the only thing that outlives a process which is killed, and that another process can end.
LEASH = """
import os, shutil, signal, sys
if os.fork():  # so that it is no child, and is not ended with the others of a process that is ended with its children
    os._exit(0)
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


def program_place(command: list[str], folder: str) -> str | None:
    """Where the program is that a command names; None: nowhere."""
    return shutil.which(os.path.join(folder, command[0]) if "/" in command[0] else command[0], path=_path())


def check_command(config: EnvironmentConfig, folder: str) -> None:
    """UserError: there is no such program on this machine."""
    if program_place(config.command, folder) is None:
        named = config.command[0]
        if os.path.isfile(os.path.join(folder, named)):
            what = (
                "a file that may not be executed" if "/" in named else "which is not in PATH (./ names the file here)"
            )
        else:
            what = f"which is not in {folder}" if "/" in named and not os.path.isabs(named) else "which is not there"
        found = f"{named}, {what}"
        raise UserError("environment.command", found, "a program that can be run, and its arguments")


class Programs:
    """The programs of one process: makes an environment for each episode."""

    def __init__(self, config: EnvironmentConfig, sampling: SamplingConfig, folder: str, host: str = LOOPBACK):
        """folder: the programs' working directory. host: where they reach the endpoint. UserError: see `check_command`."""
        # A job's folder may lie elsewhere on other nodes, where it is this process's own.
        self.working_folder = folder if os.path.isdir(folder) else os.getcwd()
        check_command(config, self.working_folder)
        self.command, self.endpoint = config.command, Endpoint(sampling, config.tool_parser, host)
        self.numbers = itertools.count()
        self._leash: subprocess.Popen[bytes] | None = None
        self._rewards = ""

    def __call__(self) -> "Program":
        """The environment of a new episode."""
        return Program(self)

    def reward_file(self) -> Path:
        """A file for the reward of a new episode, which is not there yet."""
        self._start_leash()
        return Path(self._rewards) / str(next(self.numbers))

    def hold(self, group: int) -> None:
        """Ends this process group when this process dies."""
        self._tell(f"+{group}\n")

    def release(self, group: int) -> None:
        """It has ended."""
        self._tell(f"-{group}\n")

    def _tell(self, line: str) -> None:
        assert self._leash is not None and self._leash.stdin is not None
        with suppress(OSError):  # it was killed
            self._leash.stdin.write(line.encode())

    def _start_leash(self) -> None:
        if self._leash is None:
            self._rewards = tempfile.mkdtemp(prefix="understudy-programs-")
            command = [sys.executable, "-IS", "-c", LEASH, self._rewards]
            self._leash = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, bufsize=0)
            self._leash.wait()  # for the first of its two processes


class Program:
    """`Environment`: one run of the program, from its start to its end."""

    def __init__(self, programs: Programs):
        """Starts nothing yet."""
        self._programs, self._endpoint = programs, programs.endpoint
        self._process: asyncio.subprocess.Process | None = None
        self._key = ""
        self.tools: list[dict[str, Any]] = []
        """Of the last request."""
        self.after: int | None = None
        """The turn that the last request goes on from; None: it begins a conversation."""

    async def reset(self, record: dict[str, Any], episode: Episode) -> list[Message]:
        """Starts the program. Returns the messages of its first request. ProgramError: it has failed, or sends none."""
        try:
            url = await self._endpoint.url()
        except OSError as error:
            where = f"{self._endpoint.host} (environment.listen)"
            raise ProgramError(f"the endpoint cannot listen at {where}: {error.strerror}") from error
        self._reward = self._programs.reward_file()
        self._key, self._conversations = self._endpoint.open(str(episode.id).replace("/", "-"))
        variables = _variables(record, episode, url, self._key, self._reward)
        self._errors, theirs = await _tail()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._programs.command,
                cwd=self._programs.working_folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=theirs,
                start_new_session=True,
            )
        except OSError as error:
            raise ProgramError(
                f"the program cannot be started: {error.strerror}; or its interpreter is not there"
            ) from error
        finally:
            os.close(theirs)
        self._programs.hold(self._process.pid)
        new = await self._next()
        if new is None:
            raise ProgramError("the program has ended without a request" + await self._last_words())
        return new

    async def step(self, message: Message, turn: Turn) -> tuple[list[Message], bool, float | None]:
        """Answers the request that waits. Returns the new messages of the next one, or the reward if the program has ended.

        ProgramError: it has failed.
        """
        self._conversations.answer(message, turn)
        new = await self._next()
        return ([], True, self._written_reward()) if new is None else (new, False, None)

    async def close(self) -> None:
        """Ends the program and all that it has started in its process group."""
        self._endpoint.close(self._key)
        if self._process is None:
            return
        try:
            if self._process.returncode is None:
                self._signal(signal.SIGTERM)
                await asyncio.wait_for(self._process.wait(), GRACE_SECONDS)
        except TimeoutError:
            pass
        finally:
            self._signal(signal.SIGKILL)
            self._programs.release(self._process.pid)
            self._errors.close()
            self._reward.unlink(missing_ok=True)

    async def _next(self) -> list[Message] | None:
        """The new messages of the program's next request; None: it has ended well. ProgramError: it has failed."""
        assert self._process is not None
        asked, ended = asyncio.ensure_future(self._conversations.asked()), asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait({asked, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                found = asked.result()
                self.tools, self.after = found.tools, found.after
                return found.new
        finally:
            asked.cancel()
            ended.cancel()
        self._signal(signal.SIGKILL)  # to those that it has left behind
        if status := self._process.returncode:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            away = status == os.EX_TEMPFAIL
            raise ProgramError(f"the program has ended with {how}" + await self._last_words(), away=away)
        return None

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _written_reward(self) -> float | None:
        """What the program has written for its reward; None: nothing."""
        try:
            file = os.open(self._reward, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise ProgramError("the program has made something else than a file of UNDERSTUDY_REWARD")
            text = os.read(file, TAIL).decode("utf-8", "replace").strip()
        finally:
            os.close(file)
        try:
            return float(text)
        except ValueError as error:
            shown = text.replace(self._key, "…")[:80]
            raise ProgramError(f"the program has written {shown!r} to UNDERSTUDY_REWARD, expected a number") from error

    def so_far(self) -> str:
        """What is known of a program that takes too long."""
        if self._process is None:
            return "the program has not started"
        return f"the program still runs, and standard error ends with{self._words() or ' nothing'}"

    async def _last_words(self) -> str:
        """`_words` of a program that has ended."""
        await asyncio.wait({self._errors.closed}, timeout=1.0)  # open in a process that has left the group
        return self._words()

    def _words(self) -> str:
        """The end of what it has written to standard error, without its key, after a colon; empty: nothing."""
        text = " ".join(self._errors.text.decode("utf-8", "replace").replace(self._key, "…").split())
        return f": {'…' if len(text) > SHOWN else ''}{text[-SHOWN:]}" if text else ""


class _Tail(asyncio.Protocol):
    """Keeps the end of what a pipe delivers."""

    def __init__(self) -> None:
        self.text, self.closed = b"", asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self.close = transport.close

    def data_received(self, data: bytes) -> None:
        self.text = (self.text + data)[-TAIL:]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)


async def _tail() -> tuple[_Tail, int]:
    """What reads a new pipe, and the pipe's other end."""
    ours, theirs = os.pipe()
    _, tail = await asyncio.get_running_loop().connect_read_pipe(_Tail, os.fdopen(ours, "rb"))
    return tail, theirs


def _variables(record: dict[str, Any], episode: Episode, url: str, key: str, reward: Path) -> Mapping[str, str]:
    """The program's environment variables. ProgramError: the record is longer than one may be."""
    own = {
        "OPENAI_BASE_URL": url,
        "OPENAI_API_KEY": key,
        "UNDERSTUDY_RECORD": json.dumps(record),
        "UNDERSTUDY_EPISODE": str(episode.id),
        "UNDERSTUDY_SEED": str(episode.seed),
        "UNDERSTUDY_ATTEMPT": str(episode.attempt),
        "UNDERSTUDY_REWARD": str(reward),
    }
    if (length := len(own["UNDERSTUDY_RECORD"])) > LONGEST_VARIABLE:
        raise ProgramError(
            f"the record has {length} bytes as JSON, and an environment variable has room for {LONGEST_VARIABLE}"
        )
    # Without the cluster's token: a program may run what a model writes.
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    host = urlsplit(url).hostname
    direct = {name: ",".join(filter(None, (others.get(name), host))) for name in ("NO_PROXY", "no_proxy")}
    return {**others, **direct, "PATH": _path(), **own}


def _path() -> str:
    """PATH, with the programs of this Python first, as in its activated virtual environment."""
    return os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)))
