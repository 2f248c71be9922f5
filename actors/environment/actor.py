"""The environment actor: one process that hosts the environments of many episodes at once. A plain class.

Whatever a user's environment does costs one episode: what it raises comes back as a value, what it takes too long for is
cancelled, and an episode that is never closed is forgotten after its deadline. Code that blocks the process would stop all
episodes in it: after a step's time limit the process ends itself, and is replaced.
"""

import asyncio
import functools
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from actors.config import EnvironmentConfig, SamplingConfig
from actors.data.messages import check_unicode, tools_of
from actors.environment.base import Answer, Begun, Episode, Follows, ProgramError, Turn, environment_class, is_away
from actors.environment.endpoint import LOOPBACK
from actors.environment.program import Program, Programs
from actors.environment.shared_calls import SharedCalls

LOOK_SECONDS = 1.0
"""Between two signs of life that the watch asks of the event loop."""
COROUTINES = (
    "coroutines that give the process back within environment.step_timeout_seconds: work that blocks goes into a thread "
    "(await asyncio.to_thread(…), docs/environments.md)"
)
BLOCKED = 14
"""Exit status of a process whose event loop was blocked."""


class EnvironmentActor(SharedCalls):
    """Methods are coroutines, so that episodes overlap. key: names one attempt at one episode."""

    exit: Callable[[int], Any] = staticmethod(os._exit)
    """How the process ends; tests, which run in the same one, say otherwise."""

    def __init__(
        self, config: EnvironmentConfig, sampling: SamplingConfig | None = None, folder: str = "", host: str = LOOPBACK
    ):
        """sampling, folder: the campaign's, for programs, which reach the endpoint at `host`. UserError: see
        `environment_maker`."""
        super().__init__()
        self._config, self._make = config, environment_maker(config, sampling, folder, host)
        self._open: dict[str, tuple[Any, float]] = {}
        """Key -> the environment, and when it is forgotten, in seconds of time.monotonic()."""
        self._under_way: dict[str, asyncio.Task[Any]] = {}
        """Key -> the call of `reset` or `step` that has not returned."""
        self._closing: set[asyncio.Task[None]] = set()
        """Of the episodes that are over, and whose environment is being closed."""
        self._heard = time.monotonic()
        self._watch: threading.Thread | None = None

    async def enter(self, key: str) -> bool:
        """Takes a place for an episode; False: there is none now (`episodes_per_replica`)."""
        self._forget_late()
        most = self._config.episodes_per_replica
        if most is not None and len(self._open) + len(self._closing) >= most:
            return False
        self._open[key] = (None, time.monotonic() + self._config.episode_timeout_seconds)
        return True

    async def reset(self, key: str, episode: Episode, record: dict[str, Any]) -> Begun:
        """Makes an environment and begins the episode with it."""
        self._start_watch()
        self._forget_late()

        doing = "__init__"

        async def begin() -> Begun:
            nonlocal doing
            own = self._make()
            self._open[key] = (own, time.monotonic() + self._config.episode_timeout_seconds)
            doing = "reset"
            messages = await own.reset(record, episode)
            doing = "tools"
            return _begun(messages, getattr(own, "tools", None), parsed=self._config.tool_parser is not None)

        return await self._tried(key, begin(), lambda error: Begun(error=f"{doing} {error}"))

    async def step(self, key: str, message: dict[str, Any], *turn: Turn) -> Answer:
        """Gives the student's turn to the environment, and closes it where it is done. turn: where it is a program."""

        async def answer() -> Answer:
            if key not in self._open:
                late = f"step: the episode took longer than {self._config.episode_timeout_seconds:g} s"
                return Answer(error=f"{late} (environment.episode_timeout_seconds), or the process was replaced")
            own, _ = self._open[key]
            found = _answer(await own.step(message, *turn))
            return found._replace(follows=Follows(own.after, own.tools)) if turn and not found.done else found

        answered = await self._tried(key, answer(), lambda error: Answer(error=f"step {error}"))
        if answered.done and key in self._open:  # else forgotten meanwhile
            self._end(key)
        return answered

    async def close(self, key: str) -> None:
        """The episode is given up, or ends before the environment says that it is done."""
        if key in self._open:
            await self._end(key)

    async def forget(self, client: str) -> None:
        """Ends all episodes whose keys begin with `client/`: the process that played them has ended."""
        for key in [key for key in self._open if key.startswith(f"{client}/")]:
            self._end(key)

    def _end(self, key: str) -> asyncio.Task[None]:
        """Forgets an episode, and closes its environment in the background, which may take long."""
        own, _ = self._open.pop(key)
        closing = asyncio.create_task(self._close(own, self._under_way.get(key)))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return closing

    async def _close(self, own: Any, call: asyncio.Task[Any] | None) -> None:
        # First the call that is under way, which might make what nobody closes later.
        if call is not None:
            call.cancel()
            await asyncio.wait([call], timeout=self._config.step_timeout_seconds)
        if close := getattr(own, "close", None):
            # Of the user's code: the episode has its result already.
            with suppress(BaseException):
                async with asyncio.timeout(self._config.step_timeout_seconds):
                    await close()

    async def status(self) -> dict[str, int]:
        """The episodes that are open."""
        return {"episodes": len(self._open)}

    async def _tried(self, key: str, work: Awaitable[Any], failed: Callable[[str], Any]) -> Any:
        """What the work returns, or what `failed` makes of its error: `raised ...`, or `gave no answer ...`."""
        limit = self._config.step_timeout_seconds
        this = asyncio.current_task()
        assert this is not None
        self._under_way[key] = this
        try:
            async with asyncio.timeout(limit) as clock:
                return await work
        except TimeoutError as error:
            if clock.expired():
                own, _ = self._open.get(key, (None, 0.0))
                more = f"; {own.so_far()}" if isinstance(own, Program) else ""
                return failed(f"gave no answer within {limit:g} s (environment.step_timeout_seconds){more}")
            return failed(f"raised {told(error)}")
        except ProgramError as error:
            return failed(f"failed: {error}")._replace(away=is_away(error))
        except asyncio.CancelledError:
            if key in self._open:  # of the environment's own
                raise
            this.uncancel()
            return failed("was given up")
        except BaseException as error:  # KeyboardInterrupt would end the event loop, and with it all episodes
            return failed(f"raised {told(error)}")._replace(away=is_away(error))
        finally:
            self._under_way.pop(key, None)

    def _forget_late(self) -> None:
        """Ends the episodes that nobody has closed in their time."""
        now = time.monotonic()
        for key in [key for key, (_, until) in self._open.items() if until < now]:
            self._end(key)

    def _start_watch(self) -> None:
        if self._watch is None:
            loop = asyncio.get_running_loop()
            self._watch = threading.Thread(target=self._watch_loop, args=(loop,), daemon=True, name="environment-watch")
            self._heard = time.monotonic()
            self._watch.start()

    def _watch_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Ends the process when its event loop is blocked, so that its episodes can go on elsewhere."""
        while not loop.is_closed():
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._hear)
            time.sleep(min(LOOK_SECONDS, self._config.step_timeout_seconds / 4))
            silent = time.monotonic() - self._heard
            if silent > self._config.step_timeout_seconds:
                found = f"{self._config.title}, which has blocked its process for {silent:.0f} s"
                print(f"understudy: {self._config.key}: found {found}, expected {COROUTINES}", file=sys.stderr)
                self.exit(BLOCKED)
                return

    def _hear(self) -> None:
        self._heard = time.monotonic()


def environment_maker(
    config: EnvironmentConfig, sampling: SamplingConfig | None = None, folder: str = "", host: str = LOOPBACK
) -> Callable[[], Any]:
    """What makes the environment of an episode. UserError: see `environment_class` and `check_command`."""
    if config.command:
        return Programs(config, sampling or SamplingConfig(), folder, host)
    return functools.partial(environment_class(config), **config.arguments)


def told(error: BaseException) -> str:
    """What a user's code has raised, and where: one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"


