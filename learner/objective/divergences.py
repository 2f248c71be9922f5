"""Per-token divergences between student pi and teacher q over a support, and what may be done to the teacher's signal.

Shapes: n tokens; K the support: the full vocabulary, or k tokens with or without a bucket for the rest; [n, K] log-probs.
Divergences are costs [n], differentiable in the student; the teacher's log-probs come without gradient and finite. Rows
sum to one: a top-k row is completed first, by `with_tail` or `renormalised`.

With `estimator: full` the cost *is* differentiated. A number computed over a support must never be used as a detached
coefficient: it does not depend on the sampled token, so its expected policy gradient is zero.
"""

import math

import torch
from torch import Tensor


def with_tail(logprobs_nK: Tensor) -> Tensor:
    """[n, K + 1]: the support, and all that is outside of it as one bucket. The default for a top-k support.

    Merging tokens can only lower a divergence, so what is minimised is a lower bound of the full one that sees when the
    student puts mass where the teacher's top k is not. The bucket is at least the rounding of one, so that its log is finite.
    """
    mass = logprobs_nK.logsumexp(-1, keepdim=True)
    tail = torch.log(-torch.expm1(mass.clamp(max=-torch.finfo(mass.dtype).eps)))
    return torch.cat([logprobs_nK, tail], -1)


def renormalised(logprobs_nK: Tensor) -> Tensor:
    """[n, K]: the conditional distribution given the support (Revisiting OPD, arXiv 2603.25562).

    Blind to how much mass the student has outside; over one token it is always 1, and every divergence always 0.
    """
    return logprobs_nK - logprobs_nK.logsumexp(-1, keepdim=True)


def on_shared_rows(*logprobs_nV: Tensor) -> list[Tensor]:
    """Each [n, V'] over the rows that all have, where vocabularies are padded to different sizes; adds up to 1 again.

    Without that, a student could lower a divergence by moving its mass to rows that only it has.
    """
    width = min(x.shape[1] for x in logprobs_nV)
    return [x if x.shape[1] == width else renormalised(x[:, :width]) for x in logprobs_nV]


def _kl(p_nK: Tensor, q_nK: Tensor) -> Tensor:
    """sum p (log p - log q) from log-probs; a probability of zero under p adds nothing."""
    difference = torch.where(p_nK == -torch.inf, torch.zeros_like(p_nK), p_nK - q_nK)
    return (p_nK.exp() * difference).sum(-1)


def _mixture(p_nK: Tensor, q_nK: Tensor, weight: float) -> Tensor:
    """log((1 - weight) p + weight q), 0 < weight < 1."""
    return torch.logaddexp(p_nK + math.log1p(-weight), q_nK + math.log(weight))


def reverse_kl(student_logprobs_nK: Tensor, teacher_logprobs_nK: Tensor) -> Tensor:
    """KL(pi || q): mode-seeking; the gradient of `immediate` without the variance of the action."""
    return _kl(student_logprobs_nK, teacher_logprobs_nK)


def forward_kl(student_logprobs_nK: Tensor, teacher_logprobs_nK: Tensor) -> Tensor:
    """KL(q || pi): mass-covering; supervised distillation at the student's contexts."""
    return _kl(teacher_logprobs_nK, student_logprobs_nK)


