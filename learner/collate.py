"""Collates trajectories and their teachers' scores into the tensors of one update, and cuts it into micro-batches.

Shapes: B trajectories and N response tokens of the update; n the response tokens of this rank or of a micro-batch; b the
trajectories of a micro-batch, T the longest of their responses; K support, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from actors.forward.packing import Microbatch, microbatches
from actors.forward.slices import Slices
from actors.teacher_scores import TeacherScores
from actors.trajectory import NO_VERSION, Trajectories, ragged_rows
from learner.config import ObjectiveConfig
from learner.hidden_states import Head, HiddenStates
from learner.objective.divergences import extrapolated_teacher
from learner.objective.estimator_table import estimator_row, reads_distribution
from learner.objective.policy_gradient import filter_weights, reward_cost, step_size, token_weights
from learner.scores import MergedScores, merge_scores
from learner.student.sharding import Ranks

WIDE_TENSORS = ("support_ids", "support_logprobs", "reference_logprobs")
"""Tensors of an update with more than one number a token; a rank has them of its own tokens only."""
NO_TOKENS = Microbatch(
    rows=np.zeros(0, np.int64),
    lengths=np.ones(1, np.int64),
    input_ids=np.zeros(1, np.int64),
    positions=np.zeros(0, np.int64),
    tokens=np.zeros(0, np.int64),
)
"""A forward pass over one dummy token, from which no prediction is taken: for a rank that has fewer micro-batches than
another. All ranks gather the layers together, so each has to make as many passes as the others."""


class Step(NamedTuple):
    """One optimiser step of an epoch."""

    rows: np.ndarray
    """Numbers of its trajectories in the update, on all ranks."""
    passes: list[Microbatch]
    """This rank's micro-batches, as many as on every other rank."""


