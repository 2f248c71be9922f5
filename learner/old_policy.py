"""The policy that an update starts from, pi_old, in the learner's own numerics: passes without gradients.

Shapes: N response tokens of the update.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from actors.errors import CampaignError
from learner.collate import Step, UpdateBatch, from_here
from learner.config import LearnerConfig
from learner.costs import coefficients, importance_of, needs_whole_update
from learner.forward import Forward, exact_forward_kl, exact_reverse_kl, no_columns
from learner.objective.estimator_table import reads_distribution
from learner.objective.trust_region import k3
from learner.student.sharding import Ranks

UNRECORDED = (
    "learner.objective.mismatch.correction: the engine of rollout.backend records no log-probs before top-k and top-p, so "
    "its numerics cannot be told from the filter; expected unfiltered_logprobs (docs/extending.md), or correction: none"
)


class OldPolicy:
    """Computes what the learner's weights say of a whole update before a step changes them, and the KL to that."""

    def __init__(self, forward: Forward, config: LearnerConfig, ranks: Ranks, device: str, *, own_pi_old: bool):
        """own_pi_old: the ratio starts at the learner's own log-probs (`starts_at_learner` in validation.py)."""
        self._forward, self._config, self._ranks, self._device = forward, config, ranks, device
        self._own_pi_old = own_pi_old

    def look_ahead(self, batch: UpdateBatch, steps: Sequence[Step], go_on: Callable[[], None]) -> UpdateBatch | None:
        """A pass over the update without gradients, before the first step, if the objective needs one.

        It computes what a micro-batch cannot: the learner's own pi_old (to correct the engine's numerics, in place of what
        the engine has not recorded, for an exact KL, or for the limits of the trust region), and coefficients that depend
        on other trajectories. go_on: called before each micro-batch. Returns the batch with the learner's weights as pi_old;
        None without such a pass.
        """
        objective = self._config.objective
        region, whole_update = objective.trust_region, needs_whole_update(objective)
        correct, exact_region = objective.mismatch.correction != "none", region.estimator == "exact"
        if correct and batch.policy_unknown:
            raise CampaignError(UNRECORDED)
        limited = region.max_kl is not None or region.target_kl is not None
        # The pass of an update's only step has the weights of the update's start itself.
        moves = self._own_pi_old and self._config.epochs_per_update * self._config.minibatches_per_update > 1
        if not (whole_update or correct or batch.policy_unknown or exact_region or limited or moves):
            return None  # pi_old is then pi_behaviour, as it was recorded, and the update needs no extra pass
        with_kl = whole_update and reads_distribution(objective)
        begun, kl = self.now(batch, steps, go_on, with_kl=with_kl)
        batch.old_hidden.extend(begun.old_hidden)
        own = begun.tensors["old_logprobs"]
        if batch.policy_unknown:
            batch.take_policy(own)
        all_tokens = batch.all_tokens()
        if correct:
            # From here on the ratio is to the learner's own pi_old; the weight carries what lies before it.
            batch.tensors["importance"] = importance_of(own, all_tokens, objective)
            batch.tensors["old_logprobs"] = batch.tensors["start_logprobs"] = own
        elif self._own_pi_old:
            batch.tensors.update(from_here(batch.tensors, own))
        if whole_update:
            student = own if objective.recompute_log_ratio else all_tokens.behaviour_logprobs
            found = coefficients(student, kl if with_kl else None, all_tokens, batch.groups(), objective)
            batch.tensors["coefficient"] = found
        return begun

    @torch.no_grad()
    def now(
        self, batch: UpdateBatch, steps: Sequence[Step], go_on: Callable[[], None], *, with_kl: bool = False
    ) -> tuple[UpdateBatch, torch.Tensor]:
        """(the batch with the learner's weights as they are now as pi_old; with_kl: [N] KL(pi || q) at each context).

        A pass over these steps without gradients. Other rows have zeros. An exact trust region also gets pi_old over the
        whole vocabulary, as hidden states. go_on: called before each micro-batch.
        """
        found = {name: torch.zeros(len(batch.tensors["mask"]), device=self._device) for name in ("logprobs", "kl")}
        keep_states = self._config.objective.trust_region.estimator == "exact"
        states: list[torch.Tensor] = []
        places = torch.zeros_like(batch.tensors["tokens"])
        for microbatch in (one for step in steps for one in step.passes):
            go_on()
            part = batch.part(microbatch)
            index = torch.from_numpy(microbatch.tokens).to(self._device)
            keep = states.append if keep_states else None
            reduce = partial(exact_reverse_kl, part, self._config.objective) if with_kl else no_columns
            places[index] = sum(map(len, states)) + torch.arange(len(index), device=self._device)
            for name, column in self._forward.columns(part, microbatch, reduce, keep=keep).items():
                found[name][index] = column
        # Each token is 0 on all ranks but its own, so the sum fills in the others' tokens exactly.
        logprobs, kl = (self._ranks.sum(found[name]) for name in ("logprobs", "kl"))
        old = [self._forward.as_hidden_states(torch.cat(states), places)] if keep_states else []
        return replace(batch, tensors={**batch.tensors, "old_logprobs": logprobs}, old_hidden=old), kl

    @torch.no_grad()
    def forward_kl(self, begun: UpdateBatch, steps: Sequence[Step]) -> float:
        """KL(pi_old || pi_theta) of the current weights, mean in nats a token: exact if the trust region is, else k3.

        begun: the batch with pi_old as `now` has found it.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for microbatch in (one for step in steps for one in step.passes):
            part = begun.part(microbatch)
            found = self._forward.columns(part, microbatch, partial(exact_forward_kl, part))
            # k3 and not k1: each of its terms is at least 0, so a small sample does not hide a KL behind a negative one.
            forward_kl = found.get("forward_kl", k3(found["logprobs"], part.old_logprobs))
            sums += torch.stack([forward_kl[part.mask].sum(), part.mask.sum()])
        # One division at the end, by the tokens of all ranks: each token counts the same.
        total, tokens = self._ranks.sum(sums).tolist()
        return total / max(tokens, 1.0)
