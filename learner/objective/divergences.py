"""Divergences between student pi and teacher q at each token, and transformations of the teacher's log-probs.

Shapes: n tokens; V vocabulary; K support, which is the vocabulary or the top k tokens, with or without one bucket for the
rest. A row [K] holds log-probs in nats and must sum to one: complete a top-k row with `with_tail` or `renormalised` first.
A divergence is a cost [n] in nats, differentiable in the student's log-probs. The teacher's log-probs are finite and
without gradient.

Differentiate these costs; do not use one as a detached coefficient. A number computed over a support is the same for
every sampled token, and a coefficient that does not depend on the token has an expected policy gradient of zero.
"""

import math

import torch
from torch import Tensor

NO_MASS = -1e4
"""Log of a probability that is 0 in float32 and whose log-sum-exp has a gradient."""


def with_tail(logprobs_nK: Tensor) -> Tensor:
    """[n, K] -> [n, K + 1]: appends log(1 - sum_k p_k), one bucket for all tokens outside the support.

    Merging tokens can only lower a divergence, so the result is a lower bound of the divergence over the vocabulary. It
    still grows when the student moves mass outside the support. This is the default for a top-k support.
    """
    mass = logprobs_nK.logsumexp(-1, keepdim=True)
    # Rounding can make the mass 1 or more. The bucket keeps at least one machine epsilon, so its log stays finite.
    tail = torch.log(-torch.expm1(mass.clamp(max=-torch.finfo(mass.dtype).eps)))
    return torch.cat([logprobs_nK, tail], -1)


def renormalised(logprobs_nK: Tensor) -> Tensor:
    """[n, K] -> [n, K]: log p_k - log sum_j p_j, the distribution given the support (arXiv 2603.25562).

    It ignores the student's mass outside the support. Over a support of one token every divergence is 0.
    """
    return logprobs_nK - logprobs_nK.logsumexp(-1, keepdim=True)


def without_missing(*logprobs_nK: Tensor) -> list[Tensor]:
    """Leaves the entries of a support out that are NaN in one of its log-probs [n, K], by giving them no mass in any.

    Their mass goes to the tail bucket, or is not counted where a support is renormalised: in the student as in the
    teacher, so the divergence is that over the smaller support.
    """
    missing = torch.stack([x.detach().isnan() for x in logprobs_nK]).any(0)
    # Finite, since the gradient of log-sum-exp at -inf and -inf is NaN; exp() of it is exactly 0.
    return [x.masked_fill(missing, NO_MASS) for x in logprobs_nK] if missing.any() else list(logprobs_nK)


def on_shared_rows(*logprobs_nV: Tensor) -> list[Tensor]:
    """Cuts each [n, V'] to the smallest V' and renormalises what was cut: models of one family pad their vocabularies
    to different sizes."""
    width = min(x.shape[1] for x in logprobs_nV)
    # Without renormalising, the student could lower a divergence by moving mass to the rows that were cut.
    return [x if x.shape[1] == width else renormalised(x[:, :width]) for x in logprobs_nV]


def _kl(p_nK: Tensor, q_nK: Tensor) -> Tensor:
    """[n] sum_k p_k (log p_k - log q_k)."""
    # 0 log 0 = 0. Selecting before the product keeps the gradient of such a term 0 as well, instead of NaN.
    difference = torch.where(p_nK == -torch.inf, torch.zeros_like(p_nK), p_nK - q_nK)
    return (p_nK.exp() * difference).sum(-1)


def _mixture(p_nK: Tensor, q_nK: Tensor, weight: float) -> Tensor:
    """[n, K] log((1 - weight) p + weight q), 0 < weight < 1."""
    return torch.logaddexp(p_nK + math.log1p(-weight), q_nK + math.log(weight))


def reverse_kl(student_logprobs_nK: Tensor, teacher_logprobs_nK: Tensor) -> Tensor:
    """[n] KL(pi || q) = sum_k pi_k (log pi_k - log q_k): mode-seeking.

    Its gradient is the expectation of the estimator `immediate` over the sampled token, so it has a lower variance.
    """
    return _kl(student_logprobs_nK, teacher_logprobs_nK)


def forward_kl(student_logprobs_nK: Tensor, teacher_logprobs_nK: Tensor) -> Tensor:
    """[n] KL(q || pi) = sum_k q_k (log q_k - log pi_k): mass-covering (Hinton et al. 2015, at the student's contexts)."""
    return _kl(teacher_logprobs_nK, student_logprobs_nK)


def jsd(student_logprobs_nK: Tensor, teacher_logprobs_nK: Tensor, beta: float) -> Tensor:
    """[n] beta KL(q || m) + (1 - beta) KL(pi || m), m = beta q + (1 - beta) pi, 0 < beta < 1 (GKD, arXiv 2306.13649, eq. 1).

    GKD's P is the teacher. The divergence is 0 at beta = 0 and 1. jsd / beta tends to KL(q || pi) as beta -> 0, and
    jsd / (1 - beta) tends to KL(pi || q) as beta -> 1; TRL returns these limits for beta = 0 and 1.
    """
    assert 0.0 < beta < 1.0
    middle = _mixture(student_logprobs_nK, teacher_logprobs_nK, beta)
    return beta * _kl(teacher_logprobs_nK, middle) + (1 - beta) * _kl(student_logprobs_nK, middle)


