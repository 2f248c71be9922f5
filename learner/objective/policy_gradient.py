"""The policy gradient of on-policy distillation: coefficients, the clipped ratio, and the weight of each token.

    loss = sum_N weights * cost,   cost = max(ratio A, clip(ratio, 1 - low, 1 + high) A),   ratio = pi_theta / pi_old

All costs are minimised. Three policies are kept apart: pi_behaviour (the engine that sampled), pi_old (the learner at the
start of the step) and pi_theta.

The coefficient A_t multiplies grad log pi_theta(y_t) and has no gradient itself. The sequence-level objective is the
reverse KL J = KL(pi_theta(y) || q(y)) = E_{y ~ pi_theta}[sum_t r_t], with r_t = log pi_theta(y_t | c_t) - log q(y_t | c_t)
and KL_t = KL(pi_theta(. | c_t) || q(. | c_t)) = E[r_t | c_t], in nats. Its gradient is
E[sum_t A_t grad log pi_theta(y_t | c_t)] for each unbiased A_t below (policy-gradient theorem, Sutton et al. 2000).
docs/objective.md has the derivation and a table of bias and variance, computed by enumeration.

Shapes: N tokens of the update, n of a micro-batch; B trajectories; T positions of the response, counting only tokens that
the student wrote, padded. A suffix gives the shape. `mask_BT` is true where the token exists and has a finite score:
other tokens add nothing to any sum and get A_t = 0, whatever the inputs hold there (NaN included).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from learner.objective.estimator_table import KEY, Estimator, estimator_row, own_function

MAX_LOG_RATIO = 20.0
"""Log-ratios of policies are capped here before exp: a stray token gives a large number, not an infinite one."""


def capped(log_ratio: Tensor) -> Tensor:
    """min(log_ratio, MAX_LOG_RATIO), any shape, with the gradient of log_ratio itself.

    `clamp` has the gradient 0 above its bound, and the tokens that have gone furthest would not be pushed back.
    """
    return log_ratio - (log_ratio - MAX_LOG_RATIO).clamp(min=0).detach()


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """The values without gradient, 0 outside of the mask."""
    # Detached: a coefficient is a factor of grad log pi. If the gradient went through r_t as well, it would add
    # grad log pi once more (see through_log_ratio in `surrogate`). `where`, not a product: 0 * NaN is NaN.
    return torch.where(mask, values.detach(), torch.zeros_like(values))


def step_discounts(gamma: float, turn_discount: float, turn_BT: Tensor) -> Tensor:
    """[B, T] what a later cost is multiplied by on its way from position t + 1 to t: gamma, and turn_discount between turns.

    turn_BT: int, the turn of each token (`Trajectories.turns`). Nothing follows the last position: 0.
    """
    after = torch.nn.functional.pad(turn_BT[:, 1:] > turn_BT[:, :-1], (0, 1))
    steps = torch.full(turn_BT.shape, gamma, device=turn_BT.device).masked_fill(after, gamma * turn_discount)
    return torch.nn.functional.pad(steps[:, :-1], (0, 1))


def discounted_suffix_sum(x_BT: Tensor, gamma: float | Tensor) -> Tensor:
    """sum over t' >= t of gamma^(t' - t) x_t'; or, with a discount [B, T] for each step, its product from t to t' - 1.

    By doubling: after step k each position holds the sum of a window of 2^k terms. T log T work without a loop over
    tokens, and no power of 1 / gamma that could overflow on a long response.
    """
    window, total = 1, x_BT
    if isinstance(gamma, Tensor):
        over_window = gamma
        while window < x_BT.shape[1]:
            total = total + over_window * torch.nn.functional.pad(total[:, window:], (0, window))
            over_window = over_window * torch.nn.functional.pad(over_window[:, window:], (0, window))
            window *= 2
        return total
    assert x_BT.ndim == 2 and 0.0 <= gamma <= 1.0
    # Below the smallest float, gamma^window adds nothing more, and the loop ends early.
    while window < x_BT.shape[1] and (weight := gamma**window) > 0.0:
        total = total + weight * torch.nn.functional.pad(total[:, window:], (0, window))
        window *= 2
    return total


def running_sum(x_BT: Tensor) -> Tensor:
    """sum over t' <= t of x_t'. Not `cumsum`, whose order of additions on a GPU is another in each run."""
    return discounted_suffix_sum(x_BT.flip(1), 1.0).flip(1)


def trajectory(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(i) A_t = sum over all t' of r_t'. Unbiased; REINFORCE (Williams 1992); the highest variance."""
    return _masked(_masked(log_ratio_BT, mask_BT).sum(1, keepdim=True).expand_as(log_ratio_BT), mask_BT)


