"""Log-probabilities from hidden states: the one implementation, for teacher and learner alike.

The language-model head is applied to a few tokens at a time, and what is wanted of each chunk's log-probs is taken at
once: the [tokens, vocabulary] array of a whole batch never exists. With gradients, a chunk is computed again in the
backward pass instead of being kept. Shapes: N tokens, n tokens of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

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
    measure: Reduce | None = None,
) -> tuple[torch.Tensor, ...]:
    """log_softmax(hidden @ weight.T / temperature) in chunks of `chunk_tokens`, reduced chunk by chunk.

    Returns the concatenation of what `reduce` returns, each [N, ...], and then of what `measure` does, which has no
    gradient and is not computed again in the backward pass. The product is taken in the dtype of `hidden`
    (or of an enclosing autocast); the normalisation always in float32, and so are sums of gradients over chunks.
    Gradients flow to hidden, weight and bias; whatever else `reduce` reads is taken as constant.
    """
    device = hidden_NH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
    chunks = [slice(start, start + chunk_tokens) for start in range(0, max(len(hidden_NH), 1), chunk_tokens)]
    with torch.autocast(device, enabled=False):
        return _ChunkedHead.apply(hidden_NH, weight_VH, bias_V, reduce, measure, chunks, temperature, dtype)


class _ChunkedHead(torch.autograd.Function):
    """Keeps its inputs alone. The backward pass takes each chunk's log-probs again, and adds the chunk's share of the
    weight's gradient in place: autograd would make a tensor of the weight's size for each chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        reduce: Reduce,
        measure: Reduce | None,
        chunks: list[slice],
        temperature: float,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V)
        ctx.how = reduce, chunks, temperature, dtype
        ctx.set_materialize_grads(False)
        weight, bias = weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)
        parts = []
        for chunk in chunks:
            logprobs_nV = _logprobs(hidden_NH[chunk].to(dtype), weight, bias, temperature)
            parts.append(reduce(logprobs_nV, chunk) + (() if measure is None else measure(logprobs_nV, chunk)))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V = ctx.saved_tensors
        reduce, chunks, temperature, dtype = ctx.how
        weight, bias = weight_VH.to(dtype), None if bias_V is None else bias_V.to(dtype)
        grad_hidden = torch.empty_like(hidden_NH)
        grad_weight = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        for chunk in chunks:
            hidden_nH = hidden_NH[chunk].to(dtype)
            logprobs_nV = _logprobs(hidden_nH, weight, bias, temperature)
            grad_nV = _grad_of_logits(logprobs_nV, reduce, chunk, grads)
            grad_nV = (grad_nV if temperature == 1.0 else grad_nV.div_(temperature)).to(dtype)
            grad_hidden[chunk] = grad_nV @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad_nV.T, hidden_nH)
            if grad_bias is not None:
                grad_bias += grad_nV.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, without a copy where the dtypes agree."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _logprobs(
    hidden_nH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """log_softmax(hidden @ weight.T / temperature) of one chunk: [n, V] float32."""
    logits = torch.nn.functional.linear(hidden_nH, weight_VH, bias_V).float()
    return torch.log_softmax(logits if temperature == 1.0 else logits.div_(temperature), dim=-1)


def _grad_of_logits(
    logprobs_nV: torch.Tensor, reduce: Reduce, chunk: slice, grads: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """[n, V], in the place of the log-probs: what the gradients [N, ...] of the reduced columns, which come first, become
    at the logits.

    With g the gradient at the log-probs it is g - softmax(logits) * sum(g).
    """
    leaf = logprobs_nV.detach().requires_grad_()
    with torch.enable_grad():
        columns = reduce(leaf, chunk)
    pairs = [(c, g[chunk]) for c, g in zip(columns, grads, strict=False) if g is not None and c.requires_grad]
    if not pairs:
        return logprobs_nV.zero_()
    (grad,) = torch.autograd.grad([c for c, _ in pairs], [leaf], [g for _, g in pairs])
    return logprobs_nV.exp_().mul_(-grad.sum(-1, keepdim=True)).add_(grad)


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
    finite = logprobs_nV.clamp(min=torch.finfo(logprobs_nV.dtype).min)
    return -(logprobs_nV.exp() * finite).sum(-1)
