"""The teacher backend `http`: any OpenAI-compatible server that returns the log-probs of a prompt's tokens.

Prompt and response are sent together as the prompt of `/completions`, as token ids. The constructor detects which of two
dialects the servers speak: vLLM's `prompt_logprobs`, or `echo` with `logprobs` and token ids in place of tokens (vLLM,
SGLang and others). If a server leaves a log-prob out, the token's score is missing; it never becomes a number.

A failed request is retried, on the least busy server. A server that fails several times in a row gets no requests for a
while (a circuit breaker), and the other servers take its work.

No method is a coroutine: Ray would run the class in an event loop, where the constructor could not wait for answers.
"""

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import openai

from actors.config import TeacherConfig
from actors.errors import CampaignError, UserError
from actors.heartbeat import beat
from actors.teacher.base import Teacher, probe, texts_of
from actors.trajectory import Limits, Prompts, Trajectories, offsets_of

ATTEMPTS = 6
"""Attempts at one request, over all servers. The wait between them starts at FIRST_WAIT_SECONDS and doubles each time."""
FIRST_WAIT_SECONDS = 0.5
FAILURES_TO_OPEN = 3
"""Failures in a row that open a server's circuit: it then gets no requests."""
OPEN_SECONDS = 30.0
"""How long a circuit stays open."""
REPEATS = 0.05
"""Nats by which an answer may differ when asked again: the server batches our requests with those of other clients."""
# Timeouts, conflicts, rate limits, and faults of a server or gateway. Any other status would be the same in a retry.
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}


@dataclass
class _Server:
    url: str
    client: openai.OpenAI
    under_way: int = 0
    failures: int = 0
    """In a row."""
    open_until: float = 0.0
    """The circuit is open until this time (time.monotonic)."""

    def failed(self) -> None:
        # Only a success sets `failures` to 0. So after OPEN_SECONDS a single failure opens the circuit again.
        self.failures += 1
        if self.failures >= FAILURES_TO_OPEN:
            self.open_until = time.monotonic() + OPEN_SECONDS


