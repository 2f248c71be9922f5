"""An HTTP server that answers as OpenAI's chat completions do, for the programs of one environment actor.

It listens at a port of its own, on loopback or where it is told to. The key of a request tells which episode it belongs to; a key is valid from the
program's start to its end, and is written nowhere.
"""

import asyncio
import itertools
import json
import secrets
from collections.abc import Iterator
from typing import Any

from aiohttp import web

from actors.config import SamplingConfig
from actors.environment.base import Message, Turn
from actors.environment.conversation import Conversations, RefusedError, read

LOOPBACK = "127.0.0.1"
MODEL = "student"
LARGEST_BODY = 64 * 2**20
"""Bytes of a request."""


class Endpoint:
    """For one event loop, in which it serves until the loop ends."""

    def __init__(self, sampling: SamplingConfig, tool_parser: str | None, host: str = LOOPBACK):
        """sampling: what a request may not change. tool_parser: the campaign's; None: requests may have no tools. host: the
        address of this machine that it listens at."""
        self._sampling, self._tool_parser = sampling, tool_parser
        self.host, self._names = host, itertools.count()
        self._episodes: dict[str, tuple[str, Conversations]] = {}
        """The part of a key that is no secret -> the key, and the conversations of its episode."""
        self._url: asyncio.Task[str] | None = None

    async def url(self) -> str:
        """The base URL that clients need; the first call starts the server. OSError: it cannot listen."""
        if self._url is None:
            self._url = asyncio.ensure_future(self._serve())
        return await asyncio.shield(self._url)

    def open(self, name: str) -> tuple[str, Conversations]:
        """The conversations of a new episode, and the key of their requests. name: begins the ids of the answers."""
        public = f"sk-{next(self._names)}"
        self._episodes[public] = f"{public}-{secrets.token_hex(24)}", Conversations(name)
        return self._episodes[public]

    def close(self, key: str) -> None:
        """Requests with this key are refused from now on."""
        if of_episode := self._episodes.pop(key.rpartition("-")[0], None):
            of_episode[1].close()

    async def _serve(self) -> str:
        app = web.Application(client_max_size=LARGEST_BODY, middlewares=[_errors_as_json])
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        # A program that gives up a request closes its connection.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, self.host, 0)
        await site.start()
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{runner.addresses[0][1]}/v1"

    def _of_episode(self, request: web.Request) -> Conversations:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = ""
        expected, found = self._episodes.get(key.rpartition("-")[0], ("", None))
        # In constant time: how long it takes does not tell how much of a key is right.
        same = secrets.compare_digest(key.encode("utf-8", "backslashreplace"), expected.encode())
        if found is None or not same:
            raise RefusedError(401, "no key of an episode that is running; use that of OPENAI_API_KEY")
        return found

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self._of_episode(request)
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "understudy"}
        return web.json_response({"object": "list", "data": [model]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        episode = self._of_episode(request)
        try:
            body = await request.json()
        # LookupError: an unknown charset. RequestPayloadError: it is not compressed as it says.
        except (ValueError, LookupError, RecursionError, web.RequestPayloadError) as error:
            raise RefusedError(400, f"the body is no JSON: {error}") from error
        asked = episode.ask(*read(body, self._sampling, self._tool_parser))
        asked.readers += 1
        try:
            message, turn = await asyncio.shield(asked.answer)
            name = f"{episode.name}-{asked.number}"
            response = await _written(request, body, completion(name, message, turn, bool(body.get("logprobs"))))
            asked.delivered = True
            return response
        finally:
            asked.readers -= 1


@web.middleware
async def _errors_as_json(request: web.Request, handler: Any) -> web.StreamResponse:
    """Errors as clients read them. They are final: a client that asks again would get the same answer."""
    try:
        return await handler(request)
    except RefusedError as error:
        status, sentence = error.status, str(error)
    except web.HTTPException as error:
        found = f"{request.method} {request.path} ({error.reason})"
        status, sentence = error.status, f"{found}; this endpoint answers POST /v1/chat/completions and GET /v1/models"
    body = {"error": {"message": sentence, "type": "invalid_request_error", "param": None, "code": None}}
    return web.json_response(body, status=status, headers={"x-should-retry": "false"})


def completion(name: str, message: Message, turn: Turn, logprobs: bool) -> dict[str, Any]:
    """A chat completion: the student's turn as OpenAI writes one. name: ends its id."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    told: dict[str, Any] = {"role": "assistant", "content": message["content"]}
    if calls:
        told = {"role": "assistant", "content": message["content"] or None, "tool_calls": calls}
    finish = "tool_calls" if calls else "length" if turn.cut else "stop"
    tokens = [
        {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
        for text, logprob in zip(turn.texts, turn.logprobs, strict=True)
    ]
    choice = {
        "index": 0,
        "message": told,
        "finish_reason": finish,
        "logprobs": {"content": tokens} if logprobs else None,
    }
    return {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": 0,  # the same in an episode that is begun again
        "model": MODEL,
        "system_fingerprint": f"version-{turn.version}",
        "choices": [choice],
        "usage": {
            "prompt_tokens": turn.context_tokens,
            "completion_tokens": turn.tokens,
            "total_tokens": turn.context_tokens + turn.tokens,
        },
    }


def chunks(whole: dict[str, Any], usage: bool) -> Iterator[dict[str, Any]]:
    """A completion as a stream has it: the whole turn in one piece, then its end. usage: and then its counts."""
    [choice] = whole["choices"]
    delta = dict(choice["message"])
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": place, **call} for place, call in enumerate(delta["tool_calls"])]
    common = {name: whole[name] for name in ("id", "created", "model", "system_fingerprint")}
    common |= {"object": "chat.completion.chunk", **({"usage": None} if usage else {})}
    for part, logprobs, finish in ((delta, choice["logprobs"], None), ({}, None, choice["finish_reason"])):
        yield {**common, "choices": [{"index": 0, "delta": part, "logprobs": logprobs, "finish_reason": finish}]}
    if usage:
        yield {**common, "choices": [], "usage": whole["usage"]}


async def _written(request: web.Request, body: dict[str, Any], whole: dict[str, Any]) -> web.StreamResponse:
    """Sends the completion. OSError, CancelledError: the connection was lost."""
    if not body.get("stream"):
        answer = web.json_response(whole)
        await answer.prepare(request)
        await answer.write_eof()
        return answer
    usage = bool((body.get("stream_options") or {}).get("include_usage"))
    stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await stream.prepare(request)
    for chunk in chunks(whole, usage):
        await stream.write(f"data: {json.dumps(chunk)}\n\n".encode())
    await stream.write(b"data: [DONE]\n\n")
    await stream.write_eof()
    return stream
