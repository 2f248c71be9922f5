"""Merges the scores of several batches, teachers and ranks into one row for each token.

Every rank gets the fields with one number a token ([N]) for all tokens, since weights and coefficients depend on the
whole update. Wider fields ([n, K], hidden states) stay on the rank that trains on the token.
Shapes: B trajectories and N response tokens of the update; M, n the trajectories and response tokens of this rank (all of
them with one rank; where ranks share rows, M are the group's, and n the tokens that this rank predicts); K support, V
vocabulary, H hidden size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from actors.errors import CampaignError
from actors.forward.logprobs import from_array
from actors.teacher_scores import TeacherScores, scores_by_teacher, select_scores
from actors.trajectory import Trajectories, TrajectoryId, offsets_of
from learner.hidden_states import Head, HiddenStates
from learner.student.sharding import Ranks

SHARES_TOLERANCE = 1e-3
"""Tolerance for the sum of a trajectory's shares, which is 1: the shares are logs in float32."""


@dataclass(frozen=True, slots=True)
class MergedScores:
    """The scores of an update's tokens, in its order. "The teacher" is the mixture of all teachers but the reference."""

    logprobs: np.ndarray
    """[N] float32: log q of the sampled token, nats; 0 where missing."""
    reference_logprobs: np.ndarray
    """[N] float32: the same of the reference teacher; 0 where missing, or without one."""
    scored: np.ndarray
    """[N] bool: the log-prob of the sampled token is finite, at the teacher and at the reference."""
    distributed: np.ndarray
    """[N] bool: something of a support that the teacher or the student chose is finite, or all of a distribution over the
    vocabulary, at the teacher and at the reference; true where the teachers send none."""
    support_ids: np.ndarray
    """[n, K] int32; [n, 0] where the support is the whole vocabulary or nothing."""
    support_logprobs: np.ndarray
    """[n, K] or [n, V] float32, NaN where missing; [n, 0] for the signals without."""
    reference_support_logprobs: np.ndarray
    """The same of the reference teacher on the same support; [n, 0] without one."""
    hidden: list[HiddenStates]
    """One entry for each teacher that sends hidden states."""
    reference_hidden: list[HiddenStates]


def certain(written: Trajectories) -> TeacherScores:
    """The scores of responses of a data set, which nobody has scored: the data gives its own tokens the probability 1, so that
    minus the log-prob of the student is its forward KL to the data."""
    nothing = np.zeros((len(written.response_tokens), 0), np.float32)
    return TeacherScores(
        ids=written.ids,
        response_offsets=written.response_offsets,
        logprobs=np.zeros(len(nothing), np.float32),
        teacher="data",
        log_weights=np.zeros(len(written), np.float32),
        support_ids=nothing.astype(np.int32),
        support_logprobs=nothing,
    )


def merge_scores(
    written: Trajectories,
    this_rank_B: np.ndarray,
    this_rank_N: np.ndarray,
    batches: Sequence[TeacherScores],
    reference_teacher: str | None,
    heads: Mapping[str, Head],
    ranks: Ranks,
    device: str,
) -> MergedScores:
    """The scores of the tokens of `written`, for this rank; the arguments are those of `collate`.

    CampaignError: scores of a trajectory of this rank are missing. A collective: all ranks must call it.
    """
    ids, own_n = written.ids[this_rank_B], this_rank_N[np.repeat(this_rank_B, written.lengths)]
    by_reference = [batch for batch in batches if batch.teacher == reference_teacher]
    by_teachers = [batch for batch in batches if batch.teacher != reference_teacher]
    _check_shares(ids, by_teachers)
    support, width, reference_width = _widths(by_teachers, by_reference, ranks, device)
    teacher = _scores_of(ids, own_n, by_teachers, support, width)
    reference = None if reference_teacher is None else _scores_of(ids, own_n, by_reference, support, reference_width)
    logprobs, reference_logprobs, scored, distributed = _of_all_ranks(teacher, reference, this_rank_N, ranks, device)

    def hidden(of: Sequence[TeacherScores], *, of_reference: bool) -> list[HiddenStates]:
        named = {name: head for name, head in heads.items() if (name == reference_teacher) == of_reference}
        return _hidden_states(ids, own_n, of, named, this_rank_N, ranks, device)

    return MergedScores(
        logprobs,
        reference_logprobs,
        scored,
        distributed,
        teacher.support_ids,
        teacher.support_logprobs,
        teacher.support_logprobs[:, :0] if reference is None else reference.support_logprobs,
        hidden(by_teachers, of_reference=False),
        hidden(by_reference, of_reference=True),
    )


def _scores_of(
    ids: np.ndarray, own_n: np.ndarray, batches: Sequence[TeacherScores], support: int, width: int
) -> TeacherScores:
    """The scores of the trajectories with these ids [M, 3], which may be none, at those tokens that are this rank's own.

    support, width: columns of `support_ids` and `support_logprobs` where the batches have any.
    """
    if not len(ids) and not batches:
        nothing = np.zeros(0, np.float32)
        return TeacherScores(
            ids=ids,
            response_offsets=offsets_of([]),
            logprobs=nothing,
            teacher="",
            log_weights=nothing,
            support_ids=np.zeros((0, support), np.int32),
            support_logprobs=np.zeros((0, width), np.float32),
        )
    found = select_scores(ids, batches, width)
    if own_n.all():
        return found
    own = {name: getattr(found, name)[own_n] for name in ("logprobs", "support_ids", "support_logprobs")}
    return replace(found, **own)


