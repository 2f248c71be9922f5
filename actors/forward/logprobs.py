"""Log-probs from hidden states: the one implementation, which teachers and the learner share.

The output layer is applied to one chunk of tokens at a time, and a callback reduces the chunk's log-probs [n, V] to a few
numbers a token before the next chunk. The [N, V] array of a batch never exists: with V = 150,000, 4,096 tokens would need
2.5 GB for each of several copies. The backward pass computes each chunk's log-probs again, but for the last chunk's, which
are kept: it begins with them, so they add nothing to the peak.

Shapes: N tokens, n tokens of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

Reduce = Callable[[torch.Tensor, slice], tuple[torch.Tensor, ...]]
"""(log-probs [n, V] float32, rows of the N tokens that the chunk holds) -> the tensors [n, ...] to keep."""


def chunked_head(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    reduce: Reduce,
    *,
    chunk_tokens: int,
    temperature: float = 1.0,
    vocabulary: int | None = None,
    measure: Reduce | None = None,
) -> tuple[torch.Tensor, ...]:
    """log_softmax((hidden @ weight.T + bias) / temperature), in nats, in chunks of `chunk_tokens`, each reduced at
    once. vocabulary: only the first rows of the head, whatever it has beyond them; None: all.

    Returns the tensors of `reduce`, concatenated to [N, ...] each, and then those of `measure`. Gradients flow from the
    tensors of `reduce` to hidden, weight and bias; other tensors that `reduce` reads are constants. `measure` has no
    gradient, and is not called in the backward pass.

    The product is computed in the dtype of `hidden`, or of an enclosing autocast; log-softmax in float32. The gradient
    of the weight is summed over the chunks in the weight's dtype.
    """
    device = hidden_NH.device.type
    # The backward pass runs outside the caller's autocast. So autocast is off, and both passes cast to this dtype themselves.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
    # Without tokens there is one empty chunk, so that the outputs still have their columns and dtypes.
    chunks = [slice(start, start + chunk_tokens) for start in range(0, max(len(hidden_NH), 1), chunk_tokens)]
    how = chunks, temperature, slice(vocabulary), dtype, torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        return _ChunkedHead.apply(hidden_NH, weight_VH, bias_V, reduce, measure, how)


class _ChunkedHead(torch.autograd.Function):
    """Saves its inputs and the last chunk's log-probs for the backward pass, which computes those of the others again.

    It adds each chunk's part of the weight's gradient in place: autograd would allocate a tensor of the weight's size
    for each chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        reduce: Reduce,
        measure: Reduce | None,
        how: tuple[list[slice], float, slice, torch.dtype, bool],
    ) -> tuple[torch.Tensor, ...]:
        chunks, temperature, rows, dtype, differentiated = how
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V)
        # Not the casts: they would hold a second copy of the weight until the backward pass.
        ctx.how, ctx.kept = (reduce, *how[:-1]), None
        # An output that the loss does not use has the gradient None, not [N, ...] zeros.
        ctx.set_materialize_grads(False)
        weight, bias = weight_VH[rows].to(dtype), None if bias_V is None else bias_V[rows].to(dtype)
        parts = []
        for chunk in chunks:
            logprobs_nV = _logprobs(hidden_NH[chunk].to(dtype), weight, bias, temperature)
            if differentiated and chunk is chunks[-1]:
                ctx.kept = reduced = _Reduced(logprobs_nV, reduce, chunk)
                columns = reduced.values
            else:
                columns = reduce(logprobs_nV, chunk)
            parts.append(columns + (() if measure is None else measure(logprobs_nV, chunk)))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V = ctx.saved_tensors
        reduce, chunks, temperature, rows, dtype = ctx.how
        weight, bias = weight_VH[rows].to(dtype), None if bias_V is None else bias_V[rows].to(dtype)
        grad_hidden = torch.empty_like(hidden_NH)
        grad_weight = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        for chunk in [chunks[-1], *chunks[:-1]]:
            hidden_nH = hidden_NH[chunk].to(dtype)
            # The gradient is written over what was kept, so a second backward pass computes it again.
            reduced, ctx.kept = ctx.kept, None
            if reduced is None:
                reduced = _Reduced(_logprobs(hidden_nH, weight, bias, temperature), reduce, chunk)
            grad_nV = reduced.grad_of_logits(grads)
            del reduced
            grad_nV = (grad_nV if temperature == 1.0 else grad_nV.div_(temperature)).to(dtype)
            grad_hidden[chunk] = grad_nV @ weight
            if grad_weight is not None:
                _add_product(grad_weight[rows], grad_nV.T, hidden_nH)
            if grad_bias is not None:
                grad_bias[rows] += grad_nV.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, without a temporary where the dtypes agree."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _logprobs(
    hidden_nH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    """log_softmax((hidden @ weight.T + bias) / temperature) of one chunk: [n, V] float32."""
    logits = torch.nn.functional.linear(hidden_nH, weight_VH, bias_V).float()
    return torch.log_softmax(logits if temperature == 1.0 else logits.div_(temperature), dim=-1)


class _Reduced:
    """What `reduce` makes of a chunk's log-probs [n, V], with all that its derivative needs."""

    def __init__(self, logprobs_nV: torch.Tensor, reduce: Reduce, chunk: slice):
        self._chunk = chunk
        # Autograd differentiates `reduce` alone. The softmax is done by hand, in place, to save two arrays of [n, V].
        self._leaf = logprobs_nV.detach().requires_grad_()
        with torch.enable_grad():
            self._columns = reduce(self._leaf, chunk)
        self.values = tuple(column.detach() for column in self._columns)

    def grad_of_logits(self, grads: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Gradient of the loss at the chunk's logits divided by the temperature: [n, V], written over the log-probs.

        With g the gradient at the log-probs l, and since dl_j / dz_i = [i = j] - softmax(z)_i, it is
        g - softmax(z) * sum(g). grads: the gradients [N, ...] at the outputs; those of `reduce` come first.
        """
        logprobs_nV = self._leaf.detach()
        pairs = [
            (column, grad[self._chunk])
            for column, grad in zip(self._columns, grads, strict=False)
            if grad is not None and column.requires_grad
        ]
        if not pairs:
            return logprobs_nV.zero_()
        (grad,) = torch.autograd.grad([column for column, _ in pairs], [self._leaf], [its for _, its in pairs])
        del pairs, self._columns
        return logprobs_nV.exp_().mul_(-grad.sum(-1, keepdim=True)).add_(grad)


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor as a numpy array, without loss. numpy has no bfloat16: its bits become uint16."""
    tensor = tensor.detach().cpu()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def from_array(array: np.ndarray) -> torch.Tensor:
    """The inverse of `to_array`. Copies, since arrays from Ray's object store are read-only."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def token_logprobs(logprobs_nV: torch.Tensor, tokens_n: torch.Tensor) -> torch.Tensor:
    """Log-prob of one token in each row: log-probs [n, V], token ids [n] -> [n]."""
    return logprobs_nV.gather(-1, tokens_n[:, None]).squeeze(-1)


def entropy(logprobs_nV: torch.Tensor) -> torch.Tensor:
    """Shannon entropy -sum_v p_v log p_v in nats: [n, V] -> [n]. A probability of zero adds nothing."""
    # 0 * -inf would be NaN, so log 0 becomes the lowest finite number.
    finite = logprobs_nV.clamp(min=torch.finfo(logprobs_nV.dtype).min)
    return -(logprobs_nV.exp() * finite).sum(-1)
