"""A teacher's scores of trajectories: the type that passes from teachers to the learner, and the mixture of several.

Flat ragged arrays as in trajectory.py, with the same letters for shapes, and H for the size of a hidden state.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from actors.trajectory import offsets_of, ragged_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """One teacher's scores of the same tokens. A missing or non-finite score is NaN.

    A token whose log-prob is NaN is masked. An entry of a support that is NaN is left out of the support.
    """

    ids: np.ndarray
    """[B, 3] int64: epoch, prompt, sample."""
    response_offsets: np.ndarray
    """[B + 1] int64, as in the trajectories that were scored."""
    logprobs: np.ndarray
    """[N] float32: log q(y_t | c_t), at the teacher's temperature."""
    teacher: str
    """The teacher's name in the configuration."""
    log_weights: np.ndarray
    """[B] float32: log of its share where several teachers score a trajectory, whose mixture is the teacher; else 0."""
    support_ids: np.ndarray
    """[N, K] int32: tokens of the support, most likely first (to the teacher with `topk`, to the student with
    `student_topk`); [N, 0] for the other signals."""
    support_logprobs: np.ndarray
    """[N, K] float32: the teacher's log-probs of `support_ids` (not renormalised); [N, V] for `full`, else [N, 0]."""
    hidden: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.uint16))
    """[N, H] for `hidden`: the states that the teacher's head turns into log-probs, in the teacher's own dtype (the bits
    of a bfloat16 as uint16); [0, 0] for the other signals."""

    def __len__(self) -> int:
        return len(self.ids)


WIDE_FIELDS = ("support_ids", "support_logprobs", "hidden")
"""Fields of TeacherScores that may hold more than one number a token."""


def normalised(logprobs_NV: np.ndarray) -> np.ndarray:
    """[N, V] log-probs less the log of their sum: the distribution given that the token is one of these V."""
    most = logprobs_NV.max(-1, keepdims=True, initial=-np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):  # a missing score is NaN, and stays so
        total = np.log(np.exp(logprobs_NV - most).sum(-1, keepdims=True)) + most
    return (logprobs_NV - total).astype(np.float32)


class OneTeacher(NamedTuple):
    """The scores of one teacher for some of an update's N tokens, from all its batches."""

    places: np.ndarray
    """[M] int64: which of the N tokens."""
    log_weights: np.ndarray
    """[M] float32: log of its share in the mixture."""
    logprobs: np.ndarray
    """[M]; the others as in TeacherScores: [M, K], [M, K or V], [M, H]."""
    support_ids: np.ndarray
    support_logprobs: np.ndarray
    hidden: np.ndarray


def scores_by_teacher(ids: np.ndarray, batches: Sequence[TeacherScores]) -> tuple[np.ndarray, dict[str, OneTeacher]]:
    """([B + 1] offsets of the responses with these ids [B, 3], in this order; teacher -> its scores of them).

    If a teacher has scored an id in several batches, the last one counts. KeyError names an id without a score.
    """
    by_name: dict[str, list[TeacherScores]] = {}
    for batch in batches:
        by_name.setdefault(batch.teacher, []).append(batch)
    wanted = [tuple(row) for row in np.asarray(ids).tolist()]
    length = {
        tuple(row): n for b in batches for row, n in zip(b.ids.tolist(), np.diff(b.response_offsets), strict=True)
    }
    offsets = offsets_of(length[row] for row in wanted)
    teachers = {}
    # Sorted: a mixture's rounding depends on the order of its teachers, and must not depend on which answered first.
    for name, of_teacher in sorted(by_name.items()):
        place = {tuple(row): i for i, row in enumerate(np.concatenate([b.ids for b in of_teacher]).tolist())}
        targets = np.array([i for i, row in enumerate(wanted) if row in place], np.int64)
        sources = np.array([place[wanted[i]] for i in targets], np.int64)
        score_offsets = offsets_of(np.concatenate([np.diff(b.response_offsets) for b in of_teacher]))
        wide = {
            field: ragged_rows(np.concatenate([getattr(b, field) for b in of_teacher]), score_offsets, sources)
            if any(getattr(b, field).shape[1] for b in of_teacher)
            else np.zeros((np.diff(offsets)[targets].sum(), 0), getattr(of_teacher[0], field).dtype)
            for field in WIDE_FIELDS
        }
        teachers[name] = OneTeacher(
            places=ragged_rows(np.arange(offsets[-1]), offsets, targets),
            log_weights=np.repeat(
                np.concatenate([b.log_weights for b in of_teacher])[sources], np.diff(offsets)[targets]
            ),
            logprobs=ragged_rows(np.concatenate([b.logprobs for b in of_teacher]), score_offsets, sources),
            **wide,
        )
    return offsets, teachers


def select_scores(ids: np.ndarray, batches: Sequence[TeacherScores], width: int | None = None) -> TeacherScores:
    """The scores with these ids [B, 3], in this order, from batches of one kind of signal; hidden states are left out.

    If several teachers have scored a trajectory, the result is their mixture in probability space, log sum_i w_i q_i; a
    score, or an entry of a support, that one of them lacks is missing. Over the whole vocabulary, a distribution is cut to
    the tokens that all teachers have, and normalised. width: the number of these tokens; by default that of these
    batches. KeyError names an id without a score.
    """
    offsets, teachers = scores_by_teacher(ids, batches)
    if width is None:
        width = min(scores.support_logprobs.shape[1] for scores in teachers.values())  # padded vocabularies may differ
    logprobs = np.full(offsets[-1], -np.inf, np.float32)
    support_logprobs = np.full((offsets[-1], width), -np.inf, np.float32)
    chosen_ids = np.zeros((offsets[-1], batches[0].support_ids.shape[1]), np.int32)
    for scores in teachers.values():
        into = scores.places
        chosen_ids[into] = scores.support_ids
        support = scores.support_logprobs
        # Cut before they are mixed: what is left of each teacher's distribution must sum to its share.
        support = support if support.shape[1] == width else normalised(support[:, :width])
        if len(teachers) == 1 and not scores.log_weights.any():  # nothing to mix: the values as they are, no arithmetic
            logprobs[into], support_logprobs[into] = scores.logprobs, support
            continue
        weighted = scores.log_weights[:, None] + support
        with np.errstate(invalid="ignore"):  # a missing score is NaN, and stays so
            logprobs[into] = np.logaddexp(logprobs[into], scores.log_weights + scores.logprobs)
            support_logprobs[into] = np.logaddexp(support_logprobs[into], weighted)
    return TeacherScores(
        ids=np.asarray(ids, np.int64),
        response_offsets=offsets,
        logprobs=logprobs,
        teacher="+".join(teachers),
        log_weights=np.zeros(len(offsets) - 1, np.float32),
        support_ids=chosen_ids,
        support_logprobs=support_logprobs,
    )


def split_scores(scores: TeacherScores) -> list[TeacherScores]:
    """One TeacherScores for each trajectory, in their order; the arrays are views, nothing is copied."""
    edges = itertools.pairwise(scores.response_offsets.tolist())
    per_token = ("logprobs", *WIDE_FIELDS)
    return [
        replace(
            scores,
            ids=scores.ids[row : row + 1],
            response_offsets=np.array([0, end - start], np.int64),
            log_weights=scores.log_weights[row : row + 1],
            **{name: values[start:end] for name in per_token if len(values := getattr(scores, name))},
        )
        for row, (start, end) in enumerate(edges)
    ]
