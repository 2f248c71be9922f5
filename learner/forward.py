"""One forward pass of the student over a micro-batch, and the micro-batch's share of the loss.

Shapes: n tokens of the micro-batch or of a chunk of it, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from actors.forward.logprobs import chunked_head, entropy, token_logprobs
from actors.forward.packing import Microbatch, hidden_states
from actors.forward.slices import Slices
from actors.heartbeat import beat
from learner.collate import Part, from_here
from learner.config import LearnerConfig, ObjectiveConfig
from learner.costs import (
    coefficients,
    exact_kl,
    full_cost,
    full_cost_is_exact_kl,
    needs_whole_update,
)
from learner.hidden_states import Head, HiddenStates
from learner.metrics import UpdateMetrics, agreement
from learner.objective.estimator_table import estimator_row, reads_distribution
from learner.objective.policy_gradient import corrected_weights, surrogate
from learner.objective.trust_region import ESTIMATORS as TRUST_REGION
from learner.objective.trust_region import exact, k3
from learner.student.sharding import full_tensor

Rows = slice | torch.Tensor
"""Which tokens of a part."""
Columns = Callable[[torch.Tensor, Rows], dict[str, torch.Tensor]]
"""(log-probs [n, V] of some tokens of a part, which) -> tensors [n, ...] by name."""


class Forward:
    """The student up to its hidden states, its output layer in chunks, and the objective on each."""

    def __init__(
        self,
        body: torch.nn.Module,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        config: LearnerConfig,
        device: str,
        *,
        temperature: float,
        vocabulary: int | None,
        named_by_student: bool,
        own_pi_old: bool = False,
        slices: Slices | None = None,
    ):
        """temperature: that was sampled at. vocabulary: number of the head's rows that are tokens; None: all.
        named_by_student: the teachers' supports are the student's most likely tokens. own_pi_old: the clipped ratio starts
        from the learner's own log-probs, and their ratio to the recorded ones is a weight (`mismatch.pi_old`). slices: this
        rank's place among those that share each row; None: it has all tokens."""
        self._body, self._weight, self._bias = body, weight_VH, bias_V
        self._objective, self._chunk_tokens = config.objective, config.head_chunk_tokens
        self._half = config.compute_dtype == "bfloat16"
        self._device, self._temperature, self._vocabulary = device, temperature, vocabulary
        self._named_by_student, self._own_pi_old, self._slices = named_by_student, own_pi_old, slices

    def as_hidden_states(self, states: torch.Tensor, places: torch.Tensor) -> HiddenStates:
        """Hidden states [N', H] of the current weights as pi_old over the whole vocabulary, for the exact trust region.

        places: [N] the row of each of the update's tokens in `states`. Kept in the compute dtype: 2H bytes a token, where
        log-probs would be 4V.
        """
        # The head is copied: the optimiser changes the weights in place, and pi_old must stay what it was.
        dtype = torch.bfloat16 if self._half else states.dtype
        rows = slice(self._vocabulary)
        weight, bias = full_tensor(self._weight.detach())[rows].to(dtype, copy=True), self._bias
        bias = None if bias is None else full_tensor(bias.detach())[rows].to(dtype, copy=True)
        nothing = torch.zeros(len(states), device=self._device)
        return HiddenStates(states.to(dtype), Head(weight, bias, self._temperature), places, nothing)

    def columns(
        self,
        part: Part,
        microbatch: Microbatch,
        reduce: Columns,
        measure: Columns | None = None,
        keep: Callable[[torch.Tensor], None] | None = None,
    ) -> dict[str, torch.Tensor]:
        """`logprobs`, [n] log pi of the sampled tokens, and what `reduce` and, without gradients, `measure` make of the
        log-probs [n, V], by their names.

        keep is given the hidden states [n, H]. What others than the student wrote does not go through the head: it has zeros.
        """
        names: dict[str, None] = {}
        students = part.students

        def named(columns: Columns, logprobs_nV: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, ...]:
            found = columns(logprobs_nV, chunk if students is None else students[chunk])
            names.update(dict.fromkeys(found))
            return tuple(found.values())

        def sampled(logprobs_nV: torch.Tensor, rows: Rows) -> dict[str, torch.Tensor]:
            return {"logprobs": token_logprobs(logprobs_nV, part.tokens[rows])} | reduce(logprobs_nV, rows)

        beat()
        # Without autocast's cache: a weight is cast once a pass anyway, and would be held until the end of the forward pass.
        with torch.autocast(self._device, torch.bfloat16, enabled=self._half, cache_enabled=False):
            row, slices = microbatch.input_ids, self._slices
            hidden = hidden_states(self._body, row, microbatch.lengths, self._device, slices)
            first = 0 if slices is None else slices.own(len(row)).start
            # Prompts need no log-probs, and the head is the costliest layer of a small model.
            hidden = hidden[torch.from_numpy(microbatch.positions - first).to(self._device)]
            if keep is not None:
                keep(hidden)
            values = chunked_head(
                hidden if students is None else hidden[students],
                full_tensor(self._weight),
                None if self._bias is None else full_tensor(self._bias),
                partial(named, sampled),
                chunk_tokens=self._chunk_tokens,
                temperature=self._temperature,
                vocabulary=self._vocabulary,
                measure=measure and partial(named, measure),
            )
        found = dict(zip(names, values, strict=True))
        if students is None:
            return found
        return {  # the agreement has a row for each chunk
            name: column if name == "agreement" else column.new_zeros(len(part.tokens)).index_put((students,), column)
            for name, column in found.items()
        }

    def loss(
        self, part: Part, microbatch: Microbatch, beta: float, collected: UpdateMetrics, *, starts_here: bool = False
    ) -> torch.Tensor:
        """[] the micro-batch's share of the loss, in nats; the shares of all micro-batches and ranks add up to the loss.

            loss = sum_n w_n (m_n cost_n + beta KL_n)

        w: `part.weights`, 0 where masked, by the aggregation. m: `part.importance`, from the engine's numerics to pi_old.
        f multiplies what samples an action: `part.filter_weight`, from the filtered distribution to pi_old.
        KL: the estimate of KL(pi_old || pi_theta) of `trust_region.estimator`, [n]. cost [n], by the estimator:
        with a coefficient A_t (no gradient), f max(ratio A, clip(ratio, 1 - low, 1 + high) A) with
        ratio = pi_theta / pi_old (PPO, arXiv 1707.06347); `full`, the divergence at each context; `sft`, -log pi_theta.
        part: tensors [n] of the micro-batch on this device. collected: takes the metrics of these tokens. starts_here: the
        weights are those that the update starts from, and `part` does not hold their log-probs.
        """
        objective, row = self._objective, estimator_row(self._objective.estimator)
        full = not row.samples_action

        def reduce(logprobs_nV: torch.Tensor, rows: Rows) -> dict[str, torch.Tensor]:
            cost = {"cost": full_cost(logprobs_nV, part, rows, objective)} if full else {}
            return cost | exact_forward_kl(part, logprobs_nV, rows)

        def measure(logprobs_nV: torch.Tensor, rows: Rows) -> dict[str, torch.Tensor]:
            agreed = agreement(logprobs_nV, part, rows, named_by_student=self._named_by_student)
            found = {"entropy": entropy(logprobs_nV), "agreement": agreed}
            if reads_distribution(objective) and not full_cost_is_exact_kl(objective):
                found |= exact_reverse_kl(part, objective, logprobs_nV, rows)
            return found

        found = self.columns(part, microbatch, reduce, measure)
        logprobs, kl = found["logprobs"], found.get("kl")
        if self._own_pi_old and starts_here:  # without a pass of its own: this one has its weights
            before = {"on_policy": part.on_policy, "old_logprobs": part.old_logprobs}
            own: dict[str, Any] = dict(from_here(before, logprobs.detach()))
            part = replace(part, **own)
        if full_cost_is_exact_kl(objective):
            kl = found["cost"].detach()  # the cost is the KL to be measured: one pass over [n, V] serves both
        cost, clipped = self._cost(logprobs, part, found.get("cost"), kl)
        region = objective.trust_region.estimator
        forward_kl = found["forward_kl"] if region == "exact" else TRUST_REGION[region](logprobs, part.old_logprobs)
        # Filled, not multiplied by 0: a masked token may hold NaN. The importance weight corrects the cost alone; the
        # trust region holds at the contexts as they were sampled.
        cost = (part.importance * cost + beta * forward_kl).masked_fill(~part.mask, 0.0)
        # A sum, no mean: the weights have the denominators of the whole step, over all micro-batches and ranks.
        loss = (part.weights * cost).sum()
        with torch.no_grad():
            columns = {
                "logprobs": logprobs,
                "entropy": found["entropy"],
                "agreement": found["agreement"],
                "reverse_kl": logprobs - part.teacher_logprobs if kl is None else kl,
                "forward_kl_old": forward_kl if region == "exact" else k3(logprobs, part.old_logprobs),
                "clip_fraction": clipped,
            }
            collected.add(loss, part, microbatch.rows, columns)
        return loss

    def _cost(
        self, logprobs: torch.Tensor, part: Part, divergence: torch.Tensor | None, kl: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """([n] cost of each token, [n] whether a clip took its gradient). divergence: that of `full`."""
        objective = self._objective
        if estimator_row(objective.estimator).has_coefficient:
            student = logprobs if objective.recompute_log_ratio else part.behaviour_logprobs
            whole_update = needs_whole_update(objective)
            # Computed here, A_t costs no pass of its own, but sees only the trajectories of this micro-batch.
            a_t = part.coefficient if whole_update else self._coefficients(student, kl, part)
            return self._surrogate(logprobs, part, a_t)
        unclipped = torch.zeros_like(part.mask)
        if divergence is None:  # the negative log-likelihood of `sft`
            return -logprobs, unclipped
        if not objective.reward_weight:
            return divergence, unclipped
        # The divergence needs no sampled action, a reward does: it has its own clipped ratio.
        of_reward, clipped = self._surrogate(logprobs, part, objective.reward_weight * part.reward_cost)
        return divergence + of_reward, clipped

    def _coefficients(self, logprobs: torch.Tensor, kl: torch.Tensor | None, part: Part) -> torch.Tensor:
        """[n] A_t, which may depend on later tokens, and so on what other ranks of the row have found."""
        if part.whole is None or self._slices is None:
            return coefficients(logprobs, kl, part, None, self._objective)
        found = logprobs.new_zeros((2, len(part.whole.tokens)))
        found[0, part.own] = logprobs.detach()
        if kl is not None:
            found[1, part.own] = kl.detach()
        logprobs, of_row = self._slices.sum(found)  # exact: each token is 0 on all ranks but one
        return coefficients(logprobs, None if kl is None else of_row, part.whole, None, self._objective)[part.own]

    def _surrogate(
        self, logprobs: torch.Tensor, part: Part, coefficient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        o = self._objective
        bounds = {"dual_clip": o.dual_clip, "through_log_ratio": o.through_log_ratio}
        cost, clipped = surrogate(logprobs, part.start_logprobs, coefficient, o.clip_low, o.clip_high, **bounds)  # type: ignore[arg-type]
        if self._own_pi_old:
            # The rest of the ratio to the policy that sampled: a constant, which the engine's rounding is in.
            before = part.start_logprobs - part.behaviour_logprobs
            cost = corrected_weights(before, "truncate", o.mismatch.low, o.mismatch.high) * cost
        return part.filter_weight * cost, clipped


def exact_forward_kl(part: Part, logprobs_nV: torch.Tensor, rows: Rows) -> dict[str, torch.Tensor]:
    """`forward_kl`: KL(pi_old || pi_theta) over the whole vocabulary, [n], where the weights before are kept."""
    return {} if part.old_hidden is None else {"forward_kl": exact(logprobs_nV, part.old_hidden.logprobs(rows))}


def exact_reverse_kl(
    part: Part, objective: ObjectiveConfig, logprobs_nV: torch.Tensor, rows: Rows
) -> dict[str, torch.Tensor]:
    """`kl`: KL(pi || q) over the teacher's support, [n]."""
    return {"kl": exact_kl(logprobs_nV, part, rows, objective)}


def no_columns(_logprobs_nV: torch.Tensor, _rows: Rows) -> dict[str, torch.Tensor]:
    """The log-probs of the sampled tokens are enough."""
    return {}
