"""What was written and what is said of it, joined into the tensors of one update.

Shapes: B trajectories and N response tokens of the update, of which a rank trains on M trajectories; K support.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from actors.forward.logprobs import from_array
from actors.trajectory import (
    LargeScores,
    TeacherScores,
    Trajectories,
    rejoined,
    scores_by_teacher,
    select_scores,
    select_trajectories,
    without_large,
)
from learner.batch import UpdateBatch
from learner.config import ObjectiveConfig
from learner.hidden_states import Head, HiddenStates
from learner.objective.divergences import extrapolated_teacher
from learner.objective.estimators import reward_cost


class Said(NamedTuple):
    """What the teachers, or the reference teacher, say of an update."""

    logprobs: np.ndarray
    """[N] float32: of all tokens, the other ranks' too; NaN where a score is missing."""
    own: TeacherScores
    """Of the M trajectories of this rank alone, also what is more than one number a token."""
    batches: Sequence[TeacherScores]
    """What `own` was made from: by teacher, and with hidden states."""


def joined(
    ids: np.ndarray,
    batches: Sequence[Trajectories | TeacherScores | LargeScores],
    policy_version: int,
    objective: ObjectiveConfig,
    device: str,
    *,
    masked_token_ids: Sequence[int],
    heads: Mapping[str, Head],
    share: Callable[[Trajectories], np.ndarray] | None = None,
    total: Callable[[Tensor], Tensor] = lambda values: values,
) -> UpdateBatch:
    """Joins trajectories and scores by id, in the order of `ids` [B, 3]; `heads` are those of the teachers by name.

    share: says [B] bool which of the trajectories this rank trains on; all of them by default. Where the scores are
    light, the batches hold LargeScores of these alone. total: the sum over the ranks.
    """

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    written = select_trajectories(ids, [b for b in batches if isinstance(b, Trajectories)])
    mine = np.ones(len(ids), bool) if share is None else share(written)
    own_tokens = np.repeat(mine, written.lengths)
    teachers, reference = _said_by(ids, mine, batches, objective.reference_teacher)
    missing = total(tensor(_missing(teachers, reference, own_tokens))).cpu().numpy()
    mask = (missing == 0) & ~np.isin(written.response_tokens, list(masked_token_ids))
    said = _said_tensors(teachers, reference, mask, own_tokens, objective.extrapolation, tensor)
    behaviour = tensor(written.behaviour_logprobs)
    if objective.estimator == "sft":  # responses that the teacher has written: what sampled them is the teacher
        behaviour = said["teacher_logprobs"]
    batch = UpdateBatch(
        written,
        {
            "tokens": tensor(written.response_tokens.astype(np.int64)),
            "behaviour_logprobs": behaviour,
            "mask": tensor(mask),
            "weights": torch.zeros(len(mask), device=device),
            "coefficient": torch.zeros(len(mask), device=device),
            "reward_cost": torch.zeros(len(mask), device=device),
            "old_logprobs": behaviour,
            "importance": torch.ones(len(mask), device=device),
            "on_policy": tensor(written.policy_versions == policy_version),
            **said,
        },
        device,
        _hidden_states(ids[mine], teachers, heads, own_tokens, device),
        _hidden_states(ids[mine], reference, heads, own_tokens, device),
        mine=mine,
        own=None if mine.all() else tensor(np.cumsum(own_tokens) - 1),
    )
    if written.rewards.size:
        whole = batch.whole()
        costs = reward_cost(tensor(written.rewards), whole.padded(whole.mask), batch.groups())
        batch.tensors["reward_cost"] = whole.flat(costs)
    return batch


def _said_by(
    ids: np.ndarray,
    mine: np.ndarray,
    batches: Sequence[Trajectories | TeacherScores | LargeScores],
    reference_teacher: str | None,
) -> tuple[Said, Said | None]:
    """(by the teachers, by the reference teacher where there is one) of the trajectories with these ids [B, 3], of which
    those in `mine` [B] bool are this rank's."""
    scored = [b for b in batches if isinstance(b, TeacherScores)]
    complete = rejoined(ids[mine], scored, [b for b in batches if isinstance(b, LargeScores)])

    def of(chosen: list[int]) -> Said:
        whole = [complete[i] for i in chosen]
        own = select_scores(ids[mine], whole)
        light = [without_large(scored[i]) for i in chosen]
        return Said(own.logprobs if mine.all() else select_scores(ids, light).logprobs, own, whole)

    teaching = [i for i, batch in enumerate(scored) if batch.teacher != reference_teacher]
    referring = [i for i, batch in enumerate(scored) if batch.teacher == reference_teacher]
    return of(teaching), of(referring) if referring else None


def _missing(teachers: Said, reference: Said | None, own_tokens: np.ndarray) -> np.ndarray:
    """[N] int32: 1 where a score is missing. What is missing in another rank's supports, that rank alone knows."""
    missing = np.zeros(len(own_tokens), np.int32)
    for said in (teachers, reference):
        if said is not None:
            missing |= ~np.isfinite(said.logprobs)
            missing[own_tokens] |= ~np.isfinite(said.own.support_logprobs).all(-1)
    return missing


def _said_tensors(
    teachers: Said,
    reference: Said | None,
    mask: np.ndarray,
    own_tokens: np.ndarray,
    extrapolation: float,
    tensor: Callable[[np.ndarray], Tensor],
) -> dict[str, Tensor]:
    """Those fields of `Part` that the teachers decide: [N], or of what is LARGE the tokens of this rank."""

    def where_known(values: np.ndarray) -> Tensor:
        known = mask if values.ndim == 1 else mask[own_tokens, None]
        return tensor(np.where(known, values, np.float32(0)))

    logprobs, own = where_known(teachers.logprobs), teachers.own
    reference_support = own.support_logprobs[:, :0]
    if reference is not None:
        logprobs = extrapolated_teacher(logprobs, where_known(reference.logprobs), extrapolation)
        reference_support = reference.own.support_logprobs
    return {
        "teacher_logprobs": logprobs,
        "support_ids": tensor(own.support_ids.astype(np.int64)),
        "support_logprobs": where_known(own.support_logprobs),
        "reference_logprobs": where_known(reference_support),
    }


def _hidden_states(
    ids: np.ndarray, said: Said | None, heads: Mapping[str, Head], own_tokens: np.ndarray, device: str
) -> list[HiddenStates]:
    """What the teachers with these heads sent of the trajectories with these ids [M, 3], whose tokens are these of the
    update: own_tokens [N] bool.

    A state that is not finite becomes zero: its token, whose score is missing, is masked.
    """
    if said is None or not heads:
        return []
    _, teachers = scores_by_teacher(ids, said.batches)
    out = []
    for name, own in teachers.items():
        places = np.full(len(own_tokens), -1, np.int64)
        places[np.flatnonzero(own_tokens)[own.places]] = np.arange(len(own.places))
        states = from_array(own.hidden).to(device)
        out.append(
            HiddenStates(
                torch.where(states.isfinite(), states, torch.zeros_like(states)),
                heads[name],
                torch.from_numpy(places).to(device),
                torch.from_numpy(own.log_weights).to(device),
            )
        )
    return out
