"""What all teachers do alike, whatever computes their log-probs: from trajectories to scores, and the self-test. Pure."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from actors.errors import CampaignError
from actors.trajectory import TeacherScores, Trajectories, offsets_of, select_trajectories, split_scores

PLAUSIBLE = (-1000.0, 1e-3)
"""Nats. A log-prob outside is no teacher's opinion, but a sentinel such as -9999, or not a log-prob at all."""


class TeacherCounts(NamedTuple):
    """What the campaign process must know of a batch of scores without opening it."""

    missing: int
    """Tokens without a finite score; they are masked in training."""
    busy_seconds: float
    """Seconds that this took."""


class Teacher:
    """What every kind of teacher has besides its own `score`."""

    score: Callable[..., tuple[TeacherCounts, TeacherScores]]

    def score_each(self, *arguments: Any, **keywords: Any) -> tuple[Any, ...]:
        """The same as `score`, in 1 + B values: the counts, and a TeacherScores for each of the B trajectories.

        A learner of several ranks asks for this: each value travels only to the rank that trains on its trajectory.
        """
        counts, scores = self.score(*arguments, **keywords)
        return counts, *split_scores(scores)


class Scorer(Teacher):
    """A teacher that asks a model itself. What it does in another way than the others is `_forward`."""

    _name: str
    """In the configuration."""
    _vocabulary: int
    """Rows of its output layer, of those that the student has: a token beyond them has no score."""
    _busy_seconds = 0.0
    _probe_logprob: float

    def _forward(self, trajectories: Trajectories) -> dict[str, np.ndarray]:
        """The fields of TeacherScores that have one row for each response token: what `signal` asks for, else empty."""
        raise NotImplementedError

    def score(
        self,
        ids: np.ndarray,
        *batches: Trajectories,
        prompts: tuple[np.ndarray, np.ndarray] | None = None,
        log_weights: np.ndarray | None = None,
    ) -> tuple[TeacherCounts, TeacherScores]:
        """Scores the trajectories with these ids [B, 3], in this order.

        prompts: what this teacher reads in place of the student's prompts, tokens [P] and offsets [B + 1], where it
        has privileged information; the response is scored token by token all the same. log_weights: [B] its shares in
        a mixture, passed on. A token whose score, or part of its support, is missing, not finite or implausible has the
        score NaN, and is counted. The result depends on `ids` and on what was written, not on how the trajectories were
        cut into batches on the way.
        """
        start = time.perf_counter()
        trajectories = select_trajectories(ids, batches)
        if prompts is not None:
            trajectories = replace(trajectories, prompt_tokens=prompts[0], prompt_offsets=prompts[1])
        fields = self._forward(trajectories)
        known = trajectories.response_tokens < self._vocabulary  # further rows are the student's padding
        known &= (fields["logprobs"] > PLAUSIBLE[0]) & (fields["logprobs"] <= PLAUSIBLE[1])
        support = fields["support_logprobs"]
        known &= (np.isfinite(support) & (support <= PLAUSIBLE[1])).all(-1)
        fields["logprobs"][~known] = np.nan
        scores = TeacherScores(
            ids=trajectories.ids,
            response_offsets=trajectories.response_offsets,
            teacher=self._name,
            log_weights=np.zeros(len(ids), np.float32) if log_weights is None else log_weights,
            **fields,
        )
        seconds = time.perf_counter() - start
        self._busy_seconds += seconds
        return TeacherCounts(int(np.isnan(scores.logprobs).sum()), seconds), scores

    def status(self) -> dict[str, float]:
        """Busy seconds so far, and the mean log-prob of the self-test's probe, by which replicas are compared."""
        return {"busy_seconds": self._busy_seconds, "probe_logprob": self._probe_logprob}

    def _self_test(self, key: str, vocabulary: int, repeats: float = 0.0) -> np.ndarray:
        """Scores a probe twice; returns the scores. CampaignError: as check_probe."""
        written = probe(vocabulary)
        first, second = (self.score(written.ids, written)[1].logprobs for _ in range(2))
        self._probe_logprob = check_probe(key, first, second, vocabulary, repeats=repeats)
        return first


def probe(vocabulary: int) -> Trajectories:
    """One trajectory of up to 31 tokens that every teacher of this vocabulary can score."""
    length = min(32, vocabulary - 1)
    tokens = np.arange(1, length + 1, dtype=np.int32)
    nowhere = np.zeros(length - 1, np.float32)
    return Trajectories(
        ids=np.zeros((1, 3), np.int64),
        prompt_tokens=tokens[:1],
        prompt_offsets=offsets_of([1]),
        response_tokens=tokens[1:],
        response_offsets=offsets_of([length - 1]),
        behaviour_logprobs=nowhere,
        policy_versions=nowhere.astype(np.int32),
        finish_reasons=np.zeros(1, np.uint8),
        support_ids=np.tile(tokens[:1], (length - 1, 1)),
    )


def check_probe(key: str, first: np.ndarray, second: np.ndarray, vocabulary: int, *, repeats: float = 0.0) -> float:
    """Mean log-prob of the probe, asked twice, after a check that scores can be trusted.

    A teacher that was loaded wrongly goes on answering: all tokens alike, or something else each time. repeats: nats
    by which two answers may differ. CampaignError: not finite, uniform, or not repeatable.
    """
    uniform = -np.log(vocabulary)
    for fault, found in (
        ("scores are not finite", not np.isfinite(first).all()),
        ("scores are uniform: its weights are not those of the files", np.abs(first - uniform).max() < 1e-4),
        ("scores differ when asked twice", not np.abs(first - second).max() <= repeats),
    ):
        if found:
            raise CampaignError(f"{key} fails its self-test: {fault}")
    return float(first.mean())