def jsd(student_logprobs_nK: Tensor, teacher_logprobs_nK: Tensor, beta: float) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(pi || m), m = beta q + (1 - beta) pi, 0 < beta < 1 (GKD, arXiv 2306.13649, eq. 1).

    GKD's P is the teacher. jsd / beta tends to KL(q || pi) as beta -> 0 and jsd / (1 - beta) to KL(pi || q) as
    beta -> 1; TRL returns those two limits at 0 and 1, where this divergence itself is zero.
    """
    assert 0.0 < beta < 1.0
    middle = _mixture(student_logprobs_nK, teacher_logprobs_nK, beta)
    return beta * _kl(teacher_logprobs_nK, middle) + (1 - beta) * _kl(student_logprobs_nK, middle)


def skewed_forward_kl(student_logprobs_nK: Tensor, teacher_logprobs_nK: Tensor, skew: float) -> Tensor:
    """KL(q || skew q + (1 - skew) pi), 0 < skew < 1 (DistiLLM, arXiv 2402.03898: 0.1). Bounded by -log skew."""
    return _kl(teacher_logprobs_nK, _mixture(student_logprobs_nK, teacher_logprobs_nK, skew))


def skewed_reverse_kl(student_logprobs_nK: Tensor, teacher_logprobs_nK: Tensor, skew: float) -> Tensor:
    """KL(pi || (1 - skew) q + skew pi), 0 < skew < 1 (DistiLLM: 0.1). Bounded by -log skew; gradient through both pi."""
    return _kl(student_logprobs_nK, _mixture(teacher_logprobs_nK, student_logprobs_nK, skew))


def entropy_gated_kl(student_logprobs_nK: Tensor, teacher_logprobs_nK: Tensor, threshold: float) -> Tensor:
    """KL(pi || q), plus KL(q || pi) where the teacher's entropy is above `threshold` nats (EOPD, arXiv 2603.07079)."""
    entropy_n = -torch.special.xlogy(teacher_logprobs_nK.exp(), teacher_logprobs_nK.exp()).sum(-1)
    gated = torch.where(entropy_n > threshold, forward_kl(student_logprobs_nK, teacher_logprobs_nK), 0.0)
    return reverse_kl(student_logprobs_nK, teacher_logprobs_nK) + gated


def expected_cost(student_logprobs_nK: Tensor, cost_nK: Tensor) -> Tensor:
    """sum_k pi_k sg(cost_k): its gradient is the expectation of cost grad log pi over the action, in closed form.

    With cost = log pi - log q this is the reverse KL's value and gradient (the missing term, E[grad log pi], is zero);
    with a bounded cost it is what the sampled estimator with that bound has in expectation.
    """
    cost = torch.where(student_logprobs_nK == -torch.inf, torch.zeros_like(cost_nK), cost_nK).detach()
    return (student_logprobs_nK.exp() * cost).sum(-1)


def proximal_teacher(student_logprobs: Tensor, teacher_logprobs: Tensor, weight: float) -> Tensor:
    """log(weight q + (1 - weight) pi), pi without gradient, any shape: a teacher no further than the student can go.

    TROPD (arXiv 2607.04751; weight 0.2). However little the teacher thinks of a token, its cost log pi - this is at most
    -log(1 - weight). weight = 1 is the teacher itself.
    """
    assert 0.0 < weight <= 1.0
    return teacher_logprobs if weight == 1.0 else _mixture(student_logprobs.detach(), teacher_logprobs, weight)


def extrapolated_teacher(teacher_logprobs: Tensor, reference_logprobs: Tensor, strength: float) -> Tensor:
    """log q + (strength - 1)(log q - log pi_ref), any shape: G-OPD's teacher (arXiv 2602.12125), not normalised.

    max E[strength log(q / pi_ref)] - KL(pi || pi_ref) is the reverse KL to it; 1 is plain OPD, above 1 extrapolates. The
    missing normaliser is a constant at each context: the discount-0 forms do not see it, and the sequence-level ones
    must not have it. A divergence over a support wants `renormalised(...)` of it, tail bucket included.
    """
    return teacher_logprobs + (strength - 1.0) * (teacher_logprobs - reference_logprobs)


def bounded_cost(
    student_logprobs: Tensor, teacher_logprobs: Tensor, *, power: float | None = None, clip: float | None = None
) -> Tensor:
    """The log-ratio with its tails bounded, any shape, without gradient: [-clip, clip], or pi^power - q^power.

    The power form (PowerOPD, arXiv 2606.17199; 0.1 to 5) lies in [-1, 1], has the sign of the log-ratio, and tends to
    power x log-ratio as power -> 0. Both are biased wherever they act.
    """
    student, teacher = student_logprobs.detach(), teacher_logprobs.detach()
    if power is not None:
        assert power > 0.0
        cost = torch.exp(power * student) - torch.exp(power * teacher)
    else:
        cost = student - teacher
    return cost if clip is None else cost.clamp(-clip, clip)
