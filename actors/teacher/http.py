"""A teacher that is served elsewhere: any OpenAI-compatible server that returns the log-probs of a prompt's tokens.

The trajectory is sent as the prompt of `/completions`, as token ids. Two dialects are known, and which one a server
speaks is found out at the start: vLLM's `prompt_logprobs`, and `echo` with `logprobs` and token ids for tokens (vLLM,
SGLang and others). What a server leaves out is a missing score, never a number.

Requests that fail are tried again, elsewhere where there are several servers. A server that fails again and again is
left alone for a while (a circuit breaker), and the others take its work.
"""

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from actors.config import TeacherConfig
from actors.errors import CampaignError, UserError
from actors.heartbeat import beat
from actors.teacher.base import Scorer, probe
from actors.trajectory import Trajectories, offsets_of

ATTEMPTS = 6
"""Of one request, over all servers; waits between them grow from FIRST_WAIT_SECONDS to a minute."""
FIRST_WAIT_SECONDS = 0.5
FAILURES_TO_OPEN = 3
"""Failures in a row after which a server is left alone."""
OPEN_SECONDS = 30.0
REPEATS = 0.05
"""Nats by which an answer may differ when asked again: a server's batches are those of all its clients."""
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}


@dataclass
class _Server:
    url: str
    under_way: int = 0
    failures: int = 0
    """In a row."""
    closed_until: float = 0.0

    def failed(self) -> None:
        self.failures += 1
        if self.failures >= FAILURES_TO_OPEN:
            self.closed_until = time.monotonic() + OPEN_SECONDS


class _Refused(Exception):
    """The server has understood us, and will not: trying again would not help."""


