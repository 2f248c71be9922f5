"""A rollout engine for tests that starts as fast as its imports: `rollout.backend: tests.light_engine:LightEngine`.

It samples with one plain forward pass for each token. In models of a few kilobytes that takes a millisecond or two.
"""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.data.models import load_model
from actors.heartbeat import beat
from actors.rollout.engine import Response, filters, trajectories_of
from actors.trajectory import Requests, Trajectories
from actors.weights.buckets import unpack

BACKEND = "tests.light_engine:LightEngine"


class LightEngine:
    """An `Engine` (actors/rollout/engine.py). A response depends on its prompt, its seed and the weights only.

    Options, in `rollout.engine`: with `wait_at: VERSION` and `wait_for: FILE` it answers nothing from that version on
    until there is such a file. A test can then do something to the campaign before it goes on. With `turns: 2` a response
    has that many turns, and between them two tokens of an environment that answers at random, but the same to the same seed.
    """

    def __init__(
        self, model: str, config: Any, sampling: Any, *, stop_token_ids: list[int], support_size: int = 0, **_: Any
    ):
        self.version: int | None = None
        self.seats, self.busy_seconds, self.tokens_sampled = 4, 0.0, 0
        self._model = load_model(model, "float32", "cpu", False, "student.model")
        self._stop, self._support_size = set(stop_token_ids), support_size
        options = {"wait_at": None, "wait_for": "", "turns": 1, **config.engine}
        self._turns = options["turns"]
        self._wait_at, self._wait_for = options["wait_at"], Path(options["wait_for"])
        self._thread = ThreadPoolExecutor(1)
        self._weights = threading.Lock()
        """Held for one response, and for a load: a response is written by one version."""

    def generate(self, requests: Requests, sampling: Any, *, greedy: bool = False) -> Future:
        return self._thread.submit(self._generate, requests, sampling, greedy)

    def load_weights(self, manifest: Any, buckets: Any) -> Future:
        with self._weights:
            self._model.load_state_dict(dict(unpack(manifest, buckets)), strict=False)  # which copies
            self.version = manifest.version
        return done(0.0)

    def abort(self, ids: np.ndarray | None = None) -> Future:
        return done(None)

    def close(self) -> None:
        self._thread.shutdown(wait=False)

    def _generate(self, requests: Requests, sampling: Any, greedy: bool) -> Trajectories:
        while self._wait_at is not None and self.version >= self._wait_at and not self._wait_for.exists():
            time.sleep(0.02)
            beat()
        began = time.monotonic()
        responses = []
        for row, seed in enumerate(requests.seeds):
            beat()
            prompt = requests.prompt_tokens[slice(*requests.prompt_offsets[row : row + 2])].tolist()
            with self._weights:
                responses.append(self._respond(prompt, int(seed), sampling, greedy))
        self.busy_seconds += time.monotonic() - began
        return trajectories_of(requests, responses)

    def _respond(self, prompt: list[int], seed: int, sampling: Any, greedy: bool) -> Response:
        draw, text, longest = np.random.default_rng(seed), list(prompt), sampling.max_response_tokens
        rows: list[tuple[bool, float, float, np.ndarray]] = []
        for left in reversed(range(min(self._turns, (longest + 2) // 3))):
            if rows:
                text += draw.integers(6, 16, 2).tolist()
                rows += [(False, np.nan, np.nan, np.zeros(self._support_size, np.int64))] * 2
            limit = (longest - len(rows) - 2 * left) // (left + 1)
            rows += self._turn(text, limit, draw, sampling, greedy)
        own, logprobs, before, supports = zip(*rows, strict=True)
        self.tokens_sampled += sum(own)
        reason = "length" if len(rows) == longest else "stop"
        versions = np.where(own, self.version, -1)  # what the environment wrote is of no version
        named = np.array(supports, np.int32) if self._support_size else None
        filtered = filters(sampling) and not greedy
        return Response(text[len(prompt) :], logprobs, versions, reason, named, before if filtered else None, own)

    @torch.no_grad()
    def _turn(
        self, text: list[int], longest: int, draw: np.random.Generator, sampling: Any, greedy: bool
    ) -> list[tuple[bool, float, float, np.ndarray]]:
        """Writes a turn to the end of the text: (True, log-prob after a filter, before it, most likely tokens) of each token."""
        rows: list[tuple[bool, float, float, np.ndarray]] = []
        while len(rows) < longest and (not rows or text[-1] not in self._stop):
            logits_V = self._model(torch.tensor([text])).logits[0, -1].float() / sampling.temperature
            policy_V = logits_V.log_softmax(-1).double().numpy()
            row_V = kept(policy_V, sampling) if filters(sampling) and not greedy else policy_V
            # The largest of log-prob + Gumbel noise is a sample of the distribution.
            chosen = int(np.argmax(row_V if greedy else row_V + draw.gumbel(size=len(row_V))))
            text.append(chosen)
            support = np.argsort(-policy_V, kind="stable")[: self._support_size]
            rows.append((True, float(row_V[chosen]), float(policy_V[chosen]), support))
        return rows


def kept(logprobs_V: np.ndarray, sampling: Any) -> np.ndarray:
    """Log-probs after top-k and top-p, -inf for what they leave out."""
    order = np.argsort(-logprobs_V, kind="stable")[: sampling.top_k or None]
    shares = np.exp(logprobs_V[order]) / np.exp(logprobs_V[order]).sum()
    order = order[np.cumsum(shares) - shares < sampling.top_p]
    out = np.full_like(logprobs_V, -np.inf)
    out[order] = logprobs_V[order] - np.log(np.exp(logprobs_V[order]).sum())
    return out


def done(result: Any) -> Future:
    future: Future = Future()
    future.set_result(result)
    return future
