"""Episodes: the student and an environment take turns, and what they write together is one trajectory (transcript.py).

    reset -> prompt -> [engine: one turn] -> step -> ids of the new messages -> [engine: the next turn] -> ... -> done

The student's tokens stay as the engine has sampled them, with its log-probs and versions; an environment's tokens are put between
them and are not trained on (`Trajectories.trained`). Each turn is a request of its own, whose seed follows from the episode's, so
an episode that is begun again, after a crash for example, draws the same tokens.
"""

import asyncio
import hashlib
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from actors.config import EnvironmentConfig, SamplingConfig
from actors.data.messages import tools_of
from actors.data.token_texts import token_texts
from actors.environment.base import Answer, EnvironmentLostError, Environments, Episode, Follows, Turn
from actors.environment.continuation import Continuation, Message, checked
from actors.errors import AbortedError, CampaignError, UserError
from actors.heartbeat import beat
from actors.rollout.away import Away
from actors.rollout.engine import Engine, Response, check_answer, trajectories_of
from actors.rollout.places import BEAT_SECONDS, Places
from actors.rollout.thinking import Thinking
from actors.rollout.transcript import Conversation, Transcript, WrittenTurn
from actors.trajectory import (
    FINISH_REASONS,
    EpisodeCounts,
    Requests,
    Trajectories,
    TrajectoryId,
    offsets_of,
    select_trajectories,
)

GRACE_SECONDS = 10.0
"""A process that has not answered for so much longer than a step may take is given up."""
LARGEST_REWARD = float(np.finfo(np.float32).max)
LONGEST_CAUSE = 500
"""Characters of a failure's cause that are kept."""


class EpisodeLimits(NamedTuple):
    """What an episode's text has to fit into."""

    tokens: int
    """Of prompt and response together, as engines and teachers can read them; 0: not known."""
    own_prompts: bool = True
    """Whether an environment may write the prompt: not where a teacher reads one that is made of the record."""
    needs_reward: bool = False


NO_LIMITS = EpisodeLimits(0)


class _FailedError(Exception):
    """One attempt has failed; the message says why."""


class _AwayError(_FailedError):
    """What the environment needs is away."""