def skewed_forward_kl(student_logprobs_nK: Tensor, teacher_logprobs_nK: Tensor, skew: float) -> Tensor:
    """[n] KL(q || skew q + (1 - skew) pi), 0 < skew < 1; at most -log skew (DistiLLM, arXiv 2402.03898, skew 0.1)."""
    return _kl(teacher_logprobs_nK, _mixture(student_logprobs_nK, teacher_logprobs_nK, skew))


def skewed_reverse_kl(student_logprobs_nK: Tensor, teacher_logprobs_nK: Tensor, skew: float) -> Tensor:
    """[n] KL(pi || (1 - skew) q + skew pi), 0 < skew < 1; at most -log skew (DistiLLM, arXiv 2402.03898, skew 0.1).

    The gradient flows through pi in both places.
    """
    return _kl(student_logprobs_nK, _mixture(teacher_logprobs_nK, student_logprobs_nK, skew))


def entropy_gated_kl(student_logprobs_nK: Tensor, teacher_logprobs_nK: Tensor, threshold: float) -> Tensor:
    """[n] KL(pi || q), plus KL(q || pi) where the teacher's entropy is above `threshold` nats (EOPD, arXiv 2603.07079)."""
    # The gate is a constant of the context: the teacher's log-probs carry no gradient.
    entropy_n = -torch.special.xlogy(teacher_logprobs_nK.exp(), teacher_logprobs_nK.exp()).sum(-1)
    gated = torch.where(entropy_n > threshold, forward_kl(student_logprobs_nK, teacher_logprobs_nK), 0.0)
    return reverse_kl(student_logprobs_nK, teacher_logprobs_nK) + gated


def expected_cost(student_logprobs_nK: Tensor, cost_nK: Tensor) -> Tensor:
    """[n] sum_k pi_k sg(cost_k), where sg stops the gradient.

    Its gradient is E[cost grad log pi] over the sampled token: the expectation of the sampled estimator with this cost.
    With cost = log pi - log q, value and gradient are those of the reverse KL.
    """
    # The reverse KL has one more term, the gradient of the log-ratio itself. Its expectation, E[grad log pi], is 0.
    cost = torch.where(student_logprobs_nK == -torch.inf, torch.zeros_like(cost_nK), cost_nK).detach()
    return (student_logprobs_nK.exp() * cost).sum(-1)


def proximal_teacher(student_logprobs: Tensor, teacher_logprobs: Tensor, weight: float) -> Tensor:
    """log(weight q + (1 - weight) sg(pi)), any shape, 0 < weight <= 1 (TROPD, arXiv 2607.04751, weight 0.2).

    A token's cost against this teacher is at most -log(1 - weight), however small q is. weight = 1 returns the teacher.
    """
    assert 0.0 < weight <= 1.0
    return teacher_logprobs if weight == 1.0 else _mixture(student_logprobs.detach(), teacher_logprobs, weight)


def extrapolated_teacher(teacher_logprobs: Tensor, reference_logprobs: Tensor, strength: float) -> Tensor:
    """log q + (strength - 1)(log q - log pi_ref), any shape, not normalised (G-OPD, arXiv 2602.12125).

    Minimising the reverse KL to it maximises E[strength log(q / pi_ref)] - KL(pi || pi_ref). strength = 1 returns q;
    above 1 extrapolates beyond q. A divergence over a support needs `renormalised(...)` of it, tail bucket included.
    """
    # The missing normaliser is a constant of the context. It does not change the gradient of the discount-0 estimators.
    # Sequence-level estimators must not normalise: the constants of later contexts depend on the token.
    return teacher_logprobs + (strength - 1.0) * (teacher_logprobs - reference_logprobs)


def bounded_cost(
    student_logprobs: Tensor, teacher_logprobs: Tensor, *, power: float | None = None, clip: float | None = None
) -> Tensor:
    """The bounded log-ratio, any shape, without gradient: clamp(log pi - log q, -clip, clip), or pi^power - q^power.

    The power form (PowerOPD, arXiv 2606.17199, power 0.1 to 5) lies in [-1, 1] and has the sign of the log-ratio. Divided
    by `power` it tends to the log-ratio as power -> 0. Both forms bias the gradient where they differ from the log-ratio.
    """
    student, teacher = student_logprobs.detach(), teacher_logprobs.detach()
    if power is not None:
        assert power > 0.0
        cost = torch.exp(power * student) - torch.exp(power * teacher)
    else:
        cost = student - teacher
    return cost if clip is None else cost.clamp(-clip, clip)
