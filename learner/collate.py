"""Collates trajectories and their teachers' scores into the tensors of one update.

Shapes: B trajectories and N response tokens of the update; M, n the trajectories and response tokens of this rank (all
of them with one rank); K support, V vocabulary, H hidden size.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from actors.errors import CampaignError
from actors.forward.logprobs import from_array
from actors.trajectory import (
    TeacherScores,
    Trajectories,
    TrajectoryId,
    offsets_of,
    scores_by_teacher,
    select_scores,
)
from learner.batch import UpdateBatch
from learner.config import ObjectiveConfig
from learner.hidden_states import Head, HiddenStates
from learner.objective.divergences import extrapolated_teacher
from learner.objective.estimators import reward_cost
from learner.student.sharding import Ranks

SHARES_TOLERANCE = 1e-3
"""How far from 1 the shares of a trajectory's teachers may add up to."""


def collate(
    written: Trajectories,
    scores: Sequence[TeacherScores],
    mine: np.ndarray,
    policy_version: int,
    objective: ObjectiveConfig,
    device: str,
    *,
    masked_token_ids: Sequence[int],
    heads: Mapping[str, Head],
    ranks: Ranks,
) -> UpdateBatch:
    """The tensors of the update on `written`, in its order.

    mine: [B] bool, the trajectories that this rank trains on. scores: batches that hold the scores of these, from all
    their teachers, and perhaps others. heads: output layers of the teachers that send hidden states, by name.
    What is one number a token ([N]) each rank gets of all tokens, by one sum over the ranks in which the tokens of other
    ranks are 0, so that it is exact; what is wider ([n, K]) each rank has of its own tokens only.
    CampaignError: scores of a trajectory of this rank are missing.
    """

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    ids = written.ids[mine]
    own_tokens = np.repeat(mine, written.lengths)
    referring = [batch for batch in scores if batch.teacher == objective.reference_teacher]
    teaching = [batch for batch in scores if batch.teacher != objective.reference_teacher]
    _check_shares(ids, teaching)
    teacher = _scores_of(ids, teaching)
    reference = None if objective.reference_teacher is None else _scores_of(ids, referring)
    teacher, reference = _same_widths(teacher, reference, ranks, device)
    logprobs, reference_logprobs, missing = _of_all_ranks(teacher, reference, own_tokens, ranks, tensor)
    mask = ~missing & ~np.isin(written.response_tokens, list(masked_token_ids))

    def where_known(values: np.ndarray) -> Tensor:
        known = mask if values.ndim == 1 else mask[own_tokens, None]
        return tensor(np.where(known, values, np.float32(0)))

    teacher_logprobs = where_known(logprobs)
    if reference is not None:
        teacher_logprobs = extrapolated_teacher(
            teacher_logprobs, where_known(reference_logprobs), objective.extrapolation
        )
    behaviour = tensor(written.behaviour_logprobs)
    if objective.estimator == "sft":  # the teacher wrote these responses, so it is the behaviour policy
        behaviour = teacher_logprobs
    batch = UpdateBatch(
        written,
        {
            "tokens": tensor(written.response_tokens.astype(np.int64)),
            "behaviour_logprobs": behaviour,
            "teacher_logprobs": teacher_logprobs,
            "mask": tensor(mask),
            "weights": torch.zeros(len(mask), device=device),
            "coefficient": torch.zeros(len(mask), device=device),
            "reward_cost": torch.zeros(len(mask), device=device),
            "old_logprobs": behaviour,
            "importance": torch.ones(len(mask), device=device),
            "on_policy": tensor(written.policy_versions == policy_version),
            "support_ids": tensor(teacher.support_ids.astype(np.int64)),
            "support_logprobs": where_known(teacher.support_logprobs),
            "reference_logprobs": where_known((reference or _without_width(teacher)).support_logprobs),
        },
        device,
        _hidden_states(ids, teaching, heads, own_tokens, heads.keys() - {objective.reference_teacher}, ranks, device),
        _hidden_states(ids, referring, heads, own_tokens, heads.keys() & {objective.reference_teacher}, ranks, device),
        mine=mine,
        own=None if mine.all() else tensor(np.cumsum(own_tokens) - 1),
    )
    if written.rewards.size:
        whole = batch.whole()
        costs = reward_cost(tensor(written.rewards), whole.padded(whole.mask), batch.groups())
        batch.tensors["reward_cost"] = whole.flat(costs)
    return batch


def _scores_of(ids: np.ndarray, batches: Sequence[TeacherScores]) -> TeacherScores:
    """The scores of the trajectories with these ids [M, 3]; without columns where this rank was given nothing."""
    if not len(ids) and not batches:
        nothing = np.zeros((0, 0), np.float32)
        return TeacherScores(
            ids=ids,
            response_offsets=offsets_of([]),
            logprobs=nothing.reshape(-1),
            teacher="",
            log_weights=nothing.reshape(-1),
            support_ids=nothing.astype(np.int32),
            support_logprobs=nothing,
        )
    return select_scores(ids, batches)