class HttpTeacher(Scorer):
    """One client of the servers. Its self-test is that of every teacher, asked over the wire."""

    def __init__(self, config: TeacherConfig, key: str = "teacher", vocabulary: int | None = None):
        """Asks the servers a probe; `key` is the configuration key that errors name.

        vocabulary: rows of the student's output layer. UserError: no server answers, none returns log-probs of prompts,
        or the key's environment variable is not set.
        """
        self._config, self._key, self._name = config, key, key.rpartition(".")[2]
        self._vocabulary = vocabulary or 2**31 - 1
        self._servers = [_Server(url.rstrip("/")) for url in config.urls]
        self._headers = {}
        if config.api_key_variable is not None:
            secret = os.environ.get(config.api_key_variable)
            if not secret:
                raise UserError(f"{key}.api_key_variable", f"{config.api_key_variable}, which is not set", "a variable")
            self._headers = {"Authorization": f"Bearer {secret}"}
        self._echo = False
        self._find_dialect()
        self._self_test(key, vocabulary or 1024, REPEATS)

    def generate(
        self,
        prompt_tokens: np.ndarray,
        prompt_offsets: np.ndarray,
        max_response_tokens: int,
        stop_token_ids: list[int],
        pad_token_id: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's own greedy responses to B prompts: (tokens [N], offsets [B + 1])."""
        bodies = [
            {
                "prompt": row.tolist(),
                "max_tokens": max_response_tokens,
                "temperature": 0,
                "logprobs": 0,
                "stop_token_ids": stop_token_ids,
                "return_tokens_as_token_ids": True,
                "skip_special_tokens": False,
            }
            for row in np.split(prompt_tokens, prompt_offsets[1:-1])
        ]
        answers = asyncio.run(self._ask_all(bodies))
        rows = [np.array([_token_id(t) for t in _choice(a)["logprobs"]["tokens"]], np.int32) for a in answers]
        return np.concatenate(rows), offsets_of(map(len, rows))

    def _find_dialect(self) -> None:
        text = probe(self._vocabulary).response_tokens[:4].tolist()
        problems = []
        for self._echo in (False, True):
            try:
                [answer] = asyncio.run(self._ask_all([self._body(text)]))
                if np.isfinite(self._read(answer, text, 1)[0][:, 0]).all():
                    return
                problems.append("no log-probs of prompts in its answer")
            except CampaignError as error:
                problems.append(str(error))
        expected = "servers that answer and return log-probs of prompts"
        raise UserError(f"{self._key}.urls", f"{', '.join(self._config.urls)} ({problems[0]})", expected)

    def _body(self, text: list[int]) -> dict[str, Any]:
        count = self._config.top_k if self._config.signal == "topk" else 0
        if self._echo:
            # One is the least that all servers understand as `with log-probs`.
            return {"prompt": text, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": max(count, 1),
                    "return_tokens_as_token_ids": True}  # fmt: skip
        return {"prompt": text, "max_tokens": 1, "temperature": 0, "prompt_logprobs": count}

    def _forward(self, trajectories: Trajectories) -> dict[str, np.ndarray]:
        """As Scorer. CampaignError: all servers have failed ATTEMPTS times."""
        texts = [
            np.concatenate(pair).tolist()
            for pair in zip(
                np.split(trajectories.prompt_tokens, trajectories.prompt_offsets[1:-1]),
                np.split(
                    np.minimum(trajectories.response_tokens, self._vocabulary - 1), trajectories.response_offsets[1:-1]
                ),
                strict=True,
            )
        ]
        answers = asyncio.run(self._ask_all([self._body(text) for text in texts]))
        read = [
            self._read(answer, text, int(length))
            for answer, text, length in zip(answers, texts, trajectories.lengths, strict=True)
        ]
        logprobs, ids = (np.concatenate(parts) for parts in zip(*read, strict=True))
        nothing = np.empty((len(logprobs), 0), np.float32)
        return {
            "logprobs": logprobs[:, 0].copy(),
            "support_ids": ids[:, 1:],
            "support_logprobs": logprobs[:, 1:],
            "hidden": nothing,
        }

    def _read(self, answer: dict[str, Any], text: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Log-probs and ids, [length, 1 + K] each: of the last `length` tokens of the text, and of the likeliest there.

        NaN: what the server has left out.
        """
        count = self._config.top_k if self._config.signal == "topk" else 0
        logprobs, ids = np.full((length, 1 + count), np.nan, np.float32), np.zeros((length, 1 + count), np.int32)
        choice = _choice(answer)
        if self._echo:
            found = choice.get("logprobs") or {}
            alike = list(zip(found.get("tokens") or [], found.get("token_logprobs") or [], strict=False))
            tops = found.get("top_logprobs") or [None] * len(alike)
            places = [
                {_token_id(token): value, **{_token_id(t): v for t, v in (top or {}).items()}}
                for (token, value), top in zip(alike, tops, strict=False)
            ]
        else:
            listed = choice.get("prompt_logprobs") or answer.get("prompt_logprobs") or []
            places = [{int(t): entry["logprob"] for t, entry in (place or {}).items()} for place in listed]
        for row, place in enumerate(range(len(text) - length, min(len(text), len(places)))):
            here = {token: value for token, value in places[place].items() if value is not None}
            likeliest = sorted(here.items(), key=lambda pair: -pair[1])[:count]
            logprobs[row, 0] = here.get(text[place], np.nan)
            for column, (token, value) in enumerate(likeliest, 1):
                ids[row, column], logprobs[row, column] = token, value
        return logprobs, ids

    async def _ask_all(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """One answer for each body, in their order."""
        limit = asyncio.Semaphore(self._config.requests_per_url * len(self._servers))
        timeout = aiohttp.ClientTimeout(total=self._config.timeout_seconds)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session:

            async def one(body: dict[str, Any]) -> dict[str, Any]:
                async with limit:
                    return await self._ask(session, {"model": self._config.model, **body})

            return await asyncio.gather(*(one(body) for body in bodies))

    async def _ask(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> dict[str, Any]:
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(min(60.0, FIRST_WAIT_SECONDS * 2 ** (attempt - 1)))
            # Those that are left alone come last: where all are, one must be asked all the same.
            now = time.monotonic()
            server = min(self._servers, key=lambda s: (s.closed_until > now, s.under_way))
            server.under_way += 1
            beat()
            try:
                answer = await _post(session, f"{server.url}/completions", body)
                server.failures = 0
                return answer
            except _Refused as error:
                raise CampaignError(f"{self._key}: {server.url} refuses: {error}") from error
            except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
                server.failed()
                problem = f"{server.url}: {type(error).__name__} {error}".strip()
            finally:
                server.under_way -= 1
        raise CampaignError(f"{self._key}: no server answers after {ATTEMPTS} attempts; the last: {problem}")


async def _post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post(url, json=body) as answer:
        if answer.status in TRANSIENT:
            raise aiohttp.ClientError(f"status {answer.status}")
        if answer.status != 200:
            raise _Refused(f"status {answer.status}, {(await answer.text())[:200]}")
        content = await answer.json()
        if not isinstance(content, dict) or not content.get("choices"):
            raise ValueError("an answer without choices")
        return content


def _choice(answer: dict[str, Any]) -> dict[str, Any]:
    return answer["choices"][0]


def _token_id(token: str) -> int:
    """`token_id:123` -> 123; -1 for a token that is given as text."""
    name, _, number = token.partition(":")
    return int(number) if name == "token_id" and number.isdigit() else -1
