"""Collates trajectories and their teachers' scores into the tensors of one update.

Shapes: B trajectories and N response tokens of the update; M, n the trajectories and response tokens of this rank (all
of them with one rank); K support, V vocabulary, H hidden size.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from actors.errors import CampaignError
from actors.forward.logprobs import from_array
from actors.forward.packing import Microbatch, microbatches
from actors.trajectory import (
    TeacherScores,
    Trajectories,
    TrajectoryId,
    offsets_of,
    ragged_rows,
    scores_by_teacher,
    select_scores,
    select_trajectories,
)
from learner.config import ObjectiveConfig
from learner.hidden_states import Head, HiddenStates
from learner.objective.divergences import extrapolated_teacher
from learner.objective.estimator_table import estimator_row
from learner.objective.policy_gradient import reward_cost, token_weights
from learner.student.sharding import Ranks

SHARES_TOLERANCE = 1e-3
"""How far from 1 the shares of a trajectory's teachers may add up to."""

LARGE = ("support_ids", "support_logprobs", "reference_logprobs")
"""Per-token fields wider than a scalar."""
NO_TOKENS = Microbatch(
    rows=np.zeros(0, np.int64),
    lengths=np.ones(1, np.int64),
    input_ids=np.zeros(1, np.int64),
    positions=np.zeros(0, np.int64),
    tokens=np.zeros(0, np.int64),
)
"""A forward pass that nothing is taken from, for a rank that has fewer micro-batches than another."""


@dataclass(frozen=True, slots=True)
class Part:
    """What the loss of one micro-batch needs."""

    tokens: Tensor
    """[n] int64."""
    behaviour_logprobs: Tensor
    """[n] float32."""
    teacher_logprobs: Tensor
    """[n] float32, 0 where masked."""
    mask: Tensor
    """[n] bool: the token is trained, has a finite score, and is none of `objective.masked_token_ids`."""
    trained: Tensor
    """[n] bool: the student wrote the token. Untrained tokens have no place in the padded form."""
    weights: Tensor
    """[n] float32, 0 where masked: the share of each token's cost in the loss."""
    reward_cost: Tensor
    """[n] float32: minus the advantage of the response's reward; 0 where masked, or where no reward is given."""
    coefficient: Tensor
    """[n] float32: A_t, where it was computed for the whole update; else 0."""
    old_logprobs: Tensor
    """[n] float32: log pi_old, what the ratio is to."""
    importance: Tensor
    """[n] float32: weight that corrects for the engine's numerics, 1 where nothing is corrected."""
    on_policy: Tensor
    """[n] bool: trained, and sampled by the very weights that the update starts from."""
    support_ids: Tensor
    """[n, K] int64; [n, 0] where the support is the whole vocabulary."""
    support_logprobs: Tensor
    """[n, K] or [n, V] float32."""
    reference_logprobs: Tensor
    """[n, K] or [n, V] float32: of the reference teacher on the same support; [n, 0] without one."""
    hidden: Sequence[HiddenStates]
    """What the teachers sent in place of the whole vocabulary's log-probs; empty for other signals."""
    reference_hidden: Sequence[HiddenStates]
    """The same of the reference teacher."""
    old_hidden: HiddenStates | None
    """Of the learner's own weights at the start of the update, where the trust region wants the exact KL to them."""
    columns: Tensor
    """[n] position in the response, counting trained tokens only."""
    rows: Tensor
    """[n] row in the micro-batch."""
    shape: tuple[int, int]
    """b, T."""

    def padded(self, values: Tensor) -> Tensor:
        """[n] -> [b, T], trained tokens only, 0 where a response has no more of them.

        Whatever is computed from the padded form (rewards to go, discounts, baselines at a position, weights of a prefix)
        therefore never sees a token that the student did not write.
        """
        out = values.new_zeros(self.shape)
        out[self.rows[self.trained], self.columns[self.trained]] = values[self.trained]
        return out

    def flat(self, padded: Tensor) -> Tensor:
        """[b, T] -> [n], 0 at untrained tokens."""
        out = padded.new_zeros(self.trained.shape)
        out[self.trained] = padded[self.rows[self.trained], self.columns[self.trained]]
        return out


