"""KL(pi_old || pi_theta) on samples of pi_old. Shapes: n tokens."""

from torch import Tensor


def k3(logprobs_n: Tensor, old_logprobs_n: Tensor) -> Tensor:
    """[n] ratio - 1 - log ratio: unbiased, never negative (Schulman, Approximating KL Divergence, 2020)."""
    log_ratio = logprobs_n - old_logprobs_n
    return log_ratio.exp() - 1 - log_ratio