class HttpTeacher(Teacher):
    """A client of one or several servers of the same model."""

    def __init__(self, config: TeacherConfig, key: str = "teacher", vocabulary: int | None = None):
        """Finds the servers' dialect and runs the self-test over the wire. `key` is the configuration key for errors.

        vocabulary: rows of the student's output layer. UserError: no server answers, none returns log-probs of prompts,
        or the environment variable with the servers' key is not set.
        """
        super().__init__(config, key, vocabulary)
        # Without Omit the client would send the user's own OPENAI_API_KEY to the servers.
        self._headers: dict[str, Any] = {"Authorization": openai.Omit()}
        if config.api_key_variable is not None:
            secret = os.environ.get(config.api_key_variable)
            if not secret:
                raise UserError(f"{key}.api_key_variable", f"{config.api_key_variable}, which is not set", "a variable")
            self._headers = {"Authorization": f"Bearer {secret}"}
        self._servers = [_Server(url.rstrip("/"), _client(url, config.timeout_seconds)) for url in config.urls]
        self._choosing = Lock()
        self._threads = ThreadPoolExecutor(config.requests_per_url * len(config.urls))
        self._echo = False
        self._find_dialect()
        # Without a known vocabulary, any token below 1024 is taken to exist.
        self.self_test(vocabulary or 1024, repeats=REPEATS)

    def generate(self, prompts: Prompts, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
        """Greedy responses: see Teacher."""
        options = {
            "max_tokens": limits.max_response_tokens,
            "stop_token_ids": limits.stop_token_ids,
            "logprobs": 0,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        }
        answers = self._ask_all({"prompt": row.tolist(), **options} for row in prompts.rows())
        rows = [np.array([_token_id(t) for t in _choice(a)["logprobs"]["tokens"]], np.int32) for a in answers]
        return np.concatenate(rows), offsets_of(map(len, rows))

    def _find_dialect(self) -> None:
        """Sets `_echo` to the first dialect whose answer to a short text has log-probs; UserError if none has."""
        text = probe(self.vocabulary).response_tokens[:4].tolist()
        problems = []
        for self._echo in (False, True):
            try:
                [answer] = self._ask_all([self._scoring_request(text)])
                if np.isfinite(self._read(answer, text, 1)[0][:, 0]).all():
                    return
                problems.append("no log-probs of prompts in its answer")
            except CampaignError as error:
                problems.append(str(error))
        expected = "servers that answer and return log-probs of prompts"
        raise UserError(f"{self.key}.urls", f"{', '.join(self.config.urls)} ({problems[0]})", expected)

    def _scoring_request(self, text: list[int]) -> dict[str, Any]:
        count = self.config.top_k if self.config.signal == "topk" else 0
        # The new token is discarded. Not 0: some servers refuse max_tokens=0.
        request = {"prompt": text, "max_tokens": 1}
        if not self._echo:
            return {**request, "prompt_logprobs": count}
        # Some servers read `logprobs: 0` as no log-probs at all.
        return {**request, "echo": True, "logprobs": max(count, 1), "return_tokens_as_token_ids": True}

    def score_tokens(self, trajectories: Trajectories) -> dict[str, np.ndarray]:
        """See Teacher. CampaignError: a server refuses, or none answers within ATTEMPTS attempts."""
        texts = texts_of(trajectories)
        answers = self._ask_all(self._scoring_request(text) for text in texts)
        read = [
            self._read(answer, text, int(length))
            for answer, text, length in zip(answers, texts, trajectories.lengths, strict=True)
        ]
        logprobs, ids = (np.concatenate(parts) for parts in zip(*read, strict=True))
        return {"logprobs": logprobs[:, 0].copy(), "support_ids": ids[:, 1:], "support_logprobs": logprobs[:, 1:]}

    def _read(self, answer: dict[str, Any], text: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
        """(log-probs, token ids), [length, 1 + K] each, for the last `length` tokens of the text.

        Column 0 is the token of the text, the others are the K likeliest tokens there. NaN: the server sent no log-prob.
        """
        count = self.config.top_k if self.config.signal == "topk" else 0
        logprobs, ids = np.full((length, 1 + count), np.nan, np.float32), np.zeros((length, 1 + count), np.int32)
        places = _echoed(_choice(answer)) if self._echo else _prompt_logprobs(answer)
        for row, place in enumerate(range(len(text) - length, min(len(text), len(places)))):
            here = {token: value for token, value in places[place].items() if value is not None}
            # Servers list the text's own token, too, so there may be K + 1: the sort drops one that is not among the K.
            likeliest = sorted(here.items(), key=lambda pair: -pair[1])[:count]
            logprobs[row, 0] = here.get(text[place], np.nan)
            for column, (token, value) in enumerate(likeliest, 1):
                ids[row, column], logprobs[row, column] = token, value
        return logprobs, ids

    def _ask_all(self, requests: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """One answer for each request, in their order; up to `requests_per_url` are under way at each server."""
        return list(self._threads.map(self._ask, requests))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request, after up to ATTEMPTS attempts. CampaignError: a refusal, or no answer."""
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
            with self._choosing:
                # Servers with an open circuit come last. They are not left out: if all circuits are open, one is asked.
                now = time.monotonic()
                server = min(self._servers, key=lambda s: (s.open_until > now, s.under_way))
                server.under_way += 1
            beat()
            try:
                answer = self._post(server, request)
                server.failures = 0
                return answer
            except openai.APIStatusError as error:
                if error.status_code not in TRANSIENT:
                    refusal = f"status {error.status_code}, {error.response.text[:200]}"
                    raise CampaignError(f"{self.key}: {server.url} refuses: {refusal}") from error
                problem = f"{server.url}: status {error.status_code}"
            except (openai.APIConnectionError, ValueError) as error:
                problem = f"{server.url}: {type(error).__name__} {error.__cause__ or error}".strip()
            finally:
                with self._choosing:
                    server.under_way -= 1
            server.failed()
        raise CampaignError(f"{self.key}: no server answers after {ATTEMPTS} attempts; the last: {problem}")

    def _post(self, server: _Server, request: dict[str, Any]) -> dict[str, Any]:
        # The client validates each element of its own arguments and makes an object of each log-prob in an answer. That
        # takes 4 times the processor time. So the request goes into extra_body, and the answer is read as raw JSON.
        answer = server.client.completions.with_raw_response.create(
            model=self.config.model, prompt="", extra_headers=self._headers, extra_body={"temperature": 0, **request}
        )
        content = answer.http_response.json()
        if not isinstance(content, dict) or not content.get("choices"):
            raise ValueError("an answer without choices")
        return content


def _client(url: str, timeout_seconds: float) -> openai.OpenAI:
    """A client that ignores the environment, where keys and names for OpenAI's own service may be set.

    max_retries=0: `_ask` retries, so that a retry can go to another server and each failure counts for the circuit.
    """
    connection = openai.DefaultHttpxClient(trust_env=False)
    client = openai.OpenAI(base_url=url, api_key="none", timeout=timeout_seconds, max_retries=0, http_client=connection)
    client.organization = client.project = None
    return client


def _choice(answer: dict[str, Any]) -> dict[str, Any]:
    return answer["choices"][0]


def _prompt_logprobs(answer: dict[str, Any]) -> list[dict[int, float | None]]:
    """For each token of the text: token id -> log-prob, from vLLM's `prompt_logprobs`."""
    listed = _choice(answer).get("prompt_logprobs") or answer.get("prompt_logprobs") or []
    return [{int(t): entry["logprob"] for t, entry in (place or {}).items()} for place in listed]


def _echoed(choice: dict[str, Any]) -> list[dict[int, float | None]]:
    """For each token of the text: token id -> log-prob, from the `logprobs` of an echoed prompt."""
    found = choice.get("logprobs") or {}
    own = list(zip(found.get("tokens") or [], found.get("token_logprobs") or [], strict=False))
    tops = found.get("top_logprobs") or [None] * len(own)
    return [
        {_token_id(token): value, **{_token_id(t): v for t, v in (top or {}).items()}}
        for (token, value), top in zip(own, tops, strict=False)
    ]


def _token_id(token: str) -> int:
    """`token_id:123` -> 123; -1 for a token that the server writes as text."""
    name, _, number = token.partition(":")
    return int(number) if name == "token_id" and number.isdigit() else -1
