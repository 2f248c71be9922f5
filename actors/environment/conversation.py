"""The conversations of a program with the student in one episode: its requests, and the student's turns that answer them.

The program and the environment meet here: requests come from an HTTP server (endpoint.py), answers from the episode (program.py).
A program sends a whole conversation with every request, as text. Only what is new in it is taken: the student's turns are told
by comparing messages, and stay the token ids that they were. A request goes on from any of the episode's turns, or begins a
conversation of its own; requests that wait at the same time are answered in the order in which they came.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from actors.config import SamplingConfig
from actors.data.messages import check_unicode, messages_of, name_of, tools_of
from actors.environment.base import Message, Turn
from actors.environment.continuation import ROLES

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


@dataclass(eq=False)
class Asked:
    """A request for the student's turn."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    after: int | None
    """The number of the turn that it goes on from, of the episode's in the order in which they were written; None: it begins a
    conversation."""
    new: list[Message]
    """Its messages after that turn; all, where it begins a conversation."""
    compared: list[tuple[Any, ...]]
    """What makes each of its messages the same."""
    answer: asyncio.Future[tuple[Message, Turn]] = field(default_factory=asyncio.Future)
    readers: int = 0
    """Connections that wait for the answer: 0 after the program has given one up, which it may make again."""
    delivered: bool = False
    number: int = -1
    """Of the turn that answers it."""


class Conversations:
    """Of one episode. For one event loop, without locks."""

    def __init__(self, name: str):
        """name: begins the ids of the answers."""
        self.name = name
        self._open: list[Asked] = []
        """Those whose answer has not reached the program."""
        self._turns: list[tuple[Asked, list[tuple[Any, ...]]]] = []
        """Each request that was answered, and what makes its messages with the student's turn the same."""
        self._waiting: asyncio.Queue[Asked] = asyncio.Queue()
        self._current: Asked | None = None

    def ask(self, messages: list[Message], tools: list[dict[str, Any]]) -> Asked:
        """The request with these messages, as `read` returns them."""
        compared = [_compared(message) for message in messages]
        self._open = [one for one in self._open if not one.delivered]
        for one in self._open:
            if not one.readers and one.compared == compared and one.tools == tools:
                return one  # its connection was lost, and the program asks again
        asked = Asked(messages, tools, *self._place(messages, tools, compared), compared)
        self._open.append(asked)
        self._waiting.put_nowait(asked)
        return asked

    async def asked(self) -> Asked:
        """Waits for the next request, which `answer` then answers."""
        while True:
            one = await self._waiting.get()
            if one.readers:
                self._current = one
                return one
            self._open.remove(one)  # the program has given it up before its turn came

    def answer(self, message: Message, turn: Turn) -> None:
        """Answers the request that `asked` has returned with the student's turn."""
        assert self._current is not None
        self._current.number = len(self._turns)
        self._turns.append((self._current, [*self._current.compared, _compared(message)]))
        self._current.answer.set_result((message, turn))

    def close(self) -> None:
        """Nobody will answer."""
        for one in self._open:
            one.answer.cancel()

    def _place(
        self, messages: list[Message], tools: list[dict[str, Any]], compared: list[tuple[Any, ...]]
    ) -> tuple[int | None, list[Message]]:
        """(the turn that the messages go on from, those that are new): the turn with the most before it, of these the last."""
        found: tuple[int, int] | None = None
        for number, (asked, before) in enumerate(self._turns):
            if asked.tools != tools:
                continue
            # Some clients leave out a turn of no text.
            for told in [before] if _says_anything(before[-1]) else [before, before[:-1]]:
                length = len(told)
                new = messages[length:]
                if compared[:length] == told and new and all(message["role"] in ROLES for message in new):
                    found = max(found or (0, 0), (length, number))
                    break
        return (None, messages) if found is None else (found[1], messages[found[0] :])


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


def _says_anything(compared: tuple[Any, ...]) -> bool:
    """Whether a message, as `_compared` has it, has a text or calls."""
    _, content, calls, _ = compared
    return bool(content or calls)


def _compared(message: Message) -> tuple[Any, ...]:
    """What makes a message the same. Clients add fields to the student's, and some strip the spaces around it."""
    calls = [
        (call.get("id"), name_of(call), call.get("function", call).get("arguments"))
        for call in message.get("tool_calls", ())
    ]
    content = message["content"].strip() if message["role"] == "assistant" else message["content"]
    return message["role"], content, calls, message.get("tool_call_id")
