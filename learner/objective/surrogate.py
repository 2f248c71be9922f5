"""The clipped-ratio objective, piece by piece, as pure functions of tensors. All costs are minimised.

    loss = sum_N weights * cost,   cost = max(ratio A, clip(ratio, 1 - low, 1 + high) A),   ratio = pi_theta / pi_old

Shapes: N tokens of the whole update, n of a micro-batch, B trajectories; [B, T] is padded by trajectory. Three policies
are kept apart: pi_behaviour (the engine that sampled), pi_old (the learner at the start of the step), pi_theta.
"""

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios of policies are capped here before exp: a stray token gives a large number, not an infinite one."""


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
    mask = mask_N.double()
    row_N = torch.repeat_interleave(torch.arange(len(lengths_B), device=mask_N.device), lengths_B)
    tokens_B = torch.zeros(len(lengths_B), dtype=torch.double, device=mask_N.device).index_add_(0, row_N, mask)
    sequences = (tokens_B > 0).sum().clamp(min=1)
    if aggregation == "token_mean":
        denominator = tokens_B.sum().clamp(min=1)
    elif aggregation == "sequence_mean":
        denominator = (sequences * tokens_B.clamp(min=1))[row_N]
    elif aggregation == "sequence_sum":
        denominator = sequences
    else:
        assert aggregation == "constant" and constant is not None and constant > 0
        denominator = sequences * constant
    return (mask / denominator).float()


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
    ratio = (logprobs_n - old_logprobs_n).clamp(max=MAX_LOG_RATIO).exp()
    cost_n = coefficient_n.detach()
    if through_log_ratio:
        cost_n = cost_n + (logprobs_n - logprobs_n.detach())
    low = None if clip_low is None else 1 - clip_low
    high = None if clip_high is None else 1 + clip_high
    plain = ratio * cost_n
    bounded = plain if low is None and high is None else ratio.clamp(low, high) * cost_n
    cost, clipped = torch.maximum(plain, bounded), bounded > plain
    if dual_clip is not None:
        assert dual_clip > 1.0
        ceiling = torch.where(cost_n > 0, dual_clip * cost_n, torch.inf)
        cost, clipped = torch.minimum(cost, ceiling), clipped | (cost > ceiling)
    return cost, clipped


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
        log_ratio = log_ratio.cumsum(1)
    elif level == "before":
        log_ratio = torch.nn.functional.pad(log_ratio[:, :-1].cumsum(1), (1, 0))
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
    weights = log_weights.clamp(max=MAX_LOG_RATIO).exp()
    if correction == "truncate":
        return weights.clamp(max=high)
    assert correction == "mask"
    return torch.where((weights >= low) & (weights <= high), weights, torch.zeros_like(weights))


def effective_sample_size(log_weights: Tensor, mask: Tensor) -> Tensor:
    """[] (sum w)^2 / (n sum w^2) over the mask, in (0, 1]: the fraction of tokens that the weights leave (Kish). Any shape."""
    shares = log_weights.masked_fill(~mask, -torch.inf).flatten().softmax(0)
    return 1 / (mask.sum() * shares.square().sum())
