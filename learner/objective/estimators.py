"""The coefficient A_t that multiplies grad log pi_theta(y_t): a cost, so minimised, and without gradient.

The sequence-level objective is the reverse KL J = KL(pi_theta(y) || q(y)) = E_{y ~ pi_theta}[sum_t r_t], with
r_t = log pi_theta(y_t | c_t) - log q(y_t | c_t) and KL_t = KL(pi_theta(. | c_t) || q(. | c_t)) = E[r_t | c_t]. Its
gradient is E[sum_t A_t grad log pi_theta(y_t | c_t)] for each unbiased A_t below (policy-gradient theorem; Sutton et al.
2000). `docs/objective.md` has the table of bias and variance, computed by enumeration.

Shapes: B trajectories; T positions of the response, padded; [B, T] everywhere unless a suffix says less. `mask_BT` is
true where the token exists and has a finite score: other tokens add nothing to any sum and get A_t = 0, whatever the
inputs hold there (NaN included). All inputs are detached: no gradient may flow through a coefficient.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values.detach(), torch.zeros_like(values))


def discounted_suffix_sum(x_BT: Tensor, gamma: float) -> Tensor:
    """sum over t' >= t of gamma^(t' - t) x_t'.

    By doubling: after step k each position holds the sum of a window of 2^k terms. T log T work without a loop over
    tokens, and no power of 1 / gamma that could overflow on a long response.
    """
    assert x_BT.ndim == 2 and 0.0 <= gamma <= 1.0
    window, total = 1, x_BT
    while window < x_BT.shape[1] and (weight := gamma**window) > 0.0:
        total = total + weight * torch.nn.functional.pad(total[:, window:], (0, window))
        window *= 2
    return total


def trajectory(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(i) A_t = sum over all t' of r_t'. Unbiased; REINFORCE (Williams 1992); the highest variance."""
    return _masked(_masked(log_ratio_BT, mask_BT).sum(1, keepdim=True).expand_as(log_ratio_BT), mask_BT)


def discounted(log_ratio_BT: Tensor, mask_BT: Tensor, gamma: float) -> Tensor:
    """A_t = sum over t' >= t of gamma^(t' - t) r_t'. gamma = 0 is `immediate`, 1 is `to_go`; biased below 1."""
    return _masked(discounted_suffix_sum(_masked(log_ratio_BT, mask_BT), gamma), mask_BT)


