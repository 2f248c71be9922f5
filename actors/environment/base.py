"""What an environment of the user's own is, and what passes between it and a rollout actor.

An environment answers the student between its turns: a game, a sandbox that runs what the student writes, a program with tools.
`environment.name` is the import path of a class with the methods of `Environment`; docs/environments.md has one of 25 lines.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from actors.config import EnvironmentConfig
from actors.errors import CampaignError, UserError
from actors.import_path import check_arguments, check_call, import_object
from actors.trajectory import TrajectoryId

PAGE = "docs/environments.md"
Message = dict[str, Any]
"""A chat message, `{"role": "user", "content": "Higher."}`."""


class Episode(NamedTuple):
    """Which episode this is. Side effects can be keyed by the id; a retry has the same id and seed."""

    id: TrajectoryId
    """Epoch, prompt and sample; the epoch of an evaluation is -1."""
    seed: int
    """For whatever the environment draws, 0 <= seed < 2^63: a function of the id and the campaign's seed."""
    attempt: int = 0
    """0, or how often it was begun before."""


class Environment(Protocol):
    """One environment for one episode. All methods are coroutines: one process hosts many episodes, so work that blocks goes
    into a thread or a process (`await asyncio.to_thread(...)`). What one raises ends the episode, which is then begun again.
    """

    tools: Sequence[dict[str, Any]]
    """Optional: JSON schemas of the tools, for the chat template; in place of those of the record."""

    def __init__(self, **arguments: Any):
        """arguments: `environment.arguments`."""

    async def reset(self, record: dict[str, Any], episode: Episode) -> list[Message] | str | None:
        """Begins the episode. record: all fields of the prompt's record.

        Returns the messages that the student reads first (a text is one of the user's), or None for the record's prompt as it
        is.
        """

    async def step(self, message: Message) -> tuple[list[Message] | str, bool, float | None]:
        """Answers the student's turn: (messages, done, reward).

        message: `{"role": "assistant", "content": text}`, with `tool_calls` where `environment.tool_parser` has found any:
        `[{"id": ..., "type": "function", "function": {"name": ..., "arguments": {...}}}]`. A call that cannot be parsed is
        part of the text. messages: of the roles `user`, `tool` or `system`; read by the student unless `done`. The episode's reward is the
        sum of those of its turns; None: this turn has none.
        """

    async def close(self) -> None:
        """Optional: the episode is over, or given up. A `reset` or `step` that is under way then is cancelled first."""


class Turn(NamedTuple):
    """More of the student's turn than its message: for programs, which may ask for it (actors/environment/endpoint.py)."""

    texts: list[str]
    """Of each token, without the one that ended the turn."""
    logprobs: list[float]
    """Of the same tokens, under the distribution that they were sampled from."""
    tokens: int
    """All of them."""
    context_tokens: int
    """Those that the student read before."""
    version: int
    """Of the weights that sampled its last token."""
    cut: bool = False
    """Whether it was cut at `environment.max_turn_tokens`."""


class AwayError(Exception):
    """To be raised by an environment: what it needs, such as a server, is away. The attempt is made again, for up to
    `environment.away_timeout_seconds`. So it is after a ConnectionError of Python's own."""


class ProgramError(Exception):
    """A program that plays an episode has failed; the message says how."""

    def __init__(self, problem: str, *, away: bool = False):
        """away: the program says that what it needs is away."""
        super().__init__(problem)
        self.away = away


def is_away(error: BaseException) -> bool:
    """Whether an environment has raised this because what it needs is away.

    Not a broken pipe: it is mostly that of a process that the student's own code has ended, in each attempt.
    """
    connection = isinstance(error, ConnectionError) and not isinstance(error, BrokenPipeError)
    return connection or isinstance(error, AwayError) or (isinstance(error, ProgramError) and error.away)


class EnvironmentLostError(CampaignError):
    """The process of an environment has died, or does not answer."""


class Follows(NamedTuple):
    """Which of an episode's conversations a program goes on with."""

    turn: int | None
    """The number of the student's turn that its messages follow, from 0 in the episode; None: they begin a conversation."""
    tools: list[dict[str, Any]]
    """Those of the conversation."""


class Begun(NamedTuple):
    """What `reset` has returned."""

    messages: Any = None
    tools: Any = None
    error: str = ""
    """What `__init__`, `reset` or `tools` is at fault of, in one line; empty: nothing."""
    away: bool = False
    """See `is_away`."""


class Answer(NamedTuple):
    """What `step` has returned."""

    messages: Any = None
    done: bool = False
    reward: float | None = None
    error: str = ""
    """What it raised, or what is wrong with what it returned, in one line; empty: nothing."""
    follows: "Follows | None" = None
    """What the messages follow, where it is a program; None: the last turn."""
    away: bool = False
    """See `is_away`."""


class Environments(Protocol):
    """The processes that host environments, as a rollout actor reaches them."""

    places: Sequence[Any]
    """Those that can host a new episode."""

    async def call(self, place: Any, method: str, *arguments: Any) -> Any:
        """Calls a method of EnvironmentActor. EnvironmentLostError: the process is gone."""


def environment_class(config: EnvironmentConfig) -> type[Environment]:
    """The class that `environment.name` names.

    UserError: it cannot be imported, a method is missing, is no coroutine, or takes other arguments.
    """
    key = "environment.name"
    name = str(config.name)
    found: Any = import_object(name, key, "a class")
    wrong = [one for one in ("reset", "step") if not inspect.iscoroutinefunction(getattr(found, one, None))]
    if not isinstance(found, type) or wrong:
        what = f"without {' and '.join(f'async def {one}' for one in wrong)}" if wrong else "which is no class"
        expected = f"a class with async def reset(record, episode) and async def step(message) ({PAGE})"
        raise UserError(key, f"{name} {what}", expected)
    own: Any = found
    check_arguments(own, config.arguments, "environment.arguments", name, PAGE)
    check_call(own.reset, 3, (), key, f"{name}.reset", "reset(record, episode)", PAGE)
    check_call(own.step, 2, (), key, f"{name}.step", "step(message)", PAGE)
    return own
