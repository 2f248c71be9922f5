"""Log-probabilities from hidden states: the one implementation, for teacher and learner alike.

The language-model head is applied to a few tokens at a time, and what is wanted of each chunk's log-probs is taken at
once: the [tokens, vocabulary] array of a whole batch never exists. With gradients, a chunk is computed again in the
backward pass instead of being kept. Shapes: N tokens, n tokens of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

Reduce = Callable[[torch.Tensor, slice], tuple[torch.Tensor, ...]]
"""(log-probs [n, V] float32, which tokens) -> tensors [n, ...] that are kept."""


def chunked_head(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    reduce: Reduce,
    *,
    chunk_tokens: int,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, ...]:
    """log_softmax(hidden @ weight.T / temperature) in chunks of `chunk_tokens`, reduced chunk by chunk.

    Returns the concatenation of what `reduce` returns, each [N, ...]. The product is taken in the dtype of `hidden`
    (or of an enclosing autocast); the normalisation always in float32.
    """

    def one_chunk(hidden_nH: torch.Tensor, start: int) -> tuple[torch.Tensor, ...]:
        logits = torch.nn.functional.linear(hidden_nH, weight_VH, bias_V).float()
        if temperature != 1.0:
            logits = logits / temperature
        return reduce(torch.log_softmax(logits, dim=-1), slice(start, start + len(hidden_nH)))

    keep = torch.is_grad_enabled() and hidden_NH.requires_grad
    parts = []
    for start in range(0, max(len(hidden_NH), 1), chunk_tokens):
        hidden_nH = hidden_NH[start : start + chunk_tokens]
        if keep:
            parts.append(checkpoint(one_chunk, hidden_nH, start, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(one_chunk(hidden_nH, start))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """As numpy, without loss: the bits of a bfloat16, which numpy does not know, as uint16."""
    tensor = tensor.detach().cpu()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def from_array(array: np.ndarray) -> torch.Tensor:
    """The inverse of `to_array`; copies, since arrays from the object store are read-only."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def token_logprobs(logprobs_nV: torch.Tensor, tokens_n: torch.Tensor) -> torch.Tensor:
    """log p of the given tokens: [n, V], [n] -> [n]."""
    return logprobs_nV.gather(-1, tokens_n[:, None]).squeeze(-1)


def entropy(logprobs_nV: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in nats: [n, V] -> [n]. A probability of zero adds nothing."""
    return -torch.special.xlogy(logprobs_nV.exp(), logprobs_nV.exp()).sum(-1)
