"""The clipped-ratio objective, piece by piece, as pure functions of tensors.

Shapes: N tokens of the whole update, n tokens of a micro-batch. All costs are minimised.
"""

import torch
from torch import Tensor


def token_weights(mask_N: Tensor, lengths_B: Tensor, aggregation: str) -> Tensor:
    """[N] weight of each token's cost, so that the loss is sum(weights * costs) for any cut into micro-batches.

    mask_N: [N] bool, the tokens that count; lengths_B: [B] tokens of each trajectory, masked ones included.
    `token_mean`: 1 / tokens; `sequence_mean`: 1 / (trajectories x tokens of this one); `sequence_sum`:
    1 / trajectories. Masked tokens, and trajectories without any token left, leave numerator and denominator.
    """
    mask = mask_N.double()
    row = torch.repeat_interleave(torch.arange(len(lengths_B), device=mask_N.device), lengths_B)
    tokens_B = torch.zeros(len(lengths_B), dtype=torch.double, device=mask_N.device).index_add_(0, row, mask)
    sequences = (tokens_B > 0).sum().clamp(min=1)
    per_token = {
        "token_mean": 1 / tokens_B.sum().clamp(min=1).expand(len(row)),
        "sequence_mean": 1 / (sequences * tokens_B.clamp(min=1))[row],
        "sequence_sum": (1 / sequences).expand(len(row)),
    }[aggregation]
    return (mask * per_token).float()


def surrogate(
    logprobs_n: Tensor, old_logprobs_n: Tensor, coefficient_n: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """([n] cost, [n] whether the clip took the gradient): max(ratio A, clip(ratio, 1 - low, 1 + high) A), A a cost."""
    ratio = (logprobs_n - old_logprobs_n).exp()
    plain, bounded = ratio * coefficient_n, ratio.clamp(1 - clip_low, 1 + clip_high) * coefficient_n
    return torch.maximum(plain, bounded), bounded > plain