def discounted(log_ratio_BT: Tensor, mask_BT: Tensor, gamma: float | Tensor) -> Tensor:
    """A_t = sum over t' >= t of gamma^(t' - t) r_t'. gamma = 0 is `immediate`, 1 is `to_go`; biased below 1.

    gamma may be that of each step, see `step_discounts`.
    """
    return _masked(discounted_suffix_sum(_masked(log_ratio_BT, mask_BT), gamma), mask_BT)


def to_go(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(ii) A_t = sum over t' >= t of r_t'. Unbiased: what came before y_t does not depend on it."""
    return discounted(log_ratio_BT, mask_BT, 1.0)


def immediate(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """A_t = r_t. Its expectation is sum_t E[grad KL_t]: the effect of y_t on later contexts is left out."""
    return _masked(log_ratio_BT, mask_BT)


def to_go_expected(log_ratio_BT: Tensor, mask_BT: Tensor, kl_BT: Tensor, gamma: float | Tensor = 1.0) -> Tensor:
    """(iv) A_t = r_t + sum over t' > t of gamma^(t' - t) KL_t'. Unbiased at gamma = 1; `immediate` at 0.

    Each later log-ratio is replaced by its conditional expectation, which removes the variance of the later actions but
    not that of the contexts they lead to. KL_t' of a top-k teacher (tail as a bucket) is a lower bound of the exact one,
    and the estimate is biased by as much.
    """
    # Shifted by one: KL_t of the own position is what r_t samples; counting it too would double it.
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
    # Alone at a position: sum and own value cancel, and 0 / 1 is the baseline 0.
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
    if name == "batch_mean":  # one group with all trajectories in it
        group_B = torch.zeros(len(values_BT), dtype=torch.long, device=values_BT.device)
    assert name in ("batch_mean", "group_mean") and group_B is not None
    return leave_one_out_mean(values_BT, mask_BT, group_B)


def coefficient(
    estimator: str,
    log_ratio_BT: Tensor,
    mask_BT: Tensor,
    *,
    kl_BT: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    baseline_name: str = "none",
    group_B: Tensor | None = None,
) -> Tensor:
    """[B, T] A_t = estimator_t - baseline_t, in nats, without gradient; 0 outside of the mask.

    estimator: a key of ESTIMATORS, or the import path of a function, which is called in the same way: log_ratio_BT,
    mask_BT, and the arguments that its row asks for. log_ratio_BT: r_t, or another cost of each token; 0 where there is no
    token. kl_BT: KL_t, for an estimator or baseline that needs a distribution. gamma: the discount, in [0, 1], or that of
    each step [B, T], for the built-in estimators. group_B: equal for samples of one prompt, for an estimator or baseline that compares them. UserError: the function of the
    user's own cannot be imported. Source: docs/objective.md, and the theorem at the head of this module.
    """
    row = estimator_row(estimator)
    function = ESTIMATORS[estimator] if estimator in ESTIMATORS else own_function(estimator, f"{KEY}.estimator")
    values = function(log_ratio_BT, mask_BT, **estimator_arguments(row, kl_BT, gamma, group_B))
    return _masked(values - baseline(baseline_name, values, mask_BT, kl_BT=kl_BT, group_B=group_B), mask_BT)


def estimator_arguments(
    row: Estimator, kl_BT: Tensor | None, gamma: float | Tensor, group_B: Tensor | None
) -> dict[str, Tensor | float | None]:
    """The arguments that an estimator gets beyond log-ratios and mask."""
    arguments: dict[str, Tensor | float | None] = {}
    if row.needs_distribution:
        arguments["kl_BT"] = kl_BT
    if row.discounts:
        arguments["gamma"] = gamma
    if row.needs_whole_update:
        arguments["group_B"] = group_B
    return arguments


def reward_cost(reward_B: Tensor, mask_BT: Tensor, group_B: Tensor) -> Tensor:
    """[B, T] minus the leave-one-out advantage of a sequence's reward, at every token: A_t of RLOO (Ahmadian et al. 2024).

    Added to an OPD coefficient with weight 1 / lambda it minimises KL(pi || q exp(R / lambda)), whose optimum is the
    reward-tilted teacher; alone it is policy-gradient RL. A group of one has no baseline: its cost is -R. No division by
    the group's standard deviation: that weighs prompts by difficulty, which is another objective.
    """
    assert reward_B.ndim == 1
    # One column: a response has one reward, whatever its length.
    reward_B1, all_B1 = reward_B[:, None], torch.ones_like(reward_B[:, None], dtype=torch.bool)
    advantage = reward_B1 - leave_one_out_mean(reward_B1, all_B1, group_B)
    return _masked(-advantage.expand(mask_BT.shape), mask_BT)


def position_weights(coefficient_BT: Tensor, mask_BT: Tensor, strength: float) -> Tensor:
    """w_t = 1 + strength (1 - sum_{i < t} |A_i| / sum_i |A_i|): more to early tokens (IW-OPD, arXiv 2606.22600: 0.5).

    Biased: the weight depends on what follows y_t, through the denominator.
    """
    size = _masked(coefficient_BT, mask_BT).abs()
    before = running_sum(size) - size
    return 1 + strength * (1 - before / size.sum(1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny))


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "trajectory": trajectory,
    "to_go": to_go,
    "to_go_expected": to_go_expected,
    "immediate": immediate,
    "discounted": discounted,
}
"""By the names of the configuration. `full` is not here: it has no coefficient, but a divergence (divergences.py)."""


def tokens_left(mask_N: Tensor, lengths_B: Tensor) -> Tensor:
    """[B] float64: the tokens in the mask of each trajectory. lengths_B: its tokens, masked ones included."""
    # Not float32, which cannot count beyond 2^24 tokens exactly.
    rows_N = torch.repeat_interleave(torch.arange(len(lengths_B), device=mask_N.device), lengths_B)
    return torch.zeros(len(lengths_B), dtype=torch.double, device=mask_N.device).index_add_(0, rows_N, mask_N.double())


def step_size(mask_N: Tensor, lengths_B: Tensor, aggregation: str) -> Tensor:
    """[] what the loss of a step is a mean over: its tokens (token_mean), or its trajectories with a token left.

    The mean of the losses of several steps, weighted by this, is the loss of all their trajectories as one step.
    """
    tokens_B = tokens_left(mask_N, lengths_B)
    return tokens_B.sum() if aggregation == "token_mean" else (tokens_B > 0).double().sum()


def token_weights(mask_N: Tensor, lengths_B: Tensor, aggregation: str, constant: float | None = None) -> Tensor:
    """[N] weight of each token's cost, so that the loss is sum(weights * costs) for any cut into micro-batches.

    mask_N: bool, the tokens that count; lengths_B: tokens of each trajectory, masked ones included. With S the
    trajectories that have a token left and n_i the tokens left of one:
    token_mean 1 / sum_i n_i: every token the same, long responses weigh more. sequence_mean 1 / (S n_i): every response
    the same. sequence_sum 1 / S: the sequence-level objective. constant 1 / (S constant): the same, in the scale of a
    mean over `constant` tokens (Dr. GRPO, arXiv 2503.20783). Only the last two give unbiased estimators unbiased
    gradients: the others divide by a length, which depends on what was sampled.
    Masked tokens, and trajectories without any token left, leave numerator and denominator.
    """
    assert mask_N.ndim == 1 and lengths_B.ndim == 1
    tokens_B = tokens_left(mask_N, lengths_B)
    # At least 1 below: with no token left every weight is 0, and not 0 / 0.
    sequences = (tokens_B > 0).sum().clamp(min=1)
    if aggregation == "token_mean":
        denominator = tokens_B.sum().clamp(min=1)
    elif aggregation == "sequence_mean":
        denominator = torch.repeat_interleave(sequences * tokens_B.clamp(min=1), lengths_B)
    elif aggregation == "sequence_sum":
        denominator = sequences
    else:
        assert aggregation == "constant" and constant is not None and constant > 0
        denominator = sequences * constant
    return (mask_N.double() / denominator).float()


def surrogate(
    logprobs_n: Tensor,
    old_logprobs_n: Tensor,
    coefficient_n: Tensor,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    *,
    dual_clip: float | None = None,
    through_log_ratio: bool = False,
) -> tuple[Tensor, Tensor]:
    """([n] cost, [n] whether a clip took the gradient): max(ratio A, clip(ratio, 1 - low, 1 + high) A), A a cost.

    PPO (Schulman et al. 2017) with its advantage's sign turned: the clip removes what would be gained by going further,
    and nothing that is lost. None for a bound leaves that side open. dual_clip c > 1 caps the cost at c A where A > 0
    (Ye et al. 2020): a ratio above c pushes no further.
    through_log_ratio: A_t also carries the gradient of its own log pi_theta(y_t), which adds grad log pi_theta(y_t) to
    the policy gradient: the literal E[ratio (log pi_theta - log q)]. Without a clip that is a baseline of -1 (no effect
    in expectation, more variance); with one, or with weights that depend on y_t, it is another objective.
    """
    # The gradient of the ratio is ratio * grad log pi: at ratio 1 the policy gradient of the theorem.
    ratio = capped(logprobs_n - old_logprobs_n).exp()
    cost_n = coefficient_n.detach()
    if through_log_ratio:
        cost_n = cost_n + (logprobs_n - logprobs_n.detach())  # adds 0 to the value, and grad log pi to the gradient
    low = None if clip_low is None else 1 - clip_low
    high = None if clip_high is None else 1 + clip_high
    plain = ratio * cost_n
    bounded = plain if low is None and high is None else ratio.clamp(low, high) * cost_n
    # The larger cost is the pessimistic one. Where it is the bounded one, the ratio is constant and has no gradient.
    cost, clipped = torch.maximum(plain, bounded), bounded > plain
    if dual_clip is not None:
        assert dual_clip > 1.0
        ceiling = torch.where(cost_n > 0, dual_clip * cost_n, torch.inf)
        cost, clipped = torch.minimum(cost, ceiling), clipped | (cost > ceiling)
    return cost, clipped


def filter_weights(policy_logprobs: Tensor, sampled_logprobs: Tensor) -> Tensor:
    """pi / mu of each token, any shape: the probability that pi gives to the tokens that top-k and top-p keep, in (0, 1].

    policy_logprobs: log pi before the filter. sampled_logprobs: log mu after it, of the same weights. mu is pi restricted
    to the kept tokens and renormalised, so the ratio is the same for all of them: it weighs contexts, not actions.
    E_mu[(pi / mu) A grad log pi] is the sum over the kept tokens of pi A grad log pi, the policy gradient without its tail.
    """
    # Above 1 by rounding only, or by the numerics of two programs where an engine has not recorded log pi.
    return (policy_logprobs - sampled_logprobs).clamp(max=0).exp()


def log_importance_weights(log_ratio_BT: Tensor, mask_BT: Tensor, level: str) -> Tensor:
    """[B, T] log of what corrects token t's term for having been sampled by another policy; no gradient, 0 where masked.

    log_ratio_BT: log target - log sampled-by (pi_old - pi_behaviour for the mismatch of engine and learner). With rho_t
    its exponential: `token` rho_t corrects the action; `prefix` rho_1 ... rho_t also the context it was taken in, which
    makes discount-0 forms exact; `sequence` rho_1 ... rho_T everything: exact for every estimator, and the most variable.
    `before` rho_1 ... rho_(t-1) is for a term that samples no action at t (`full`): exact there, and `prefix` would be
    too, with the variance of a rho_t that corrects nothing, and with another expectation as soon as it is cut.
    """
    log_ratio = torch.where(mask_BT, log_ratio_BT.detach(), torch.zeros_like(log_ratio_BT))
    if level == "prefix":
        log_ratio = running_sum(log_ratio)
    elif level == "before":
        # Shifted by one: the product is empty at t = 1, and its log is 0.
        log_ratio = torch.nn.functional.pad(running_sum(log_ratio[:, :-1]), (1, 0))
    elif level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    else:
        assert level == "token"
    return torch.where(mask_BT, log_ratio, torch.zeros_like(log_ratio))


def corrected_weights(log_weights: Tensor, correction: str, low: float, high: float) -> Tensor:
    """Importance weights made safe, any shape. truncate: exp, at most `high` (TIS). mask: 0 outside of [low, high] (MIS).

    Truncation keeps every token and bounds its weight; masking drops what the learner would not have written. Both are
    biased where they act, and only there.
    """
    weights = capped(log_weights).exp()
    if correction == "truncate":
        return weights.clamp(max=high)
    assert correction == "mask"
    return torch.where((weights >= low) & (weights <= high), weights, torch.zeros_like(weights))


def effective_sample_size(log_weights: Tensor, mask: Tensor) -> Tensor:
    """[] (sum w)^2 / (n sum w^2) over the mask, in (0, 1]: the fraction of tokens that the weights leave (Kish). Any shape."""
    # In shares w / sum w, by softmax: the square of a large weight would overflow.
    shares = log_weights.masked_fill(~mask, -torch.inf).flatten().softmax(0)
    return 1 / (mask.sum() * shares.square().sum())