def _begun(messages: Any, tools: Any, *, parsed: bool) -> Begun:
    """What `reset` returned, with the tools; an error where `tools` has another form.

    parsed: vLLM parses the calls, and wants each tool to be a function.
    """
    try:
        found = tools_of(list(tools) if isinstance(tools, tuple) else tools)
        check_unicode(found)
        if parsed and any("function" not in tool for tool in found or ()):
            raise ValueError("no function")
    except ValueError:
        expected = 'a list of JSON schemas, {"type": "function", "function": {"name": ..., "parameters": ...}}'
        return Begun(error=f"tools is {_short(tools)}, expected {expected}")
    return Begun(messages, found if found or tools is None else [])  # an empty list: none, whatever the record has


def _answer(returned: Any) -> Answer:
    """What `step` returned, as an Answer; an error where it has another form."""
    if not isinstance(returned, tuple | list) or len(returned) != 3:
        return Answer(error=f"step returned {_short(returned)}, expected (messages, done, reward)")
    messages, done, reward = returned
    # numpy's numbers and truth values too, which are what many environments return.
    try:
        if isinstance(done, str | bytes) or isinstance(reward, str | bytes):
            raise TypeError("text")  # which bool and float would take
        done, reward = bool(done), None if reward is None else float(reward)
    except (TypeError, ValueError, OverflowError):
        return Answer(error=f"step returned done = {_short(done)} and reward = {_short(reward)}, expected numbers")
    if reward is not None and not math.isfinite(reward):
        return Answer(error=f"step returned the reward {reward}, expected a finite number or None")
    return Answer(messages, done, reward)


def _short(value: Any) -> str:
    return repr(value)[:80]
