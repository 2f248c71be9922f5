"""The tensors of one update, and their micro-batches.

Shapes: B trajectories and N response tokens of the update; b, n of a micro-batch, T its longest response; K support.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from actors.forward.packing import Microbatch, microbatches
from actors.trajectory import Trajectories, ragged_rows, select_trajectories
from learner.config import ObjectiveConfig
from learner.hidden_states import HiddenStates
from learner.objective.surrogate import token_weights

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