@dataclass(frozen=True, slots=True)
class Part:
    """What the loss of one micro-batch needs; where several ranks share its row, of the tokens that this rank predicts."""

    tokens: Tensor
    """[n] int64."""
    behaviour_logprobs: Tensor
    """[n] float32: log pi of the weights that sampled the token, before any filter."""
    filter_weight: Tensor
    """[n] float32 in (0, 1]: from the filtered distribution that was sampled to pi; 1 where nothing filters."""
    teacher_logprobs: Tensor
    """[n] float32, 0 where masked."""
    mask: Tensor
    """[n] bool: the token is trained, has a finite score, and is none of `objective.masked_token_ids`, nor of a turn that
    is left out."""
    trained: Tensor
    """[n] bool: the student wrote the token. Untrained tokens have no place in the padded form."""
    students: Tensor | None
    """[m] int64: which of the n tokens the student wrote; None: all."""
    turns: Tensor
    """[n] int64: the student's turn, from 0 in each response; -1 where it did not write the token."""
    weights: Tensor
    """[n] float32, 0 where masked: the share of each token's cost in the loss."""
    reward_cost: Tensor
    """[n] float32: minus the advantage of the response's reward; 0 where masked, or where no reward is given."""
    coefficient: Tensor
    """[n] float32: A_t, where it was computed for the whole update; else 0."""
    old_logprobs: Tensor
    """[n] float32: log pi_old, what trust region and metrics measure from."""
    start_logprobs: Tensor
    """[n] float32: log of what the clipped ratio is to: `old_logprobs`, or the learner's own (`mismatch.pi_old`)."""
    importance: Tensor
    """[n] float32: weight that corrects for the engine's numerics, 1 where nothing is corrected."""
    on_policy: Tensor
    """[n] bool: trained, and sampled by the very weights that the update starts from."""
    support_ids: Tensor
    """[n, K] int64; [n, 0] where the support is the whole vocabulary."""
    support_logprobs: Tensor
    """[n, K] or [n, V] float32. NaN: an entry of a support that a teacher has no score for."""
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
    whole: "Part | None" = None
    """The same of all tokens of the row, without WIDE_TENSORS, where several ranks share it."""
    own: slice = field(default_factory=lambda: slice(None))
    """Which tokens of `whole` these are."""

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
    policy_unknown: bool = False
    """Tokens were filtered by an engine that has not recorded their log-probs before the filter."""
    wide_places: Tensor | None = None
    """[N] int64: the row of each of this rank's tokens in WIDE_TENSORS. None with one rank, which has all rows."""
    sliced: bool = False
    """Several ranks share each row."""

    def weigh(self, rows: np.ndarray, objective: ObjectiveConfig, beta: float) -> float:
        """Sets the weights of the tokens of these rows, which make one step; all others get 0. Returns its `step_size`.

        The denominators (tokens or responses of the step) are those of all micro-batches and ranks: each rank has the
        mask of all N tokens. The loss is then a plain sum, and its gradient does not depend on how a step is cut.
        0: no token is left to learn from. beta: weight of the trust region's KL.
        """
        lengths = torch.from_numpy(self.trajectories.lengths).to(self.device)
        chosen = torch.zeros(len(lengths), dtype=torch.bool, device=self.device)
        chosen[torch.from_numpy(rows).to(self.device)] = True
        mask = self.tensors["mask"] & torch.repeat_interleave(chosen, lengths)
        self.tensors["weights"] = token_weights(mask, lengths, objective.aggregation, objective.aggregation_constant)
        # A token whose importance is 0 has no cost, but still the penalty of the trust region.
        left = mask & (self.tensors["importance"] != 0) if beta == 0 else mask
        return step_size(mask, lengths, objective.aggregation).item() if left.any() else 0.0

    def take_policy(self, logprobs: Tensor) -> None:
        """Sets pi_old to the learner's own log-probs [N], where the engine's before its filter are not known."""
        written = self.trajectories
        sampled = _tensor(np.where(written.trained, written.behaviour_logprobs, np.float32(0)), self.device)
        for name in ("behaviour_logprobs", "old_logprobs", "start_logprobs"):
            self.tensors[name] = logprobs
        self.tensors["filter_weight"] = filter_weights(logprobs, sampled)
        # Nothing is left to compare the learner's numerics with.
        self.tensors["on_policy"] = torch.zeros_like(self.tensors["on_policy"])

    def set_rewards(self, reward_B: Tensor) -> None:
        """Sets the cost of the responses' rewards. It is relative to other samples of the prompt, so it is computed for
        the whole update, before the first micro-batch."""
        all_tokens = self.all_tokens()
        costs = reward_cost(reward_B, all_tokens.padded(all_tokens.mask), self.groups())
        self.tensors["reward_cost"] = all_tokens.flat(costs)

    def all_tokens(self) -> Part:
        """All tokens of the update as one part; its padded form is [B, T] in the order of the ids. With several ranks it
        lacks WIDE_TENSORS, which each rank has of its own tokens only."""
        lengths = self.trajectories.lengths
        return self._part(np.arange(len(lengths)), np.arange(lengths.sum()), wide=self.wide_places is None)

    def groups(self) -> Tensor:
        """[B] the same number for all samples of one prompt."""
        _, groups = np.unique(self.trajectories.ids[:, :2], axis=0, return_inverse=True)
        return torch.from_numpy(groups.reshape(-1)).to(self.device)

    def part(self, microbatch: Microbatch) -> Part:
        """The tensors of one micro-batch of this rank."""
        if not self.sliced:
            return self._part(microbatch.rows, microbatch.tokens, wide=True)
        offsets = self.trajectories.response_offsets
        tokens = ragged_rows(np.arange(offsets[-1]), offsets, microbatch.rows)
        whole = self._part(microbatch.rows, tokens, wide=False)
        # The tokens that a slice predicts are neighbours in the row.
        start = int(np.argmax(tokens == microbatch.tokens[0])) if len(microbatch.tokens) else 0
        own = slice(start, start + len(microbatch.tokens))
        values = self._values(microbatch.tokens, wide=True)
        return replace(whole, **values, columns=whole.columns[own], rows=whole.rows[own], whole=whole, own=own)

    def _part(self, rows: np.ndarray, tokens: np.ndarray, *, wide: bool) -> Part:
        """The part of all tokens of these trajectories. wide: with WIDE_TENSORS."""
        lengths = self.trajectories.lengths[rows]
        trained = self.trajectories.trained[tokens]
        # A token's column is the number of trained tokens before it in its own response: those before it in the whole
        # part, less those before its response began. Context between two trained tokens leaves no gap.
        before = np.cumsum(trained) - trained
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        columns = before - before[starts] if len(before) else before
        return Part(
            **self._values(tokens, wide=wide),
            columns=torch.from_numpy(columns).to(self.device),
            rows=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(self.device),
            shape=(len(lengths), int((columns[trained] + 1).max(initial=0))),
        )

    def _values(self, tokens: np.ndarray, *, wide: bool) -> dict[str, Any]:
        """The fields of a Part that have a row for each of these tokens."""
        index = torch.from_numpy(tokens).to(self.device)
        trained = self.trajectories.trained[tokens]
        wide_index = index[:0] if not wide else index if self.wide_places is None else self.wide_places[index]
        return {
            **{name: values[wide_index if name in WIDE_TENSORS else index] for name, values in self.tensors.items()},
            # Found here: on a GPU it would be waited for.
            "students": None if trained.all() else torch.from_numpy(np.flatnonzero(trained)).to(self.device),
            "hidden": [source.at(index) for source in self.hidden],
            "reference_hidden": [source.at(index) for source in self.reference_hidden],
            "old_hidden": next((source.at(index) for source in self.old_hidden), None),
        }


