"""What all teachers do alike, whatever computes their log-probs: from trajectories to scores, and the self-test. Pure."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from actors.errors import CampaignError
from actors.trajectory import TeacherScores, Trajectories, apart, offsets_of, select_trajectories

PLAUSIBLE = (-1000.0, 1e-3)
"""Nats. A log-prob outside is no teacher's opinion, but a sentinel such as -9999, or not a log-prob at all."""
Forward = Callable[[Trajectories], dict[str, np.ndarray]]
"""The fields of TeacherScores that have one row for each response token: `logprobs` [N] and those of the signal."""


class TeacherCounts(NamedTuple):
    """What the campaign process must know of a batch of scores without opening it."""

    missing: int
    """Tokens without a finite score; they are masked in training."""
    busy_seconds: float
    """Seconds that this took."""


class ScoresApart:
    """What every kind of teacher has besides its `score`."""

    score: Callable[..., tuple[TeacherCounts, TeacherScores]]

    def score_apart(self, *arguments: Any, **keywords: Any) -> tuple[Any, ...]:
        """As `score`, in 2 + B values: counts, LightScores, and the LargeScores of each of the B trajectories."""
        counts, scores = self.score(*arguments, **keywords)
        light, large = apart(scores)
        return counts, light, *large


def score_with(
    forward: Forward,
    name: str,
    vocabulary: int,
    ids: np.ndarray,
    batches: Sequence[Trajectories],
    prompts: tuple[np.ndarray, np.ndarray] | None,
    log_weights: np.ndarray | None,
) -> tuple[TeacherCounts, TeacherScores]:
    """The scores of the trajectories with these ids [B, 3], in this order, under the teacher of this name.

    prompts: what the teacher reads in place of the student's prompts, tokens [P] and offsets [B + 1]. log_weights: [B]
    its shares in a mixture, passed on. vocabulary: the teacher's rows; a token beyond them has no score. A token whose
    score, or part of its support, is missing, not finite or implausible has the score NaN, and is counted.
    """
    start = time.perf_counter()
    trajectories = select_trajectories(ids, batches)
    if prompts is not None:
        trajectories = replace(trajectories, prompt_tokens=prompts[0], prompt_offsets=prompts[1])
    fields = forward(trajectories)
    known = trajectories.response_tokens < vocabulary  # further rows are the student's padding
    known &= (fields["logprobs"] > PLAUSIBLE[0]) & (fields["logprobs"] <= PLAUSIBLE[1])
    support = fields["support_logprobs"]
    known &= (np.isfinite(support) & (support <= PLAUSIBLE[1])).all(-1)
    fields["logprobs"][~known] = np.nan
    scores = TeacherScores(
        ids=trajectories.ids,
        response_offsets=trajectories.response_offsets,
        teacher=name,
        log_weights=np.zeros(len(ids), np.float32) if log_weights is None else log_weights,
        **fields,
    )
    return TeacherCounts(int(np.isnan(scores.logprobs).sum()), time.perf_counter() - start), scores


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
