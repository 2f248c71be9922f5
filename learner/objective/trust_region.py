"""The trust region of an update: estimators of KL(pi_old || pi_theta), an adaptive penalty weight, and step back-off.

Shapes: n tokens sampled by pi_old, K support; KLs in nats. These sampled estimators may be differentiated, unlike those
of the reverse KL: the samples come from pi_old, which is fixed, so k1 and k3 are unbiased in value and in gradient.
"""

from collections.abc import Callable

from torch import Tensor

from learner.objective.divergences import forward_kl
from learner.objective.policy_gradient import capped


def k1(logprobs_n: Tensor, old_logprobs_n: Tensor) -> Tensor:
    """[n] log pi_old - log pi_theta on the sampled tokens: unbiased; single values can be negative."""
    return old_logprobs_n - logprobs_n


def k3(logprobs_n: Tensor, old_logprobs_n: Tensor) -> Tensor:
    """[n] ratio - 1 - log ratio, ratio = pi_theta / pi_old: unbiased, never negative.

    Source: Schulman, Approximating KL Divergence, 2020. Its variance near pi_old is lower than that of k1.
    """
    log_ratio = capped(logprobs_n - old_logprobs_n)
    return log_ratio.expm1() - log_ratio


def exact(student_logprobs_nK: Tensor, old_logprobs_nK: Tensor) -> Tensor:
    """[n] sum_k pi_old_k (log pi_old_k - log pi_theta_k), over the vocabulary or a top k with its tail bucket."""
    return forward_kl(student_logprobs_nK, old_logprobs_nK.detach())


def adapted_beta(beta: float, measured_kl: float, target_kl: float) -> float:
    """The penalty weight of the next update: 2 beta if measured_kl > 1.5 target_kl, beta / 2 if it is < target_kl / 1.5.

    Source: PPO, arXiv 1707.06347, section 4.
    """
    assert beta > 0.0 and target_kl > 0.0
    # The bounds 1e-6 and 1e6 keep beta within reach: it changes by a factor of 2 an update only.
    if measured_kl > 1.5 * target_kl:
        return min(2.0 * beta, 1e6)
    return max(0.5 * beta, 1e-6) if measured_kl < target_kl / 1.5 else beta


def backed_off(
    measure: Callable[[float], float], delta: float, *, shrink: float = 0.5, tries: int = 10
) -> tuple[float, float]:
    """(scale, its KL): the largest of 1, shrink, ..., shrink^(tries - 1) whose KL is at most delta, else (0, KL at 0).

    measure(scale) sets the weights to before + scale * step and returns the KL. On return the weights are those of the
    returned scale. Source: the line search of TRPO, arXiv 1502.05477, appendix C, on the constraint alone.
    """
    assert delta > 0.0 and 0.0 < shrink < 1.0 and tries >= 1
    for k in range(tries):
        # A NaN compares as false, so a step that broke the weights shrinks too.
        if (kl := measure(shrink**k)) <= delta:
            return shrink**k, kl
    return 0.0, measure(0.0)


ESTIMATORS = {"k1": k1, "k3": k3}
"""The sampled estimators by their name in `trust_region.estimator`. `exact` is not here: it takes a support."""