@dataclass(frozen=True, slots=True)
class UpdateBatch:
    """One update, on the learner's device."""

    trajectories: Trajectories
    tensors: dict[str, Tensor]
    device: str
    hidden: list[HiddenStates] = field(default_factory=list)
    reference_hidden: list[HiddenStates] = field(default_factory=list)
    old_hidden: list[HiddenStates] = field(default_factory=list)
    """None or one."""
    mine: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """[B] bool: the trajectories that this rank trains on."""
    own: Tensor | None = None
    """[N] int64: index into this rank's own tokens; wide fields (LARGE) exist only for those. None with one rank."""

    def weigh(self, rows: np.ndarray, objective: ObjectiveConfig) -> None:
        """Sets the weights of the tokens of these rows, which make one step; all others get 0."""
        lengths = torch.from_numpy(self.trajectories.lengths).to(self.device)
        chosen = torch.zeros(len(lengths), dtype=torch.bool, device=self.device)
        chosen[torch.from_numpy(rows).to(self.device)] = True
        mask = self.tensors["mask"] & torch.repeat_interleave(chosen, lengths)
        self.tensors["weights"] = token_weights(mask, lengths, objective.aggregation, objective.aggregation_constant)

    def microbatches(self, token_budget: int, rows: np.ndarray) -> list[Microbatch]:
        """Forward passes of at most `token_budget` tokens over the trajectories of `rows`."""
        t = self.trajectories
        chosen = select_trajectories(t.ids[rows], [t])
        tokens = ragged_rows(np.arange(len(t.response_tokens)), t.response_offsets, rows)
        return [
            Microbatch(
                rows=rows[part.rows],
                lengths=part.lengths,
                input_ids=part.input_ids,
                positions=part.positions,
                tokens=tokens[part.tokens],
            )
            for part in microbatches(
                chosen.prompt_tokens,
                chosen.prompt_offsets,
                chosen.response_tokens,
                chosen.response_offsets,
                token_budget,
            )
        ]

    def all_tokens(self) -> Part:
        """All tokens of the update as one part; its padded form is [B, T] in the order of the ids. With several ranks,
        without the wide fields, which exist on one rank only."""
        lengths = self.trajectories.lengths
        rows = np.arange(len(lengths))
        nothing = rows[:0]
        everything = Microbatch(rows, nothing, nothing, nothing, tokens=np.arange(lengths.sum()))
        return self.part(everything, large=self.own is None)

    def groups(self) -> Tensor:
        """[B] the same number for all samples of one prompt."""
        _, groups = np.unique(self.trajectories.ids[:, :2], axis=0, return_inverse=True)
        return torch.from_numpy(groups.reshape(-1)).to(self.device)

    def part(self, microbatch: Microbatch, *, large: bool = True) -> Part:
        """The tensors of one micro-batch, of trajectories of this rank; large: also what only it has."""
        index = torch.from_numpy(microbatch.tokens).to(self.device)
        own = index[:0] if not large else index if self.own is None else self.own[index]
        lengths = self.trajectories.lengths[microbatch.rows]
        trained = self.trajectories.trained[microbatch.tokens]
        before = np.cumsum(trained) - trained  # trained tokens before each, in the whole part
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)  # where each token's trajectory begins
        columns = before - before[starts] if len(before) else before
        return Part(
            **{name: values[index if name not in LARGE else own] for name, values in self.tensors.items()},
            hidden=[source.at(index) for source in self.hidden],
            reference_hidden=[source.at(index) for source in self.reference_hidden],
            old_hidden=next((source.at(index) for source in self.old_hidden), None),
            columns=torch.from_numpy(columns).to(self.device),
            rows=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(self.device),
            shape=(len(lengths), int((columns[trained] + 1).max(initial=0))),
        )


def minibatch_rows(trajectories: int, count: int) -> list[np.ndarray]:
    """Rows of the update in `count` parts, taken in turn so that each has its share of every group's neighbours."""
    return [np.arange(start, trajectories, count) for start in range(min(count, trajectories))]


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
    mask = written.trained & ~missing & ~np.isin(written.response_tokens, list(masked_token_ids))

    def where_known(values: np.ndarray) -> Tensor:
        known = mask if values.ndim == 1 else mask[own_tokens, None]
        return tensor(np.where(known, values, np.float32(0)))

    teacher_logprobs = where_known(logprobs)
    if reference is not None:
        teacher_logprobs = extrapolated_teacher(
            teacher_logprobs, where_known(reference_logprobs), objective.extrapolation
        )
    behaviour = tensor(
        np.where(written.trained, written.behaviour_logprobs, np.float32(0))
    )  # nobody sampled the others
    if (
        estimator_row(objective.estimator).text_by == "teacher"
    ):  # the teacher wrote these responses, so it is the behaviour policy
        behaviour = teacher_logprobs
    batch = UpdateBatch(
        written,
        {
            "tokens": tensor(written.response_tokens.astype(np.int64)),
            "behaviour_logprobs": behaviour,
            "teacher_logprobs": teacher_logprobs,
            "mask": tensor(mask),
            "trained": tensor(written.trained),
            "weights": torch.zeros(len(mask), device=device),
            "coefficient": torch.zeros(len(mask), device=device),
            "reward_cost": torch.zeros(len(mask), device=device),
            "old_logprobs": behaviour,
            "importance": torch.ones(len(mask), device=device),
            "on_policy": tensor(written.trained & (written.policy_versions == policy_version)),
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
        everything = batch.all_tokens()
        costs = reward_cost(tensor(written.rewards), everything.padded(everything.mask), batch.groups())
        batch.tensors["reward_cost"] = everything.flat(costs)
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
