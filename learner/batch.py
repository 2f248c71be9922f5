"""The tensors of one update, and their micro-batches.

Shapes: B trajectories and N response tokens of the update; b, n of a micro-batch, T its longest response; K support.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from actors.batching import Microbatch, microbatches
from actors.logprobs import from_array
from actors.trajectory import (
    LargeScores,
    TeacherScores,
    Trajectories,
    ragged_rows,
    rejoined,
    scores_by_teacher,
    select_scores,
    select_trajectories,
    without_large,
)
from learner.config import ObjectiveConfig
from learner.divergences import extrapolated_teacher
from learner.estimators import reward_cost
from learner.hidden import Head, HiddenStates
from learner.objective import token_weights

LARGE = ("support_ids", "support_logprobs", "reference_logprobs")
"""Of what is kept of each token, that which is not a single number."""
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
    """[n] bool: the token has a finite score."""
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
    """[n] bool: sampled by the very weights that are trained."""
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
    """[n] place in the response."""
    rows: Tensor
    """[n] row in the micro-batch."""
    shape: tuple[int, int]
    """b, T."""

    def padded(self, values: Tensor) -> Tensor:
        """[n] -> [b, T], 0 where there is no token."""
        out = values.new_zeros(self.shape)
        out[self.rows, self.columns] = values
        return out

    def flat(self, padded: Tensor) -> Tensor:
        """[b, T] -> [n]."""
        return padded[self.rows, self.columns]


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
    """[N] int64: where several ranks share the update, the place of each token among those of this rank's trajectories,
    of which alone a rank keeps what is large: LARGE. None where all are."""

    @classmethod
    def build(
        cls,
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
    ) -> "UpdateBatch":
        """Joins trajectories and scores by id, in the order of `ids` [B, 3]; `heads` are those of the teachers by name.

        share: says [B] bool which of the trajectories this rank trains on; all of them by default. Where the scores are
        light, the batches hold LargeScores of these alone. total: the sum over the ranks.
        """
        written = select_trajectories(ids, [b for b in batches if isinstance(b, Trajectories)])
        mine = np.ones(len(ids), bool) if share is None else share(written)
        own_tokens = np.repeat(mine, written.lengths)
        places = None if mine.all() else torch.from_numpy(np.cumsum(own_tokens) - 1).to(device)

        scored = [b for b in batches if isinstance(b, TeacherScores)]
        complete = rejoined(ids[mine], scored, [b for b in batches if isinstance(b, LargeScores)])
        teaching, referring = _of_reference(complete, objective.reference_teacher)
        own = select_scores(ids[mine], teaching)
        own_reference = select_scores(ids[mine], referring) if referring else own
        scores, reference = own, own_reference
        if places is not None:  # one number a token, of the other ranks' trajectories too
            teaching_all, referring_all = _of_reference(map(without_large, scored), objective.reference_teacher)
            scores = select_scores(ids, teaching_all)
            reference = select_scores(ids, referring_all) if referring else scores

        def tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        unknown = np.zeros(len(own_tokens), np.int32)  # what other ranks' supports say, these alone know
        unknown[own_tokens] = ~np.isfinite(own.support_logprobs).all(-1)
        unknown[own_tokens] |= ~np.isfinite(own_reference.support_logprobs).all(-1)
        mask = np.isfinite(scores.logprobs) & np.isfinite(reference.logprobs)
        mask &= ~np.isin(written.response_tokens, list(masked_token_ids)) & (total(tensor(unknown)).cpu().numpy() == 0)

        def where_known(values: np.ndarray) -> Tensor:
            known = mask if values.ndim == 1 else mask[own_tokens, None]
            return tensor(np.where(known, values, np.float32(0)))

        strength = objective.extrapolation if referring else 1.0  # 1 is the teacher itself
        teacher = extrapolated_teacher(where_known(scores.logprobs), where_known(reference.logprobs), strength)
        # Responses that the teacher has written: what sampled them is the teacher.
        behaviour = teacher if objective.estimator == "sft" else tensor(written.behaviour_logprobs)

        made = cls(
            written,
            {
                "tokens": tensor(written.response_tokens.astype(np.int64)),
                "behaviour_logprobs": behaviour,
                "teacher_logprobs": teacher,
                "mask": tensor(mask),
                "weights": tensor(np.zeros(len(mask), np.float32)),
                "coefficient": tensor(np.zeros(len(mask), np.float32)),
                "reward_cost": tensor(np.zeros(len(mask), np.float32)),
                "old_logprobs": behaviour,
                "importance": tensor(np.ones(len(mask), np.float32)),
                "on_policy": tensor(written.policy_versions == policy_version),
                "support_ids": tensor(own.support_ids.astype(np.int64)),
                "support_logprobs": where_known(own.support_logprobs),
                "reference_logprobs": where_known(own_reference.support_logprobs[:, : None if referring else 0]),
            },
            device,
            hidden_states(ids[mine], teaching, heads, device, own_tokens) if heads else [],
            hidden_states(ids[mine], referring, heads, device, own_tokens) if heads and referring else [],
            mine=mine,
            own=places,
        )
        if written.rewards.size:
            whole = made.whole()
            costs = reward_cost(tensor(written.rewards), whole.padded(whole.mask), made.groups())
            made.tensors["reward_cost"] = whole.flat(costs)
        return made

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

    def whole(self) -> Part:
        """All tokens of the update, as one part; its padded form is [B, T] in the order of the ids. Without what is LARGE
        where that is on several ranks."""
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
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        return Part(
            **{name: values[index if name not in LARGE else own] for name, values in self.tensors.items()},
            hidden=[source.at(index) for source in self.hidden],
            reference_hidden=[source.at(index) for source in self.reference_hidden],
            old_hidden=next((source.at(index) for source in self.old_hidden), None),
            columns=torch.from_numpy(np.arange(lengths.sum()) - starts).to(self.device),
            rows=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(self.device),
            shape=(len(lengths), int(lengths.max(initial=0))),
        )


def minibatch_rows(trajectories: int, count: int) -> list[np.ndarray]:
    """Rows of the update in `count` parts, taken in turn so that each has its share of every group's neighbours."""
    return [np.arange(start, trajectories, count) for start in range(min(count, trajectories))]


def _of_reference(
    scores: Iterable[TeacherScores], reference_teacher: str | None
) -> tuple[list[TeacherScores], list[TeacherScores]]:
    """(of the other teachers, of the reference teacher)."""
    listed = list(scores)
    return (
        [batch for batch in listed if batch.teacher != reference_teacher],
        [batch for batch in listed if batch.teacher == reference_teacher],
    )


def hidden_states(
    ids: np.ndarray, scores: Sequence[TeacherScores], heads: Mapping[str, Head], device: str, own_tokens: np.ndarray
) -> list[HiddenStates]:
    """What the teachers with these heads sent of the trajectories with these ids [M, 3], whose tokens are these of the
    update: own_tokens [N] bool.

    A state that is not finite becomes zero: its token, whose score is missing, is masked.
    """
    _, teachers = scores_by_teacher(ids, scores)
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