def from_here(part: Mapping[str, Tensor], own: Tensor) -> dict[str, Tensor]:
    """The changed fields of a Part or an update where the clipped ratio starts from the learner's own log-probs [n].

    Tokens of these very weights: they are pi_old. Of an older version: trust region and metrics measure from that still.
    """
    return {"start_logprobs": own, "old_logprobs": torch.where(part["on_policy"], own, part["old_logprobs"])}


def _tensor(values: np.ndarray, device: str) -> Tensor:
    # Copied where they are read-only: arrays of trajectories may lie in Ray's object store.
    return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(device)


def _policy(written: Trajectories, tensor: Callable[[np.ndarray], Tensor]) -> tuple[Tensor, Tensor, bool]:
    """(log pi [N] of the weights that sampled, filter weights [N], whether log pi before a filter is unknown).

    Where it is unknown the first two are placeholders, until `UpdateBatch.take_policy`.
    """
    unfiltered = written.unfiltered_logprobs
    unknown = bool(np.isnan(unfiltered[written.trained]).any()) if unfiltered.size else False
    sampled, policy = written.behaviour_logprobs, written.behaviour_logprobs if unknown else written.policy_logprobs
    # Nobody sampled what is not trained: it has no behaviour log-prob.
    behaviour = tensor(np.where(written.trained, policy, np.float32(0)))
    if not unfiltered.size:
        return behaviour, torch.ones_like(behaviour), unknown
    return behaviour, filter_weights(behaviour, tensor(np.where(written.trained, sampled, np.float32(0)))), unknown


def minibatch_rows(trajectories: int, count: int) -> list[np.ndarray]:
    """Rows of the update in `count` parts, one optimiser step each.

    Taken in turn, because the samples of one prompt are neighbours: each step gets its share of every group.
    """
    return [np.arange(start, trajectories, count) for start in range(min(count, trajectories))]


def steps_of(
    written: Trajectories,
    of_step: Sequence[np.ndarray],
    this_rank_B: np.ndarray,
    token_budget: int,
    slices: Slices | None,
    ranks: Ranks,
    device: str,
) -> list[Step]:
    """Cuts an update into forward passes, once for all its epochs.

    of_step: the rows of each step. this_rank_B: [B] bool, the trajectories that this rank trains on, or its group where
    `slices` says that several ranks share a row of `token_budget` tokens. A rank with fewer passes than another gets
    NO_TOKENS: in each pass the ranks gather the layers together, so one that stopped earlier would leave the others waiting.
    """
    t = written
    arrays = t.prompt_tokens, t.prompt_offsets, t.response_tokens, t.response_offsets
    begins = t.begins if t.begins.size else None
    passes = [microbatches(*arrays, token_budget, rows=rows[this_rank_B[rows]], begins=begins) for rows in of_step]
    if slices is not None:
        passes = [[one.within(slices.own(len(one.input_ids))) for one in of] for of in passes]
    most = ranks.max(torch.tensor([len(of) for of in passes], device=device)).tolist()
    return [
        Step(rows, of + [NO_TOKENS] * (count - len(of))) for rows, of, count in zip(of_step, passes, most, strict=True)
    ]


def tokens_of(steps: Sequence[Step], count: int) -> np.ndarray:
    """[N] bool: the tokens that these passes predict, of `count` in the update."""
    found = np.zeros(count, bool)
    for step in steps:
        for one in step.passes:
            found[one.tokens] = True
    return found


