"""Per-token divergences between student and teacher over a support. Shapes: n tokens, K support."""

import torch
from torch import Tensor


def reverse_kl(student_logprobs_nK: Tensor, teacher_logprobs_nK: Tensor) -> Tensor:
    """[n] KL(pi || q) = sum pi (log pi - log q) over the full vocabulary."""
    return (student_logprobs_nK.exp() * (student_logprobs_nK - teacher_logprobs_nK)).sum(-1)


def with_tail(logprobs_nK: Tensor) -> Tensor:
    """[n, K + 1]: the support, and all that is outside of it as one bucket."""
    tail = torch.log1p(-logprobs_nK.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
    return torch.cat([logprobs_nK, tail], -1)