def to_go(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(ii) A_t = sum over t' >= t of r_t'. Unbiased: what came before y_t does not depend on it."""
    return discounted(log_ratio_BT, mask_BT, 1.0)


def immediate(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """A_t = r_t. Its expectation is sum_t E[grad KL_t]: the effect of y_t on later contexts is left out."""
    return _masked(log_ratio_BT, mask_BT)


def to_go_expected(log_ratio_BT: Tensor, mask_BT: Tensor, kl_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """(iv) A_t = r_t + sum over t' > t of gamma^(t' - t) KL_t'. Unbiased at gamma = 1; `immediate` at 0.

    Each later log-ratio is replaced by its conditional expectation, which removes the variance of the later actions but
    not that of the contexts they lead to. KL_t' of a top-k teacher (tail as a bucket) is a lower bound of the exact one,
    and the estimate is biased by as much.
    """
    later = discounted_suffix_sum(_masked(kl_BT, mask_BT), gamma)
    return _masked(log_ratio_BT + gamma * torch.nn.functional.pad(later[:, 1:], (0, 1)), mask_BT)


def leave_one_out_mean(values_BT: Tensor, mask_BT: Tensor, group_B: Tensor) -> Tensor:
    """Mean at the same position over the *other* trajectories of the group that reach it; 0 where there is none.

    group_B: [B] int, equal where trajectories belong together. Leaving the own trajectory out keeps the baseline
    independent of y_t: a mean with it shrinks the gradient by 1 - 1/n (Kool et al. 2019).
    """
    _, index_B = torch.unique(group_B, return_inverse=True)
    values = _masked(values_BT, mask_BT)
    sums, counts = torch.zeros_like(values), torch.zeros_like(values)
    sums.index_add_(0, index_B, values)
    counts.index_add_(0, index_B, mask_BT.to(values.dtype))
    return (sums[index_B] - values) / (counts[index_B] - 1).clamp(min=1)


def baseline(
    name: str, values_BT: Tensor, mask_BT: Tensor, *, kl_BT: Tensor | None = None, group_B: Tensor | None = None
) -> Tensor:
    """b(c_t), to be subtracted from A_t; it may depend on c_t and on other trajectories, never on y_t or what follows.

    none: 0. batch_mean: leave-one-out over the whole batch at the position. group_mean: leave-one-out over the samples
    of the same prompt (group_B). exact_kl: KL_t, the exact expectation of r_t (the closed-form baseline of vOPD).
    The suffix sum of KL_t' along the sampled continuation is *not* a baseline: c_t' contains y_t. Subtracted from
    `to_go_expected` it leaves r_t - KL_t, which is `immediate`.
    """
    if name == "none":
        return torch.zeros_like(values_BT)
    if name == "exact_kl":
        assert kl_BT is not None
        return _masked(kl_BT, mask_BT)
    if name == "batch_mean":
        group_B = torch.zeros(len(values_BT), dtype=torch.long, device=values_BT.device)
    assert name in ("batch_mean", "group_mean") and group_B is not None
    return leave_one_out_mean(values_BT, mask_BT, group_B)


def coefficient(
    estimator: str,
    log_ratio_BT: Tensor,
    mask_BT: Tensor,
    *,
    kl_BT: Tensor | None = None,
    gamma: float = 1.0,
    baseline_name: str = "none",
    group_B: Tensor | None = None,
) -> Tensor:
    """A_t by name: the estimator, less its baseline. 0 outside of the mask."""
    available = {"kl_BT": kl_BT, "gamma": gamma}
    values = ESTIMATORS[estimator](log_ratio_BT, mask_BT, **{name: available[name] for name in NEEDS[estimator]})
    return _masked(values - baseline(baseline_name, values, mask_BT, kl_BT=kl_BT, group_B=group_B), mask_BT)


def reward_cost(reward_B: Tensor, mask_BT: Tensor, group_B: Tensor) -> Tensor:
    """[B, T] minus the leave-one-out advantage of a sequence's reward, at every token: A_t of RLOO (Ahmadian et al. 2024).

    Added to an OPD coefficient with weight 1 / lambda it minimises KL(pi || q exp(R / lambda)), whose optimum is the
    reward-tilted teacher; alone it is policy-gradient RL. A group of one has no baseline: its cost is -R. No division by
    the group's standard deviation: that weighs prompts by difficulty, which is another objective.
    """
    assert reward_B.ndim == 1
    reward_B1, everyone = reward_B[:, None], torch.ones_like(reward_B[:, None], dtype=torch.bool)
    advantage = reward_B1 - leave_one_out_mean(reward_B1, everyone, group_B)
    return _masked(-advantage.expand(mask_BT.shape), mask_BT)


def position_weights(coefficient_BT: Tensor, mask_BT: Tensor, strength: float) -> Tensor:
    """w_t = 1 + strength (1 - sum_{i < t} |A_i| / sum_i |A_i|): more to early tokens (IW-OPD, arXiv 2606.22600: 0.5).

    Biased: the weight depends on what follows y_t, through the denominator.
    """
    size = _masked(coefficient_BT, mask_BT).abs()
    before = size.cumsum(1) - size
    return 1 + strength * (1 - before / size.sum(1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny))


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "trajectory": trajectory,
    "to_go": to_go,
    "to_go_expected": to_go_expected,
    "immediate": immediate,
    "discounted": discounted,
}
"""By the names of the configuration. `full` is not here: it has no coefficient, but a divergence (divergences.py)."""

NEEDS: dict[str, tuple[str, ...]] = {
    "trajectory": (),
    "to_go": (),
    "to_go_expected": ("kl_BT", "gamma"),
    "immediate": (),
    "discounted": ("gamma",),
}
"""What an estimator needs beyond log-ratios and mask. kl_BT: the teacher must give a distribution, not a token's score."""
