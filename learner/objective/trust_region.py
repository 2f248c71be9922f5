"""KL(pi_old || pi_theta): how far an update has gone from the policy it started at, and what is done about it.

Shapes: n tokens sampled by pi_old, K support. Unlike the reverse KL, this one may be differentiated through its
sampled estimators: the samples come from pi_old, which does not move, so k1 and k3 are unbiased in value and gradient.
"""

from collections.abc import Callable

from torch import Tensor

from learner.objective.divergences import forward_kl


def k1(logprobs_n: Tensor, old_logprobs_n: Tensor) -> Tensor:
    """[n] log pi_old - log pi_theta: unbiased, of either sign."""
    return old_logprobs_n - logprobs_n


def k3(logprobs_n: Tensor, old_logprobs_n: Tensor) -> Tensor:
    """[n] ratio - 1 - log ratio: unbiased, never negative (Schulman, Approximating KL Divergence, 2020)."""
    log_ratio = (logprobs_n - old_logprobs_n).clamp(max=20.0)
    return log_ratio.expm1() - log_ratio


def exact(student_logprobs_nK: Tensor, old_logprobs_nK: Tensor) -> Tensor:
    """[n] sum_k pi_old (log pi_old - log pi_theta) over a complete support (full, or top-k with its tail bucket)."""
    return forward_kl(student_logprobs_nK, old_logprobs_nK.detach())


def adapted_beta(beta: float, measured_kl: float, target_kl: float) -> float:
    """The weight for the next update: twice as much above 1.5 target, half as much below target / 1.5 (PPO, section 4)."""
    assert beta > 0.0 and target_kl > 0.0
    if measured_kl > 1.5 * target_kl:
        return min(2.0 * beta, 1e6)
    return max(0.5 * beta, 1e-6) if measured_kl < target_kl / 1.5 else beta


def backed_off(
    measure: Callable[[float], float], delta: float, *, shrink: float = 0.5, tries: int = 10
) -> tuple[float, float]:
    """(scale, KL there): the largest of 1, shrink, shrink^2, ... whose KL is within delta; (0, KL at 0) if none is.

    measure(scale) is the KL after the last step has been taken `scale` of its way (TRPO's line search, Schulman et al.
    2015, appendix C, on the constraint alone). A KL that is not a number is not within delta.
    """
    assert delta > 0.0 and 0.0 < shrink < 1.0 and tries >= 1
    for k in range(tries):
        if (kl := measure(shrink**k)) <= delta:
            return shrink**k, kl
    return 0.0, measure(0.0)


ESTIMATORS = {"k1": k1, "k3": k3}
"""Of the configuration's `trust_region.estimator`; `exact` takes a support instead of the sampled token."""