def _mask(
    written: Trajectories,
    scores: MergedScores,
    objective: ObjectiveConfig,
    masked_token_ids: Sequence[int],
    vocabulary: int,
) -> np.ndarray:
    """[N] bool: tokens of the student's with finite scores of all teachers, which are not masked by the configuration, and
    whose turn is trained on.

    A support counts only if the objective reads it.
    """
    mask = written.trained & scores.scored & ~np.isin(written.response_tokens, list(masked_token_ids))
    if objective.truncated == "mask":
        mask &= ~np.repeat(written.truncated, written.lengths)
    mask &= written.response_tokens < vocabulary  # an engine of the user's own may sample padding rows
    if objective.first_turns is not None:
        mask &= written.turns < objective.first_turns
    if objective.last_turns is not None:
        mask &= written.turns >= np.repeat(written.turn_counts - objective.last_turns, written.lengths)
    return mask & scores.distributed if reads_distribution(objective) else mask


def collate(
    written: Trajectories,
    batches: Sequence[TeacherScores],
    this_rank_B: np.ndarray,
    this_rank_N: np.ndarray,
    policy_version: int,
    objective: ObjectiveConfig,
    device: str,
    *,
    masked_token_ids: Sequence[int],
    vocabulary: int,
    heads: Mapping[str, Head],
    ranks: Ranks,
    sliced: bool,
) -> UpdateBatch:
    """The tensors of the update on `written`, in its order; the fields of Part say their shapes and units.

    this_rank_B: [B] bool, the trajectories that this rank trains on. this_rank_N: [N] bool, their tokens; where several
    ranks share each row (`sliced`), those that this rank predicts. batches:
    hold the scores of these trajectories, from all their teachers, and perhaps of others. heads: of teachers that send hidden states.
    policy_version: of the weights that the update starts from. CampaignError: scores of a trajectory are missing.
    """
    tensor = partial(_tensor, device=device)
    reference_name = objective.reference_teacher
    scores = merge_scores(written, this_rank_B, this_rank_N, batches, reference_name, heads, ranks, device)
    mask = _mask(written, scores, objective, masked_token_ids, vocabulary)

    def where_known(values: np.ndarray) -> Tensor:
        known = mask if values.ndim == 1 else mask[this_rank_N, None]
        # 0 and not NaN: 0 * NaN is NaN, so a weight of 0 alone would not keep it out of the loss.
        return tensor(np.where(known, values, np.float32(0)))

    teacher_logprobs = where_known(scores.logprobs)
    if objective.reference_teacher is not None:
        reference = where_known(scores.reference_logprobs)
        teacher_logprobs = extrapolated_teacher(teacher_logprobs, reference, objective.extrapolation)
    behaviour, filter_weight, unknown = _policy(written, tensor)
    nobodys = bool((written.policy_versions[written.trained] == NO_VERSION).any())
    if estimator_row(objective.estimator).text_by == "teacher" or nobodys:
        behaviour = teacher_logprobs  # the text is the teacher's, or only distances to the teacher can be told
    zeros = torch.zeros(len(mask), device=device)
    tensors = {
        "tokens": tensor(np.minimum(written.response_tokens, vocabulary - 1).astype(np.int64)),
        "behaviour_logprobs": behaviour,
        "filter_weight": filter_weight,
        "teacher_logprobs": teacher_logprobs,
        "mask": tensor(mask),
        "trained": tensor(written.trained),
        "turns": tensor(written.turns),
        "weights": zeros,  # set for each step, by `weigh`
        "coefficient": zeros,  # set by the learner's look-ahead, where it depends on the whole update
        "reward_cost": zeros,  # set below, where there are rewards
        **dict.fromkeys(("old_logprobs", "start_logprobs"), behaviour),  # or the learner's own, see old_policy.py
        "importance": torch.ones_like(zeros),
        "on_policy": tensor(written.trained & (written.policy_versions == policy_version)),
        "support_ids": tensor(scores.support_ids.astype(np.int64)),
        "support_logprobs": where_known(scores.support_logprobs),
        "reference_logprobs": where_known(scores.reference_support_logprobs),
    }
    places = None if this_rank_N.all() else tensor(np.cumsum(this_rank_N) - 1)
    hidden, of_reference = scores.hidden, scores.reference_hidden
    batch = UpdateBatch(written, tensors, device, hidden, of_reference, [], unknown, places, sliced)
    if written.rewards.size:
        batch.set_rewards(tensor(written.rewards))
    return batch
