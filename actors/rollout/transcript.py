"""What is written in one episode: its conversations, turn by turn, and the trajectory that they become.

Most episodes have one conversation: a prompt, then the student's turns with the environment's words between them. A program may
hold several: of sub-agents, with a history that it has shortened, or several that go on from one turn. All stand in the response
of one trajectory, one conversation after another in the order in which they began:

    first:  prompt | turn, words, turn, words, turn
    others:        | what the student read before the first turn of its own | turn, words, turn     (`Trajectories.begins` at the bar)

So each turn is there, and is trained, once: a conversation that goes on from another's turn has that turn among what it reads.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from actors.environment.continuation import Message
from actors.trajectory import EVALUATION_EPOCH, FINISH_REASONS, PER_TOKEN, Requests, Trajectories, offsets_of


@dataclass(eq=False)
class Conversation:
    """One conversation while it is held."""

    first: Sequence[Message]
    """The messages that it began with; for one that goes on from another's turn those of the other."""
    tools: Any
    read: np.ndarray
    """Tokens that the student read before its first turn, int32."""
    turns: list[Trajectories] = field(default_factory=list)
    """A trajectory of each turn: its prompt is the whole text before it."""
    between: list[list[int]] = field(default_factory=list)
    """The environment's tokens after each turn but the last."""

    @property
    def length(self) -> int:
        """Tokens without `read`."""
        return sum(len(turn.response_tokens) for turn in self.turns) + sum(map(len, self.between))


class WrittenTurn(NamedTuple):
    """One of the student's turns."""

    conversation: Conversation
    written: Trajectories
    calls: Sequence[Any]
    """Tool calls in it."""


@dataclass
class Transcript:
    """An episode while it is played."""

    conversations: list[Conversation] = field(default_factory=list)
    turns: list[WrittenTurn] = field(default_factory=list)
    """Of all conversations, in the order in which they were written."""
    reward: float | None = None
    waited: float = 0.0
    """Seconds for which the environment was waited for."""
    began: float = field(default_factory=time.monotonic)

    @property
    def length(self) -> int:
        """Tokens of the response: of all conversations, without the prompt of the first."""
        return sum(one.length for one in self.conversations) + sum(len(one.read) for one in self.conversations[1:])

    def begin(self, first: Sequence[Message], tools: Any, read: np.ndarray) -> Conversation:
        """Another conversation, see there."""
        self.conversations.append(Conversation(first, tools, read))
        return self.conversations[-1]

    def follow(self, turn: WrittenTurn, words: list[int], most: int) -> tuple[Conversation, np.ndarray] | None:
        """The conversation that goes on from this turn with these words of the environment's, and all its tokens up to there.

        A turn that another has followed already gets a conversation of its own. None: the response would have `most` tokens
        or more.
        """
        own, written = turn.conversation, turn.written
        read = np.concatenate([written.prompt_tokens, written.response_tokens, np.array(words, np.int32)])
        goes_on = written is own.turns[-1]
        if self.length + (len(words) if goes_on else len(read)) >= most:
            return None
        if goes_on:
            own.between.append(words)
            return own, read
        return self.begin(own.first, own.tools, read), read

    def trajectory(self, own: Requests, finish: str) -> Trajectories:
        """What was written as one trajectory. own: the request, with the prompt as it was read.

        Tokens that the student did not write have the log-prob 0 and the version of a turn beside them: neither is read.
        """
        none = np.nan if own.ids[0, 0] == EVALUATION_EPOCH else 0.0  # an evaluation tells no reward from one of 0
        parts: defaultdict[str, list[np.ndarray]] = defaultdict(list)
        for number, one in enumerate(self.conversations):
            if number:
                _append(parts, one.turns[0], one.read, begins=True)
            for turn, words in zip(one.turns, [*one.between, []], strict=True):
                for name in PER_TOKEN:
                    parts[name].append(getattr(turn, name))
                parts["begins"].append(np.zeros(len(turn.response_tokens), bool))
                _append(parts, turn, np.array(words, np.int32))
        whole = {name: np.concatenate(own_parts) for name, own_parts in parts.items()}
        if len(self.conversations) == 1:
            del whole["begins"]
        return Trajectories(
            ids=own.ids,
            prompt_tokens=own.prompt_tokens,
            prompt_offsets=own.prompt_offsets,
            response_offsets=offsets_of([len(whole["response_tokens"])]),
            finish_reasons=np.array([FINISH_REASONS.index(finish)], np.uint8),
            rewards=np.array([none if self.reward is None else self.reward], np.float32),
            **whole,
        )


def _append(
    parts: dict[str, list[np.ndarray]], beside: Trajectories, tokens: np.ndarray, *, begins: bool = False
) -> None:
    """Appends tokens that the student did not write. beside: a turn beside them. begins: a conversation begins with them."""
    count = len(tokens)
    parts["response_tokens"].append(tokens)
    parts["behaviour_logprobs"].append(np.zeros(count, np.float32))
    parts["policy_versions"].append(np.full(count, beside.policy_versions[-1], np.int32))
    parts["trained"].append(np.zeros(count, bool))
    parts["support_ids"].append(np.zeros((count, beside.support_ids.shape[1]), np.int32))
    parts["unfiltered_logprobs"].append(np.zeros(count if beside.unfiltered_logprobs.size else 0, np.float32))
    parts["begins"].append(np.arange(count) == (0 if begins else -1))
