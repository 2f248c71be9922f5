"""Log-probs over the whole vocabulary from hidden states and a head, a few tokens at a time.

A head turns a hidden state into log-probs. A state takes 2H bytes a token in bfloat16, its log-probs take 4V bytes, and
the head is loaded once: so a teacher can send its whole distribution. The learner keeps pi_old over the vocabulary in the
same way. Shapes: N tokens of the update, n of a chunk, M tokens with a state in one source, H hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """An output layer, and what its logits are divided by."""

    weight: Tensor
    """[V, H]."""
    bias: Tensor | None
    """[V]."""
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """The hidden states of one model for some tokens, and its head."""

    states_MH: Tensor
    """In the dtype of the product with the head."""
    head: Head
    places: Tensor
    """[N] int64: the row of each token in the states; -1 where this model has no state for the token."""
    log_weights_M: Tensor
    """Log of its share in a mixture."""

    def at(self, tokens_n: Tensor) -> "HiddenStates":
        """The same for some of the tokens, in this order."""
        return replace(self, places=self.places[tokens_n])

    def logprobs(self, rows: slice | Tensor) -> Tensor:
        """[n, V] float32 log q + log share, without gradient; -inf where this model has no state for the token.

        log q = log_softmax((states @ weight.T + bias) / temperature), in nats
        """
        places_n = self.places[rows]
        known = places_n >= 0
        with torch.no_grad(), torch.autocast(self.states_MH.device.type, enabled=False):
            picked = places_n[known]
            weight, bias, temperature = self.head
            logits = torch.nn.functional.linear(self.states_MH[picked], weight, bias).float()
            logprobs = torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)
            logprobs = logprobs + self.log_weights_M[picked, None]
            if known.all():
                return logprobs
            # -inf is the log of no share: such rows leave the other models of a mixture as they are.
            return logprobs.new_full((len(places_n), logprobs.shape[1]), -torch.inf).index_put((known,), logprobs)


def same_rows(heads: Mapping[str, Head], vocabulary: int, turn_ends: Mapping[str, tuple[int, int]]) -> dict[str, Head]:
    """The heads, cut to the rows that all of them and the student's `vocabulary` have.

    Vocabularies are padded to different sizes. Each teacher's distribution is then normalised over the same tokens.
    turn_ends: (student's, teacher's) rows that change places, for teachers that end a turn with another token.
    """
    count = min([vocabulary, *(len(head.weight) for head in heads.values())])

    def cut(name: str, values: Tensor) -> Tensor:
        if name not in turn_ends:
            return values[:count]
        order, (ours, theirs) = torch.arange(len(values), device=values.device), turn_ends[name]
        order[[ours, theirs]] = order[[theirs, ours]]
        return values[order[:count]]

    return {
        name: head._replace(weight=cut(name, head.weight), bias=None if head.bias is None else cut(name, head.bias))
        for name, head in heads.items()
    }


def mixture_logprobs(sources: Sequence[HiddenStates], rows: slice | Tensor) -> Tensor:
    """[n, V] log sum_i w_i q_i over the sources i that have a state for the token; their heads have the same rows."""
    first, *others = (source.logprobs(rows) for source in sources)
    for other in others:
        first = torch.logaddexp(first, other)
    return first