class Episodes:
    """All episodes of one rollout actor. For one event loop, without locks."""

    def __init__(
        self,
        engine: Engine,
        config: EnvironmentConfig,
        continuation: Continuation,
        limits: EpisodeLimits,
        environments: Environments | None = None,
    ):
        """environments: None until `reach` is called. UserError: there is no tool parser of this name."""
        self._engine, self._config, self._write, self._limits = engine, config, continuation, limits
        self.thinking, self._away = Thinking(), Away(config.away_timeout_seconds)
        self._places = Places(environments, self.thinking, limited=config.episodes_per_replica is not None)
        self._names = itertools.count()
        self._running: defaultdict[tuple[int, ...], set[asyncio.Task]] = defaultdict(set)
        self._aborted: set[asyncio.Task] = set()
        self._known: dict[tuple[str, ...], str | None] = {}
        """Roles of an environment's messages -> what the template does to earlier turns then."""
        self._parse: Any = None
        if config.tool_parser is not None:
            from actors.environment.vllm_tool_parser import tool_parser

            self._parse = tool_parser(config.tool_parser, continuation.tokenizer)

    def reach(self, environments: Environments) -> None:
        """The processes that host environments from now on."""
        self._places.reach(environments)

    async def play(
        self, requests: Requests, sampling: SamplingConfig, greedy: bool
    ) -> tuple[Trajectories, tuple[EpisodeCounts, ...]]:
        """Plays B episodes at once: their trajectories and their counts, in the order of the requests.

        One that fails in all attempts has the cause in its counts, and a trajectory of one token that nobody trains on.
        Errors: AbortedError after `abort`; UserError for what fails in every episode; those of the engine.
        """
        rows = [asyncio.create_task(self._episode(requests, row, sampling, greedy)) for row in range(len(requests.ids))]
        for task, id_ in zip(rows, map(tuple, requests.ids.tolist()), strict=True):
            self._running[id_].add(task)
        try:
            played = await asyncio.gather(*rows)
        except asyncio.CancelledError:
            if self._aborted.isdisjoint(rows):  # the call itself is cancelled, not one of its episodes
                raise
            raise AbortedError("aborted") from None
        finally:
            for task, id_ in zip(rows, map(tuple, requests.ids.tolist()), strict=True):
                task.cancel()
                self._aborted.discard(task)
                self._running[id_].discard(task)
                if not self._running[id_]:
                    del self._running[id_]
        width = max(one.support_ids.shape[1] for one, _ in played)
        written = [_with_support(one, width) for one, _ in played]
        return select_trajectories(requests.ids, written), tuple(counts for _, counts in played)

    def abort(self, ids: np.ndarray | None = None) -> None:
        """Gives up the episodes with these ids [B, 3], or all; their calls end with AbortedError."""
        wanted = list(self._running) if ids is None else [tuple(row) for row in ids.tolist()]
        for id_ in wanted:
            for task in self._running.get(id_, ()):
                self._aborted.add(task)
                task.cancel()

    async def _episode(
        self, requests: Requests, row: int, sampling: SamplingConfig, greedy: bool
    ) -> tuple[Trajectories, EpisodeCounts]:
        own = _row(requests, row)
        id_, seed = TrajectoryId(*own.ids[0].tolist()), int(own.seeds[0])
        text, failures, name = Transcript(), 0, next(self._names)
        try:
            for attempt in itertools.count():
                text = Transcript(waited=text.waited, began=text.began)  # attempts that have failed took their time
                try:
                    played = await self._played(text, own, Episode(id_, seed, attempt), sampling, greedy)
                    self._away.ended(name)
                    return played
                except _AwayError as error:
                    cause, pause = str(error), self._away.found(name, str(error))
                except _FailedError as error:
                    cause, pause = str(error), None
                    self._away.ended(name)
                failures += pause is None
                if failures == self._config.attempts:
                    break
                if pause is not None:
                    await self._wait(text, pause)
            return self._failed(own, text, cause, attempt)
        finally:
            self._away.left(name)

    async def _played(
        self, text: Transcript, own: Requests, episode: Episode, sampling: SamplingConfig, greedy: bool
    ) -> tuple[Trajectories, EpisodeCounts]:
        """One attempt, from a place for it to its result. _FailedError."""
        key = f"{episode.id}/{episode.attempt}/{next(self._names)}"
        place, closed = await self._places.enter(episode.id, episode.attempt, key), False
        limit = self._config.episode_timeout_seconds
        try:
            async with asyncio.timeout(limit) as clock:
                asked, finish = await self._attempt(text, own, episode, key, place, sampling, greedy)
            closed = finish == "stop"  # an environment that is done is closed where it is
            return self._finished(asked, text, finish, episode.attempt)
        except TimeoutError as error:
            if not clock.expired():
                raise
            raise _FailedError(f"not over after {limit:g} s (environment.episode_timeout_seconds)") from error
        except EnvironmentLostError as error:
            self._places.lose(place)
            raise _FailedError(str(error)) from error
        finally:
            if not closed:
                self._places.in_background(place, key)

    async def _wait(self, text: Transcript, seconds: float) -> None:
        """The pause after an attempt, in which the episode has no place and no time limit runs."""
        text.waited += seconds
        with self.thinking.asking():
            while seconds > 0:
                await asyncio.sleep(min(seconds, BEAT_SECONDS))
                seconds -= BEAT_SECONDS
                beat()

    async def _attempt(
        self,
        text: Transcript,
        own: Requests,
        episode: Episode,
        key: str,
        place: Any,
        sampling: SamplingConfig,
        greedy: bool,
    ) -> tuple[Requests, str]:
        """One attempt, written into `text`: (the request with the prompt as it was read, the finish reason)."""
        aside = own.asides[0]
        record = json.loads(aside.record or "{}")
        begun = await self._ask(text, place, "reset", key, episode, record)
        tools = begun.tools if begun.tools is not None else tools_of(record.get(aside.tools_field))
        first = [
            {"role": "user", "content": "…"}
        ]  # which stands for the record's prompt: what follows does not depend on it
        if begun.messages is None and begun.tools:
            expected = "the messages too: the record's prompt was written without them"
            raise UserError(self._config.key, f"{self._config.title}, with tools, and None from reset", expected)
        if begun.messages is not None:
            first = _messages(begun.messages, "reset", first=True)
            own = self._with_prompt(own, first, tools, sampling)
        context = own.prompt_tokens
        talk = text.begin(first, tools, context)
        while True:
            room = sampling.max_response_tokens - text.length
            turn = _turn(own, context, episode.seed, len(text.turns))
            longest = min(room, self._config.max_turn_tokens or room)
            written = await self._written(turn, replace(sampling, max_response_tokens=longest), greedy)
            talk.turns.append(written)
            # A turn that is cut with room left is the environment's to answer.
            cut = FINISH_REASONS[written.finish_reasons[0]] != "stop" and len(written.response_tokens) >= room
            message = {} if cut else self._message(written.response_tokens, talk.tools, len(text.turns))
            text.turns.append(WrittenTurn(talk, written, message.get("tool_calls", ())))
            if cut:
                return own, "length"
            more = (self._told(written),) if self._config.command else ()
            answer = await self._ask(text, place, "step", key, message, *more)
            if answer.reward is not None:
                text.reward = (text.reward or 0.0) + answer.reward
                if abs(text.reward) > LARGEST_REWARD:
                    raise _FailedError(f"step: rewards of {text.reward:g} together, more than a 32-bit number holds")
            if answer.done:
                return own, "stop"
            goes_on = None
            if len(text.turns) < (own.max_turns or self._config.max_turns):
                goes_on = self._goes_on(text, answer, sampling.max_response_tokens)
            if goes_on is None:
                return own, "length"
            talk, context = goes_on

    def _goes_on(self, text: Transcript, answer: Answer, most: int) -> tuple[Conversation, np.ndarray] | None:
        """(the conversation in which the student writes its next turn, all tokens before that turn); None: there is no room."""
        follows = answer.follows or Follows(len(text.turns) - 1, [])
        if follows.turn is not None:
            turn = text.turns[follows.turn]
            new = _messages(answer.messages, "step", turn.calls)
            if text.length + self._write.least(new) >= most:
                return None
            talk, last = turn.conversation, int(turn.written.response_tokens[-1])
            return text.follow(turn, self._follows(talk.first, new, last, talk.tools), most)
        first = _messages(answer.messages, "step", first=True)
        if text.length + self._write.least(first) >= most:
            return None
        try:
            read = np.array(self._write.prompt(first, follows.tools), np.int32)
        except ValueError as error:  # which this conversation's words have led to: others may be fine
            raise _FailedError(f"a further conversation: {error}") from error
        if text.length + len(read) >= most:
            return None
        return text.begin(first, follows.tools, read), read

    async def _written(self, turn: Requests, sampling: SamplingConfig, greedy: bool) -> Trajectories:
        with self.thinking.writing():
            written = await asyncio.wrap_future(self._engine.generate(turn, sampling, greedy=greedy))
        check_answer(turn, written)
        return written

    async def _ask(self, text: Transcript, place: Any, method: str, key: str, *arguments: Any) -> Any:
        """What the environment answers; counts the seconds. _FailedError: it raised, or does not answer."""
        began, limit = time.monotonic(), self._config.step_timeout_seconds + GRACE_SECONDS
        asked = asyncio.ensure_future(self._places.call(place, method, key, *arguments))
        try:
            with self.thinking.asking():
                while not asked.done() and time.monotonic() - began < limit:
                    await asyncio.wait([asked], timeout=BEAT_SECONDS)
                    beat()
        finally:
            text.waited += time.monotonic() - began
            asked.cancel()
        if not asked.done() or asked.cancelled():
            raise _FailedError(f"{method}: its process has not answered for {limit:g} s")
        try:
            answer = asked.result()
        except EnvironmentLostError:
            raise
        except CampaignError as error:
            raise _FailedError(f"{method}: {error}") from error
        if answer.error:
            raise (_AwayError if answer.away else _FailedError)(answer.error)
        return answer

    def _with_prompt(self, own: Requests, first: Sequence[Message], tools: Any, sampling: SamplingConfig) -> Requests:
        """The request with the prompt that the environment has written. UserError: it may not write one.

        _FailedError: the template refuses it, or it is too long. What it is made of differs between the records.
        """
        if not self._limits.own_prompts:
            expected = "None: a teacher with prompt_template reads a prompt that is made of the record"
            raise UserError(self._config.key, f"{self._config.title}, which begins with messages", expected)
        room = self._limits.tokens - sampling.max_response_tokens if self._limits.tokens else None
        expected = f"expected at most {room}; prompts.max_prompt_tokens makes room for more"
        if room is not None and (least := self._write.least(first)) > room:
            raise _FailedError(f"the first messages: found {least} tokens or more, {expected}")
        try:
            ids = self._write.prompt(first, tools)
        except ValueError as error:
            raise _FailedError(f"the first messages: {error}") from error
        if room is not None and len(ids) > room:
            raise _FailedError(f"the first messages: found {len(ids)} tokens, {expected}")
        tokens = np.array(ids, np.int32)
        return replace(own, prompt_tokens=tokens, prompt_offsets=offsets_of([len(tokens)]))

    def _told(self, written: Trajectories) -> Turn:
        """What a program may ask of the student's turn besides its message."""
        tokens = written.response_tokens
        own = tokens[:-1] if int(tokens[-1]) in self._write.stop_token_ids else tokens
        return Turn(
            texts=token_texts(self._write.tokenizer, own.tolist()),
            logprobs=written.behaviour_logprobs[: len(own)].tolist(),
            tokens=len(tokens),
            context_tokens=len(written.prompt_tokens),
            version=int(written.policy_versions[-1]),
            cut=FINISH_REASONS[written.finish_reasons[0]] != "stop",
        )

    def _message(self, tokens: np.ndarray, tools: Any, turn: int) -> Message:
        """The student's turn as the environment reads it, without the token that ended it."""
        own = tokens[:-1] if int(tokens[-1]) in self._write.stop_token_ids else tokens
        if self._parse is None:
            return {"role": "assistant", "content": self._write.tokenizer.decode(own, skip_special_tokens=True)}
        # Parsers look for special tokens.
        return self._parse(self._write.tokenizer.decode(own, skip_special_tokens=False), tools, turn)

    def _follows(self, first: Sequence[Message], new: Sequence[Message], last: int, tools: Any) -> list[int]:
        """The ids that follow the student's turn. UserError: the template writes earlier turns otherwise from now on."""
        try:  # first: what the template refuses is no other text
            found = self._write.after(first, new, last, tools)
        except ValueError as error:  # as for a further conversation
            raise _FailedError(f"step: {error}") from error
        roles = tuple(message["role"] for message in new)
        if self._config.earlier_turns == "template" and roles not in self._known:
            self._known[roles] = self._write.difference(first, new, tools)
        if wrong := self._known.get(roles):
            raise UserError(
                "environment.earlier_turns",
                f"template, and a chat template that does not only append: {wrong}",
                WAY_OUT,
            )
        return found

    def _finished(
        self, asked: Requests, text: Transcript, finish: str, attempt: int
    ) -> tuple[Trajectories, EpisodeCounts]:
        if self._limits.needs_reward and text.reward is None and finish == "stop":
            raise _FailedError("it is over without a reward, and learner.objective uses rewards")
        written = text.trajectory(asked, finish)
        seconds = time.monotonic() - text.began
        self.thinking.ended(text.waited, seconds)
        counts = EpisodeCounts(
            turns=len(text.turns),
            prompt_tokens=len(asked.prompt_tokens),
            waited_seconds=text.waited,
            seconds=seconds,
            retries=attempt,
            conversations=len(text.conversations),
        )
        return written, counts

    def _failed(self, own: Requests, text: Transcript, cause: str, attempt: int) -> tuple[Trajectories, EpisodeCounts]:
        """What stands for an episode that has failed: one token, which is not trained on."""
        token, version = min(self._write.stop_token_ids), self._engine.version or 0
        stub = trajectories_of(own, [Response([token], [0.0], [version], "abort")])
        stub = replace(stub, trained=np.zeros(1, bool), rewards=np.zeros(1, np.float32))
        short = cause if len(cause) <= LONGEST_CAUSE else f"{cause[:LONGEST_CAUSE]}…"
        seconds = time.monotonic() - text.began
        counts = EpisodeCounts(0, len(own.prompt_tokens), text.waited, seconds, attempt, short)
        return stub, counts