def _check_shares(ids: np.ndarray, batches: Sequence[TeacherScores]) -> None:
    """CampaignError names a trajectory that lacks the scores of a teacher: its shares do not add up to 1."""
    shares = {tuple(row): 0.0 for row in ids.tolist()}
    # By teacher and trajectory: a teacher may have scored one twice, and its share counts once.
    last = {
        (batch.teacher, tuple(row)): log_weight
        for batch in batches
        for row, log_weight in zip(batch.ids.tolist(), batch.log_weights.tolist(), strict=True)
    }
    for (_, row), log_weight in last.items():
        if row in shares:
            shares[row] += math.exp(log_weight)
    for row, share in shares.items():
        if abs(share - 1) > SHARES_TOLERANCE:
            found = f"scores of teachers with {share:.3g} of the whole weight"
            raise CampaignError(f"trajectory {TrajectoryId(*row)}: {found} came to the rank that trains on it")


def _widths(
    by_teachers: Sequence[TeacherScores], by_reference: Sequence[TeacherScores], ranks: Ranks, device: str
) -> tuple[int, int, int]:
    """Columns on all ranks: of `support_ids`, and of `support_logprobs` of the teachers and of the reference.

    Vocabularies of teachers may be padded to different sizes; the narrowest counts. A rank without trajectories has no
    scores, but must run the same operations as the others.
    """
    unknown = np.iinfo(np.int32).max
    support = max((batch.support_ids.shape[1] for batch in by_teachers), default=0)
    narrowest = [
        min((batch.support_logprobs.shape[1] for batch in of), default=0) or unknown
        for of in (by_teachers, by_reference)
    ]
    # One collective: min(x) = -max(-x). A rank without scores passes the largest number, which no minimum chooses.
    found = torch.tensor([support, *(-width for width in narrowest)], device=device)
    support, *widths = ranks.max(found).tolist()
    width, of_reference = (0 if -width == unknown else -width for width in widths)
    return support, width, of_reference


def _of_all_ranks(
    teacher: TeacherScores,
    reference: TeacherScores | None,
    this_rank_N: np.ndarray,
    ranks: Ranks,
    device: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The first four fields of MergedScores, [N] each; log-probs are 0 where missing."""
    # Only one rank has a value for a token, all others have 0: the sum copies it, without rounding.
    columns = np.zeros((4, len(this_rank_N)), np.float32)
    for row, scores in enumerate((teacher, reference)):
        if scores is not None:
            known, entries = np.isfinite(scores.logprobs), np.isfinite(scores.support_logprobs)
            chosen = scores.support_ids.shape[1] > 0
            columns[row, this_rank_N] = np.where(known, scores.logprobs, 0)
            columns[2, this_rank_N] += ~known
            columns[3, this_rank_N] += ~(entries.any(-1) if chosen else entries.all(-1))
    logprobs, reference_logprobs, *missing = ranks.sum(torch.from_numpy(columns).to(device)).cpu().numpy()
    return logprobs, reference_logprobs, missing[0] == 0, missing[1] == 0


def _hidden_states(
    ids: np.ndarray,
    own_n: np.ndarray,
    batches: Sequence[TeacherScores],
    heads: Mapping[str, Head],
    this_rank_N: np.ndarray,
    ranks: Ranks,
    device: str,
) -> list[HiddenStates]:
    """The hidden states of the teachers with these heads, for the trajectories with these ids [M, 3].

    own_n: bool, which of the tokens of these trajectories are this rank's own. this_rank_N: [N] bool, the same among the
    update's tokens. With several ranks each rank has an entry
    for every head, also for a teacher that scored none of its trajectories: all ranks must run the same operations.
    """
    _, teachers = scores_by_teacher(ids, batches) if len(ids) and heads else ([], {})
    out = []
    for name, head in sorted(heads.items()):
        if name in teachers:
            scores = teachers[name]
            kept = own_n[scores.places]
            hidden = scores.hidden if kept.all() else scores.hidden[kept]
            places = (np.cumsum(own_n) - 1)[scores.places[kept]]
            log_weights, states = scores.log_weights[kept], from_array(hidden).to(device)
        elif ranks.size > 1:
            places, log_weights, states = np.zeros(0, np.int64), np.zeros(0, np.float32), head[0][:0]
        else:
            continue
        states_of = np.full(len(this_rank_N), -1, np.int64)
        states_of[np.flatnonzero(this_rank_N)[places]] = np.arange(len(places))
        out.append(
            HiddenStates(
                # A state that is not finite becomes 0: its score is missing, so the token is masked, but NaN would
                # reach the other tokens through the sums of the chunk.
                torch.where(states.isfinite(), states, torch.zeros_like(states)),
                head,
                torch.from_numpy(states_of).to(device),
                torch.from_numpy(log_weights).to(device),
            )
        )
    return out
