"""The teacher backend `http`: any OpenAI-compatible server that returns the log-probs of a prompt's tokens.

Prompt and response are sent together as the prompt of `/completions`, as token ids. The constructor detects which of two
dialects the servers speak: vLLM's `prompt_logprobs`, or `echo` with `logprobs` and token ids in place of tokens (vLLM,
SGLang and others). If a server leaves a log-prob out, the token's score is missing; it never becomes a number.

http_servers.py says which server is asked, and how long one that is away is waited for; http_answers.py reads answers.

No method is a coroutine: Ray would run the class in an event loop, where the constructor could not wait for answers.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from actors.config import SamplingConfig, TeacherConfig
from actors.errors import CampaignError, UnavailableError, UserError
from actors.teacher.base import UNBOUNDED, known_prompts, probe, texts_of
from actors.teacher.http_answers import most_bytes, scores, written_tokens
from actors.teacher.http_servers import (
    FAILURES_TO_OPEN,
    PROBE_TOLERANCE,
    REFUSALS,
    RefusedError,
    Server,
    ServerFault,
    Servers,
)
from actors.teacher.writing import WritingTeacher
from actors.trajectory import Limits, Prompts, Trajectories, offsets_of

Value = TypeVar("Value")

STARTING_ATTEMPTS = 3
"""Times that a server is asked the probe at the start."""
SEEDS = 2**31
"""Servers read a seed as an integer of 32 or 64 bits, with a sign."""


class HttpTeacher(WritingTeacher):
    """A client of one or several servers of the same model."""

    def __init__(self, config: TeacherConfig, key: str = "teacher", vocabulary: int | None = None):
        """Finds the servers' dialect and runs the self-test over the wire. `key` is the configuration key for errors.

        vocabulary: rows of the student's output layer. UserError: no server answers, none returns log-probs of prompts,
        or the environment variable with the servers' key is not set.
        """
        super().__init__(config, key, vocabulary)
        secret = ""
        if config.api_key_variable is not None:
            secret = os.environ.get(config.api_key_variable, "").strip()
            if not secret:
                raise UserError(f"{key}.api_key_variable", f"{config.api_key_variable}, which is not set", "a variable")
            if not (secret.isascii() and secret.isprintable()):
                found = f"{config.api_key_variable}, whose value cannot be a header"
                raise UserError(f"{key}.api_key_variable", found, "printable ASCII characters in one line")
        self._servers = Servers(
            key,
            config.urls,
            secret,
            timeout_seconds=config.timeout_seconds,
            per_url=config.requests_per_url,
            away_timeout_seconds=config.away_timeout_seconds,
        )
        self._threads = ThreadPoolExecutor(config.requests_per_url * len(config.urls))
        self._echo = False
        self._find_dialect()
        # Without a known vocabulary, any token below 1024 is taken to exist.
        self._probe_text = [int(t) for t in probe(vocabulary or 1024).response_tokens]
        self._find_rows()
        self._compare_servers()
        self.self_test(min(vocabulary or 1024, self.vocabulary), repeats=PROBE_TOLERANCE)
        self._servers.patient = True

    def generate(self, prompts: Prompts, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
        """Greedy responses: see Teacher."""
        prompts, limits = known_prompts(prompts, limits, self.vocabulary)
        rows = self._written(prompts, limits, [{"temperature": 0}] * len(prompts.rows()))
        for row in rows:
            if isinstance(row, RefusedError):
                raise CampaignError(f"{self.key}: a prompt cannot be answered: {row}")
        return np.concatenate([row for row in rows if not isinstance(row, RefusedError)]), offsets_of(map(len, rows))  # type: ignore[arg-type]

    def write(
        self, prompts: Prompts, limits: Limits, sampling: SamplingConfig, seeds: np.ndarray
    ) -> list[np.ndarray | str]:
        """See WritingTeacher. CampaignError: no server has answered for `away_timeout_seconds`."""
        drawn: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.top_k:  # not of OpenAI's own interface: sent only where it is needed
            drawn["top_k"] = sampling.top_k
        rows = self._written(prompts, limits, [{**drawn, "seed": seed % SEEDS} for seed in seeds.tolist()])
        return [str(row) if isinstance(row, RefusedError) else row for row in rows]

    def _written(
        self, prompts: Prompts, limits: Limits, options: Sequence[dict[str, Any]]
    ) -> list[np.ndarray | RefusedError]:
        """The token ids of a response to each prompt. options: how each is sampled, in the words of the interface."""
        common = {
            "model": self.config.model,
            "max_tokens": limits.max_response_tokens,
            "stop_token_ids": limits.stop_token_ids,
            "logprobs": 0,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        }
        size = most_bytes(limits.max_response_tokens, 1)
        requests = [{"prompt": row.tolist(), **common, **own} for row, own in zip(prompts.rows(), options, strict=True)]
        most = limits.max_response_tokens
        return self._ask_all((request, size, lambda answer: written_tokens(answer, most)) for request in requests)

    def full_length_test(self, tokens: int) -> None:
        """Scores a text of as many tokens, the longest that the campaign may send, at every server that answers.

        UserError: a server refuses it.
        """
        text = (self._probe_text * (tokens // len(self._probe_text) + 1))[:tokens]
        for server in self._servers.servers:
            try:
                if server.probe is not None:
                    self._score_at(server, text)
            except ServerFault as fault:
                expected = (
                    f"a context of {tokens} tokens and one more: the longest prompt and sampling.max_response_tokens"
                )
                raise UserError(f"{self.key}.urls", fault, expected) from None

    def _find_dialect(self) -> None:
        """Sets `_echo` to the first dialect whose answer to a short text has log-probs; UnavailableError if none has."""
        text = probe(self.vocabulary).response_tokens[:4].tolist()
        problems = []
        for self._echo in (False, True):
            try:
                found = self._servers.ask(*self._scoring(text, 1))
                if np.isfinite(found[0][:, 0]).all():
                    return
                problems.append("no log-probs of prompts in its answer")
            except (CampaignError, RefusedError) as error:
                problems.append(str(error))
        expected = "servers that answer and return log-probs of prompts"
        raise UnavailableError(f"{self.key}.urls", f"{', '.join(self.config.urls)} ({problems[0]})", expected)

    def _find_rows(self) -> None:
        """Lowers `vocabulary` to the ids that the servers accept: they refuse a whole text with an id beyond their rows."""
        if self.vocabulary == UNBOUNDED:
            return

        def accepts(server: Server, token: int) -> bool | None:
            try:
                self._score_at(server, [self._probe_text[0], token, self._probe_text[0]])
            except ServerFault as fault:
                return False if fault.status in (*REFUSALS, 500) else None
            return True

        for server in self._servers.servers:
            known, unknown = max(self._probe_text), self.vocabulary - 1
            # A server that does not accept what it must has another fault, which the self-test tells.
            if accepts(server, unknown) is not False or not accepts(server, known):
                continue
            while unknown - known > 1:
                middle = (known + unknown) // 2
                known, unknown = (middle, unknown) if accepts(server, middle) else (known, middle)
            self.vocabulary = unknown

    def _compare_servers(self) -> None:
        """Keeps each server's answer to the probe. UserError: two of them are of other models."""
        for server in self._servers.servers:
            for _ in range(STARTING_ATTEMPTS):
                try:
                    server.probe = self._score_at(server, self._probe_text)
                    break
                except ServerFault:  # away, or at fault: it has to answer the probe before it gets work
                    server.failures = FAILURES_TO_OPEN
        self._servers.try_probe = lambda server: self._score_at(server, self._probe_text)
        known = [server for server in self._servers.servers if server.probe is not None]
        for one, other in itertools.pairwise(known):
            difference = np.abs(one.probe - other.probe).max()  # type: ignore[operator]
            if difference > PROBE_TOLERANCE:
                found = f"{one.url} and {other.url}, whose log-probs of one text differ by {difference:.3g}"
                raise UserError(f"{self.key}.urls", found, "servers of one model")

    def _score_at(self, server: Server, text: list[int]) -> np.ndarray:
        """[tokens - 1] log-probs of a text after its first token, from this server. ServerFault: it does not send them."""
        found = self._servers.ask_one(server, *self._scoring(text, len(text) - 1))[0][:, 0]
        if not np.isfinite(found).all():
            raise ServerFault(f"{server.url}: an answer without log-probs")
        return found

    def _scoring(self, text: list[int], length: int) -> tuple[dict[str, Any], int, Callable[[dict[str, Any]], Any]]:
        """(request, most bytes of its answer, what reads the answer) for the last `length` tokens of a text."""
        count = self.config.top_k if self.config.signal == "topk" else 0
        # The new token is discarded. Not 0: some servers refuse max_tokens=0.
        request = {"model": self.config.model, "temperature": 0, "prompt": text, "max_tokens": 1}
        if not self._echo:
            request |= {"prompt_logprobs": count}
        else:  # some servers read `logprobs: 0` as no log-probs at all
            request |= {"echo": True, "logprobs": max(count, 1), "return_tokens_as_token_ids": True}
        echo = self._echo
        return request, most_bytes(len(text), count), lambda answer: scores(answer, text, length, count, echo=echo)

    def score_tokens(self, trajectories: Trajectories) -> dict[str, Any]:
        """See Teacher. CampaignError: no server has answered for `away_timeout_seconds`."""
        count, lengths = self.config.top_k if self.config.signal == "topk" else 0, trajectories.lengths
        texts = texts_of(trajectories)
        answers = self._ask_all(self._scoring(text, int(n)) for text, n in zip(texts, lengths, strict=True))
        refused = {row: str(answer) for row, answer in enumerate(answers) if isinstance(answer, RefusedError)}
        nothing = np.float32(np.nan), np.int32(0)
        read = [
            tuple(np.full((n, 1 + count), value) for value in nothing) if isinstance(answer, RefusedError) else answer
            for answer, n in zip(answers, lengths.tolist(), strict=True)
        ]
        logprobs, ids = (np.concatenate(parts) for parts in zip(*read, strict=True))
        return {
            "logprobs": logprobs[:, 0].copy(),
            "support_ids": ids[:, 1:],
            "support_logprobs": logprobs[:, 1:],
            "refused": refused,
        }

    def _ask_all(
        self, requests: Iterable[tuple[dict[str, Any], int, Callable[[dict[str, Any]], Value]]]
    ) -> list[Value | RefusedError]:
        """One answer for each request, in their order; up to `requests_per_url` are under way at each server."""

        def ask(request: tuple[dict[str, Any], int, Callable[[dict[str, Any]], Value]]) -> Value | RefusedError:
            try:
                return self._servers.ask(*request)
            except RefusedError as refused:
                return refused

        return list(self._threads.map(ask, requests))