WAY_OUT = (
    "a template that appends (messages of the role tool, or another chat_template in prompts.chat_template_arguments); or "
    "`written`, and to serve the student with a template that keeps earlier turns (docs/environments.md)"
)


def _messages(found: Any, method: str, calls: Sequence[Any] = (), *, first: bool = False) -> list[Message]:
    try:
        return checked(found, calls, first=first)
    except ValueError as error:
        raise _FailedError(f"{method} returned messages of another form: {error}") from error


def _row(requests: Requests, row: int) -> Requests:
    """One of the requests."""
    return Requests(
        ids=requests.ids[row : row + 1],
        seeds=requests.seeds[row : row + 1],
        prompt_tokens=requests.prompts[row],
        prompt_offsets=offsets_of([len(requests.prompts[row])]),
        asides=requests.asides[row : row + 1],
        max_turns=requests.max_turns,
    )


def turn_seed(seed: int, turn: int) -> int:
    """The sampler's seed of a turn; the first has that of the episode, as a single answer would."""
    digest = hashlib.blake2b(f"turn/{seed}/{turn}".encode(), digest_size=8).digest()
    return seed if turn == 0 else int.from_bytes(digest) >> 1


def _turn(own: Requests, context: np.ndarray, seed: int, turn: int) -> Requests:
    """The request for a turn: its prompt is all that was written before."""
    seeds = np.array([turn_seed(seed, turn)], np.int64)
    return replace(own, seeds=seeds, prompt_tokens=context, prompt_offsets=offsets_of([len(context)]))


def _with_support(one: Trajectories, width: int) -> Trajectories:
    """The same; one without the student's most likely tokens, which has failed, gets columns for them."""
    if one.support_ids.shape[1] == width:
        return one
    return replace(one, support_ids=np.zeros((len(one.response_tokens), width), np.int32))
