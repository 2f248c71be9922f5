"""From log-probs to costs: what the configuration's objective does with the tokens of a micro-batch or an update.

The formulas are in objective/policy_gradient.py and objective/divergences.py; here they are chosen. Shapes: n tokens, V vocabulary,
K support.
"""

import torch
from torch import Tensor

from learner.collate import Part
from learner.config import ObjectiveConfig
from learner.hidden_states import mixture_logprobs
from learner.objective import divergences
from learner.objective.policy_gradient import coefficient, corrected_weights, log_importance_weights, position_weights


def needs_distribution(objective: ObjectiveConfig) -> bool:
    """Whether the teacher must send a support, not the sampled token's log-prob alone."""
    return objective.estimator in ("full", "to_go_expected") or objective.baseline == "exact_kl"


def needs_whole_update(objective: ObjectiveConfig) -> bool:
    """Whether A_t depends on other trajectories, so that it cannot be computed micro-batch by micro-batch."""
    return objective.estimator != "full" and objective.baseline in ("batch_mean", "group_mean")


def on_support(logprobs_nV: Tensor, part: Part, rows: slice, objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Student's and teacher's log-probs over the teacher's support, [n, K] each, for some tokens of a part."""
    said = [mixture_logprobs(part.hidden, rows) if part.hidden else part.support_logprobs[rows]]
    if objective.reference_teacher is not None:
        hidden = part.reference_hidden
        said.append(mixture_logprobs(hidden, rows) if hidden else part.reference_logprobs[rows])
    if not part.support_ids.shape[1]:
        student, teacher, *reference = divergences.on_shared_rows(logprobs_nV, *said)
    else:
        close = divergences.with_tail if objective.support == "tail" else divergences.renormalised
        student, teacher, *reference = map(close, (logprobs_nV.gather(-1, part.support_ids[rows]), *said))
    if reference:
        teacher = divergences.extrapolated_teacher(teacher, reference[0], objective.extrapolation)
        if objective.estimator == "full":  # a divergence is between distributions; a sum of log-ratios is not
            teacher = divergences.renormalised(teacher)
    return student, teacher


def exact_kl(logprobs_nV: Tensor, part: Part, rows: slice, objective: ObjectiveConfig) -> Tensor:
    """[n] KL(pi || q) at each context."""
    return divergences.reverse_kl(*on_support(logprobs_nV, part, rows, objective))


def full_cost_is_exact_kl(objective: ObjectiveConfig) -> bool:
    """Whether `full_cost` is the exact KL itself, so that it need not be computed a second time to be measured."""
    plain = objective.log_ratio_clip is None and objective.log_ratio_power is None and objective.proximal_weight == 1
    return objective.estimator == "full" and objective.divergence == "reverse_kl" and plain


def full_cost(logprobs_nV: Tensor, part: Part, rows: slice, objective: ObjectiveConfig) -> Tensor:
    """[n] the divergence that the estimator `full` minimises at each context."""
    student, teacher = on_support(logprobs_nV, part, rows, objective)
    teacher = divergences.proximal_teacher(student, teacher, objective.proximal_weight)
    if objective.log_ratio_clip is not None or objective.log_ratio_power is not None:
        bounded = divergences.bounded_cost(
            student, teacher, power=objective.log_ratio_power, clip=objective.log_ratio_clip
        )
        return divergences.expected_cost(student, bounded)
    parameters = {
        "jsd": objective.mixture,
        "skewed_forward_kl": objective.mixture,
        "skewed_reverse_kl": objective.mixture,
        "entropy_gated_kl": objective.entropy_threshold,
    }
    extra = [parameters[objective.divergence]] if objective.divergence in parameters else []
    return getattr(divergences, objective.divergence)(student, teacher, *extra)


def importance_of(logprobs: Tensor, part: Part, objective: ObjectiveConfig) -> Tensor:
    """[n] weights from pi_behaviour to pi_old, of log-probs `logprobs`, for a part that holds whole trajectories.

    Tokens that are masked were sampled all the same, and count in the weights of those after them.
    """
    mismatch = objective.mismatch
    level = "before" if objective.estimator == "full" and mismatch.level == "prefix" else mismatch.level
    written = part.padded(torch.ones_like(part.mask))
    log_weights = log_importance_weights(part.padded(logprobs - part.behaviour_logprobs), written, level)
    return part.flat(corrected_weights(log_weights, mismatch.correction, mismatch.low, mismatch.high))


def coefficients(
    logprobs: Tensor, kl: Tensor | None, part: Part, groups: Tensor | None, objective: ObjectiveConfig
) -> Tensor:
    """[n] A_t of the tokens of a part that holds whole trajectories, from the student's current log-probs [n]."""
    if objective.estimator == "reward":
        return part.reward_cost
    student = logprobs.detach()
    teacher = divergences.proximal_teacher(student, part.teacher_logprobs, objective.proximal_weight)
    cost = divergences.bounded_cost(student, teacher, power=objective.log_ratio_power, clip=objective.log_ratio_clip)
    cost = torch.where(part.mask, cost, torch.zeros_like(cost))
    mask_BT = part.padded(part.mask)
    found = coefficient(
        objective.estimator,
        part.padded(cost),
        mask_BT,
        kl_BT=None if kl is None else part.padded(torch.where(part.mask, kl, torch.zeros_like(kl))),
        gamma=objective.gamma,
        baseline_name=objective.baseline,
        group_B=groups,
    )
    found = found * position_weights(found, mask_BT, objective.position_weight)
    return part.flat(found) + objective.reward_weight * part.reward_cost
