"""Sequence parallelism: the ranks of a group share the tokens of a row, and in attention its heads.

    embedding, MLP, norms, head, loss    each rank has a contiguous slice of the row's tokens
    attention                            each rank has all tokens of the row, for its share of the heads

An all-to-all exchange before attention and one after it change from one to the other (DeepSpeed-Ulysses, arXiv 2309.14509).
Its gradient is the exchange back. Shapes: N ranks of a group, T tokens of a row, t of this rank's slice; h query heads and
k key and value heads of size d.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig

from actors.errors import UserError

KEY = "learner.sequence_parallel"


@dataclass(frozen=True, eq=False, slots=True)
class Slices:
    """This rank's place in a group whose ranks share each row."""

    place: int
    count: int
    """N."""
    group: dist.ProcessGroup

    def edges(self, tokens: int) -> list[int]:
        """[N + 1] where the slices of a row of T tokens begin and end. Their lengths differ by 1 at most."""
        return [tokens * place // self.count for place in range(self.count + 1)]

    def own(self, tokens: int) -> slice:
        """This rank's slice of a row of T tokens."""
        edges = self.edges(max(tokens, self.count))
        return slice(edges[self.place], edges[self.place + 1])

    def filled(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A row's tokens [T] and the lengths [b] of its sequences. A row with fewer tokens than ranks gets one more
        sequence, from which nothing is predicted, so that each rank has a token: no layer has to work on none."""
        missing = self.count - len(tokens)
        return (tokens, lengths) if missing <= 0 else (np.append(tokens, [0] * missing), np.append(lengths, missing))

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum over the group, without gradient."""
        values = values.detach().clone()
        dist.all_reduce(values, group=self.group)
        return values

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor, tokens: int) -> list[Tensor]:
        """Query [1, h, t, d], key and value [1, k, t, d] of this rank's tokens -> the same of all T tokens, for this
        rank's 1/N of the heads. Where N does not divide k, each key head is first repeated N / gcd(k, N) times.

        UserError: N does not divide h.
        """
        if query.shape[1] % self.count:
            found = f"{self.count}, with {query.shape[1]} attention heads in a layer"
            raise UserError(KEY, found, f"a divisor of {query.shape[1]}")
        repeats = self.count // math.gcd(key.shape[1], self.count)
        key, value = (x if repeats == 1 else x.repeat_interleave(repeats, 1) for x in (key, value))
        # Rank by rank, each rank's heads of a token side by side: [h, t, d] -> [N, t, h / N * d]. One exchange for all three.
        parts = [x[0].unflatten(0, (self.count, -1)).transpose(1, 2).flatten(2) for x in (query, key, value)]
        sent = torch.cat(parts, -1).flatten(0, 1)
        edges = self.edges(tokens)
        received = _Exchange.apply(sent, [query.shape[2]] * self.count, np.diff(edges).tolist(), self.group)
        columns = received.split([part.shape[-1] for part in parts], -1)
        sizes = [x.shape[-1] for x in (query, key, value)]
        return [c.unflatten(-1, (-1, size)).transpose(0, 1)[None] for c, size in zip(columns, sizes, strict=True)]

    def to_tokens(self, output: Tensor) -> Tensor:
        """Attention's output [1, T, h / N, d] for this rank's heads -> [1, t, h, d] for its tokens."""
        edges = self.edges(output.shape[1])
        own = edges[self.place + 1] - edges[self.place]
        sent = output[0].flatten(1)
        received = _Exchange.apply(sent, np.diff(edges).tolist(), [own] * self.count, self.group)
        heads = received.unflatten(0, (self.count, own)).transpose(0, 1).flatten(1)  # [N, t, h / N * d] -> [t, h * d]
        return heads.unflatten(1, (-1, output.shape[-1]))[None]


class _Exchange(torch.autograd.Function):
    """The all-to-all exchange of rows: [sum(sent), ...] -> [sum(received), ...]; the gradient is the exchange back."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.back = received, sent, group
        return _exchange(values, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad, *ctx.back), None, None, None


def _exchange(values: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    out = values.new_empty((sum(received), *values.shape[1:]))
    dist.all_to_all_single(out, values.contiguous(), list(received), list(sent), group=group)
    return out


def check_slices(config: PreTrainedConfig, count: int) -> None:
    """UserError: the rows of a model with this configuration cannot be shared by `count` ranks (`KEY`)."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if count == 1:
        return
    if isinstance(heads, int) and heads % count:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(KEY, f"{count}, and student.model with {heads} attention heads", f"one of {fitting}")
    if (kind := length_dependent_rope(config)) is not None:
        found = f"{count}, and student.model whose rotary embedding depends on the length of a pass ({kind})"
        raise UserError(KEY, found, "1")


def length_dependent_rope(config: PreTrainedConfig) -> str | None:
    """The kind of the model's rotary embedding if its frequencies depend on the longest position of a pass; else None."""
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    each = [rope for rope in found.values() if isinstance(rope, dict)] or [found]  # one for all layers, or one a kind
    kinds = {str(rope.get("rope_type", rope.get("type"))) for rope in each}
    return next((kind for kind in sorted(kinds) if kind == "longrope" or "dynamic" in kind), None)