def _without_width(scores: TeacherScores) -> TeacherScores:
    return replace(scores, support_logprobs=scores.support_logprobs[:, :0])


def _check_shares(ids: np.ndarray, batches: Sequence[TeacherScores]) -> None:
    """CampaignError names a trajectory of which no scores, or not those of all teachers of its mixture, are there."""
    shares = {tuple(row): 0.0 for row in ids.tolist()}
    last = {
        (batch.teacher, tuple(row)): w
        for batch in batches
        for row, w in zip(batch.ids.tolist(), batch.log_weights.tolist(), strict=True)
    }
    for (_, row), log_weight in last.items():
        if row in shares:
            shares[row] += math.exp(log_weight)
    for row, share in shares.items():
        if abs(share - 1) > SHARES_TOLERANCE:
            raise CampaignError(
                f"trajectory {TrajectoryId(*row)}: scores of teachers with {share:.3g} of the whole weight came to the rank that trains on it"
            )


def _same_widths(
    teacher: TeacherScores, reference: TeacherScores | None, ranks: Ranks, device: str
) -> tuple[TeacherScores, TeacherScores | None]:
    """The scores with as many columns on every rank, as one rank would have them: padded vocabularies may differ from
    teacher to teacher, and a rank without trajectories was given no scores, but computes alongside the others."""
    if ranks.size == 1:
        return teacher, reference
    unknown = np.iinfo(np.int32).max
    widths = [scores.support_logprobs.shape[1] if scores else 0 for scores in (teacher, reference)]
    found = torch.tensor([teacher.support_ids.shape[1], *(-(width or unknown) for width in widths)], device=device)
    support, *narrowest = ranks.largest(found).tolist()

    def cut(values: np.ndarray, width: int) -> np.ndarray:
        return values[:, :width] if values.shape[1] else np.zeros((len(values), width), values.dtype)

    def fitted(scores: TeacherScores, narrowest: int) -> TeacherScores:
        width = 0 if -narrowest == unknown else -narrowest
        return replace(
            scores,
            support_ids=cut(scores.support_ids, support),
            support_logprobs=cut(scores.support_logprobs, width),
        )

    return fitted(teacher, narrowest[0]), reference and fitted(reference, narrowest[1])


def _of_all_ranks(
    teacher: TeacherScores,
    reference: TeacherScores | None,
    own_tokens: np.ndarray,
    ranks: Ranks,
    tensor: Callable[[np.ndarray], Tensor],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(log-probs of the teacher, of the reference teacher, both 0 where missing; whether a score is missing), [N] each.

    A token is missing if its own score, or a part of its support, is not finite, at either teacher.
    """
    columns = np.zeros((3, len(own_tokens)), np.float32)
    for row, scores in enumerate((teacher, reference)):
        if scores is not None:
            known = np.isfinite(scores.logprobs) & np.isfinite(scores.support_logprobs).all(-1)
            columns[row, own_tokens] = np.where(known, scores.logprobs, 0)
            columns[2, own_tokens] += ~known
    logprobs, reference_logprobs, missing = ranks.sum(tensor(columns)).cpu().numpy()
    return logprobs, reference_logprobs, missing > 0


def _hidden_states(
    ids: np.ndarray,
    batches: Sequence[TeacherScores],
    heads: Mapping[str, Head],
    own_tokens: np.ndarray,
    names: Collection[str],
    ranks: Ranks,
    device: str,
) -> list[HiddenStates]:
    """The hidden states that the teachers of these names sent for the trajectories with these ids [M, 3], whose tokens
    are those of the update's N where own_tokens [N] is true.

    A state that is not finite becomes zero: its token, whose score is missing, is masked. Of several ranks each has an
    entry for every teacher, though no trajectory of its own may be scored by it: all compute alike.
    """
    _, teachers = scores_by_teacher(ids, batches) if len(ids) and names else ([], {})
    out = []
    for name in sorted(names):
        if name in teachers:
            own = teachers[name]
            places, log_weights, states = own.places, own.log_weights, from_array(own.hidden).to(device)
        elif ranks.size > 1:
            weight, _ = heads[name]
            places, log_weights, states = np.zeros(0, np.int64), np.zeros(0, np.float32), weight[:0]
        else:
            continue
        states_of = np.full(len(own_tokens), -1, np.int64)
        states_of[np.flatnonzero(own_tokens)[places]] = np.arange(len(places))
        out.append(
            HiddenStates(
                torch.where(states.isfinite(), states, torch.zeros_like(states)),
                heads[name],
                torch.from_numpy(states_of).to(device),
                torch.from_numpy(log_weights).to(device),
            )
        )
    return out
