"""The conversation of a program with the student: its requests, one after another, and the student's turns that answer them.

The program and the environment meet here: requests come from an HTTP server (endpoint.py), answers from the episode (program.py).
A program sends its whole conversation with every request, as text. Only what is new in it is taken: the student's turns are told
by comparing messages, and stay the token ids that they were.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from actors.config import SamplingConfig
from actors.data.messages import check_unicode, messages_of, name_of, tools_of
from actors.environment.base import Message, Turn
from actors.environment.continuation import ROLES

ONE_CONVERSATION = "an episode is one conversation (docs/environments.md)"
IGNORED = {
    *("max_completion_tokens", "max_tokens", "seed", "parallel_tool_calls", "reasoning_effort", "verbosity"),
    *("metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"),
}
"""What a request may say without effect: the campaign decides how long turns are and from which seeds they are drawn."""
READ = {"model", "messages", "tools", "stream", "stream_options", "logprobs"}
"""What is read; and the name of the model, which is read by nobody, since there is one."""


class RefusedError(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, sentence: str):
        """status: of HTTP. sentence: what is wrong with the request."""
        super().__init__(sentence)
        self.status = status


class BranchError(Exception):
    """The program has asked for something else than the next turn of its conversation."""


@dataclass(eq=False)
class Asked:
    """A request for the student's turn."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    answer: asyncio.Future[tuple[Message, Turn]] = field(default_factory=asyncio.Future)
    readers: int = 0
    """Connections that wait for the answer: 0 after the program has given one up, which it may make again."""
    delivered: bool = False


class Conversation:
    """For one event loop, without locks."""

    def __init__(self, name: str):
        self.name = name
        self._last: Asked | None = None
        self._new: asyncio.Queue[list[Message] | BranchError] = asyncio.Queue()

    def ask(self, messages: list[Message], tools: list[dict[str, Any]]) -> Asked:
        """The request with these messages, as `read` returns them. RefusedError: it does not continue the conversation."""
        last = self._last
        if last is not None and _same(messages, last.messages) and not last.readers and not last.delivered:
            return last  # its connection was lost, and the program asks again
        try:
            new = messages if last is None else _continued(last, messages, tools)
        except BranchError as error:
            self._new.put_nowait(error)
            raise RefusedError(409, str(error)) from error
        self._last = Asked(messages, tools)
        self._new.put_nowait(new)
        return self._last

    async def asked(self) -> tuple[list[Message], list[dict[str, Any]]]:
        """Waits for the next request: (its new messages, its tools). BranchError: it does not continue the conversation."""
        new = await self._new.get()
        if isinstance(new, BranchError):
            raise new
        assert self._last is not None
        return new, self._last.tools

    def answer(self, message: Message, turn: Turn) -> None:
        """Answers the request that waits with the student's turn."""
        assert self._last is not None
        self._last.answer.set_result((message, turn))

    def close(self) -> None:
        """Nobody will answer."""
        if self._last is not None:
            self._last.answer.cancel()


def read(body: Any, sampling: SamplingConfig, tool_parser: str | None) -> tuple[list[Message], list[dict[str, Any]]]:
    """(messages, tools) of a request, as chat templates read them. RefusedError: it asks for what there is not."""
    if not isinstance(body, dict):
        raise RefusedError(400, "the body is no JSON object")
    only = _only(sampling)
    for name, value in body.items():
        if name in READ or name in IGNORED or value is None:
            continue
        if name not in only:
            raise RefusedError(400, f"{name} is not offered here; leave it out")
        if name == "tool_choice" and not body.get("tools"):
            continue  # there is nothing to choose
        if value not in only[name]:
            raise RefusedError(400, f"{name} is {value!r}, and here it is {only[name][0]!r}; leave it out")
    if not isinstance(body.get("stream_options") or {}, dict):
        raise RefusedError(400, "stream_options is no JSON object")
    try:
        messages = messages_of([_read(message) for message in _listed(body.get("messages"))], continued=False)
        tools = tools_of(body.get("tools")) or []
        check_unicode([messages, tools])
    except ValueError as error:
        raise RefusedError(400, f"messages or tools: {error}") from error
    if tools and tool_parser is None:
        found = "the request has tools, and no parser finds the student's calls of them: set environment.tool_parser"
        raise RefusedError(400, found)
    return messages, tools


def _only(sampling: SamplingConfig) -> dict[str, tuple[Any, ...]]:
    """Parameter -> the values that it may have."""
    return {
        "temperature": (sampling.temperature,),
        "top_p": (sampling.top_p,),
        "top_k": (sampling.top_k or -1, sampling.top_k),
        "min_p": (0,),
        "n": (1,),
        "stop": ([], ""),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "repetition_penalty": (1,),
        "logit_bias": ({},),
        "top_logprobs": (0,),
        "tool_choice": ("auto",),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
    }


def _listed(messages: Any) -> list[Any]:
    if not isinstance(messages, list):
        raise ValueError("messages is no list")
    return messages


def _read(message: Any) -> Any:
    """What OpenAI's clients write otherwise than data sets do."""
    if not isinstance(message, dict):
        return message
    if message.get("role") == "developer":  # OpenAI's newer name
        return {**message, "role": "system"}
    if message.get("role") == "assistant" and not message.get("content"):  # a turn of no text
        return {**message, "content": ""}
    return message


def _continued(last: Asked, messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    """The messages that are new since the last request. BranchError: they do not follow the student's answer to it."""
    if not last.answer.done():
        raise BranchError(f"a second request, before the first is answered; {ONE_CONVERSATION}")
    turn, _ = last.answer.result()
    before = [*last.messages, turn]
    nothing = not turn["content"].strip() and not turn.get("tool_calls")
    if nothing and not _same(messages[len(last.messages) : len(before)], [turn]):
        before = last.messages  # some clients leave out a turn of no text
    for number, (one, other) in enumerate(zip(before, messages, strict=False), 1):
        if not _same([one], [other]):
            which = "the one that was sent" if number == len(before) else "that of the request before"
            raise BranchError(f"message {number}, of the role {other['role']}, is not {which}; {ONE_CONVERSATION}")
    new = messages[len(before) :]
    if not new:
        raise BranchError(f"a request without a message after the student's last turn; {ONE_CONVERSATION}")
    if others := [message["role"] for message in new if message["role"] not in ROLES]:
        raise BranchError(
            f"a new message of the role {others[0]}, which the student has not written; {ONE_CONVERSATION}"
        )
    if tools != last.tools:
        raise BranchError(f"other tools than in the request before; {ONE_CONVERSATION}")
    return new


def _same(some: list[Message], others: list[Message]) -> bool:
    return [_compared(message) for message in some] == [_compared(message) for message in others]


def _compared(message: Message) -> tuple[Any, ...]:
    """What makes a message the same. Clients add fields to the student's, and some strip the spaces around it."""
    calls = [
        (call.get("id"), name_of(call), call.get("function", call).get("arguments"))
        for call in message.get("tool_calls", ())
    ]
    content = message["content"].strip() if message["role"] == "assistant" else message["content"]
    return message["role"], content, calls, message.get("tool_call_id")
