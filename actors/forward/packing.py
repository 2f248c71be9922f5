"""Packs trajectories end to end into rows of tokens, without padding; each token attends to its own sequence only.

`microbatches` groups trajectories into rows of at most a number of tokens. `use_packed_attention` replaces the attention
of a model's layers, and `hidden_states` runs the model on such a row. On GPUs one kernel computes all sequences of a row
(torch's variable-length flash attention). Elsewhere neighbours of equal length are computed as a batch. In both cases
attention costs the sum of the squared lengths, not the square of the row's length. Several ranks may share a row (slices.py).

Shapes: B trajectories, N response tokens in all; b sequences of T tokens together, and n response tokens, in one
micro-batch; h heads of size d; s neighbours of equal length L.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from actors.forward.slices import Slices, length_dependent_rope
from actors.trajectory import ragged_rows

NAME = "packed"
"""Name of `_attend` among the attention functions of transformers."""
FLASH_HEAD = 256
"""Largest head size of the GPU kernel."""
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers in which tokens influence each other through attention alone, so that sequences can share a row."""


@dataclass(frozen=True, slots=True)
class Microbatch:
    """One forward pass. Example: prompts of 2 and 1 tokens with responses of 1 and 2 tokens make the row `p p r p r r`.

    `positions` are then 1 3 4, and `tokens` 0 1 2.
    """

    rows: np.ndarray
    """[b] int64: numbers of the trajectories."""
    lengths: np.ndarray
    """[s] int64: tokens of each sequence: prompt and response of a trajectory; of one that holds several conversations, of each."""
    input_ids: np.ndarray
    """[T] int64: prompt and response of the first trajectory, then of the second, and so on."""
    positions: np.ndarray
    """[n] int64: indices into `input_ids` where the model predicts a response token, i.e. one before that token."""
    tokens: np.ndarray
    """[n] int64: indices of the same response tokens in the flat arrays [N]."""

    def within(self, own: slice) -> "Microbatch":
        """The same row, with the predictions that are made at these tokens of it only."""
        inside = (self.positions >= own.start) & (self.positions < own.stop)
        return replace(self, positions=self.positions[inside], tokens=self.tokens[inside])


def group_by_budget(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Divides B rows into groups whose lengths [B] add up to at most `budget`; a longer row is a group of its own.

    Returns arrays of row numbers, shortest rows first, so that rows of equal length are neighbours. The result depends
    on the lengths alone: the same trajectories make the same micro-batches, to the bit, on every run.
    """
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    groups: list[np.ndarray] = []
    start = 0
    while start < len(order):
        before = ends[start] - lengths[order[start]]
        end = max(int(np.searchsorted(ends, before + budget, side="right")), start + 1)
        groups.append(order[start:end])
        start = end
    return groups


def microbatches(
    prompt_tokens: np.ndarray,
    prompt_offsets: np.ndarray,
    response_tokens: np.ndarray,
    response_offsets: np.ndarray,
    token_budget: int,
    *,
    rows: np.ndarray | None = None,
    begins: np.ndarray | None = None,
) -> list[Microbatch]:
    """Cuts B trajectories (tokens flat, offsets [B + 1]) into forward passes of at most `token_budget` tokens.

    rows: numbers of the trajectories to cut; None: all. begins: [N] bool, where a response holds several conversations, see
    Trajectories: each is a sequence of its own. What is predicted for its first token means nothing; the student did not write it.
    """
    prompts, responses = np.diff(prompt_offsets), np.diff(response_offsets)
    chosen = np.arange(len(prompts)) if rows is None else rows
    out = []
    for group in group_by_budget((prompts + responses)[chosen], token_budget):
        rows = chosen[group]
        before, after = prompts[rows], responses[rows]
        tokens = ragged_rows(np.arange(len(response_tokens)), response_offsets, rows)
        is_response = np.repeat(np.tile([False, True], len(rows)), np.stack([before, after], 1).reshape(-1))
        input_ids = np.empty(len(is_response), np.int64)
        input_ids[~is_response] = ragged_rows(prompt_tokens, prompt_offsets, rows)
        input_ids[is_response] = ragged_rows(response_tokens, response_offsets, rows)
        out.append(
            Microbatch(
                rows=rows,
                lengths=before + after if begins is None else _sequences(before + after, is_response, begins[tokens]),
                input_ids=input_ids,
                # A token is predicted at the position before it; a prompt has at least one token, so there is one.
                positions=np.flatnonzero(is_response) - 1,
                tokens=tokens,
            )
        )
    return out


def _sequences(lengths: np.ndarray, is_response: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """[s] lengths of the sequences of a row. lengths: [b] tokens of its trajectories. is_response: [T]. begins: of its n
    response tokens."""
    starts = np.zeros(len(is_response), bool)
    starts[np.cumsum(lengths) - lengths] = True
    starts[is_response] |= begins
    return np.diff(np.append(np.flatnonzero(starts), len(starts)))


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the sequences of a row begin and end."""

    runs: tuple[tuple[int, int], ...]
    """(s, L) for each run of s neighbours of equal length L, in the order of the row."""
    offsets: torch.Tensor
    """[b + 1] int32: start of each sequence, and the end of the last."""
    longest: int
    """Length of the longest sequence."""
    slices: Slices | None = None
    """This rank's place among those that share the row; None: it has all tokens."""

    @classmethod
    def of(cls, lengths: np.ndarray, device: str, slices: Slices | None = None) -> "Packing":
        """The packing of sequences with these lengths [b], in this order."""
        runs = tuple((len(list(same)), length) for length, same in groupby(lengths.tolist()))
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        return cls(runs, offsets.to(device), int(lengths.max()), slices)

    @property
    def tokens(self) -> int:
        """T."""
        return sum(count * length for count, length in self.runs)


@torch.no_grad()
def use_packed_attention(model: PreTrainedModel) -> bool:
    """Makes the model's layers attend within packed sequences. Returns False, and changes nothing, if they cannot.

    The hidden states of a packed row must equal those of its sequences computed alone. This fails for layers that carry
    a state from token to token (linear attention, state spaces, convolutions), and for models whose attention cannot be
    replaced. Layers that declare such a kind are refused by name. Others are found by a test: a row of two sequences is
    compared with its second sequence alone. After False the caller runs each sequence in its own pass.
    """
    if length_dependent_rope(model.config) is not None:
        return False  # a long sequence would change the positions of the short ones beside it
    if not set(getattr(model.config.get_text_config(), "layer_types", None) or ()) <= KNOWN_LAYERS:
        return False
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    # transformers has a public setter for the attention, but only this private name tells which one is set.
    before = model.config._attn_implementation
    device = str(model.get_input_embeddings().weight.device)
    tokens = np.arange(7) % model.config.get_text_config().vocab_size
    alone = hidden_states(model.base_model, tokens[4:], np.array([3]), device)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation == NAME:  # set_attn_implementation only warns if a model does not support it
        together = hidden_states(model.base_model, tokens, np.array([4, 3]), device)[4:]
        # Half precision differs by rounding. In float32 even a weak influence of the first sequence is seen.
        tolerance = 1e-3 if alone.dtype == torch.float32 else 0.05
        if (together - alone).abs().max() <= tolerance * alone.abs().max():
            return True
    model.set_attn_implementation(before)
    return False


def is_packed(model: PreTrainedModel) -> bool:
    """Whether `use_packed_attention` has returned True for it."""
    return model.config._attn_implementation == NAME


def attend_uncompiled() -> None:
    """Excludes `_attend` from torch.compile, which would compile it again for every new set of lengths."""
    AttentionInterface.register(NAME, torch.compiler.disable(_attend))


def hidden_states(
    body: torch.nn.Module, tokens: np.ndarray, lengths: np.ndarray, device: str, slices: Slices | None = None
) -> torch.Tensor:
    """Last hidden states [T, H] of a row: tokens [T], the lengths [b] of its sequences.

    Several sequences in a row need a model for which `use_packed_attention` returned True, and so does a row that several
    ranks share. slices: this rank's place among them; the states are then those of `slices.own(T)`, and all ranks of the
    group must call this with the same row.
    """
    # A single sequence takes transformers' usual path, which every model supports.
    packed: dict[str, Any] = {}
    if slices is not None:
        tokens, lengths = slices.filled(tokens, lengths)
    if len(lengths) > 1 or slices is not None:
        own = slice(None) if slices is None else slices.own(len(tokens))
        starts = np.cumsum(lengths) - lengths
        position_ids = np.arange(len(tokens)) - np.repeat(starts, lengths)  # each sequence counts from 0
        packed = {
            "position_ids": torch.from_numpy(position_ids[own]).to(device)[None],
            "packing": Packing.of(lengths, device, slices),  # transformers passes it on to `_attend`
        }
        tokens = tokens[own]
    return body(input_ids=torch.from_numpy(tokens).to(device)[None], use_cache=False, **packed).last_hidden_state[0]


def _mask(*, attention_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor | None:
    """No mask for packed rows, since the packing has their limits; transformers' mask for padded prompts (generation)."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **options)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Packing | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer: query, key, value [1, h, T, d] -> [1, T, h, d]; with slices, T is this rank's tokens.

    Without a packing: [B, h, T, d] -> [B, T, h, d], the same as transformers' sdpa attention.
    """
    # A position bias spans the whole row, so it cannot be packed; use_packed_attention then sees other hidden states.
    if packing is None or options.get("position_bias") is not None:
        return _attend_batch(module, query, key, value, attention_mask, **options), None
    slices = packing.slices
    if slices is None:
        return _attend_row(module, query, key, value, packing, **options), None
    # In the dtype of the product with autocast, so that no more is exchanged than is needed.
    device = query.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, key, value = slices.to_heads(query.to(kind), key.to(kind), value.to(kind), packing.tokens)
    # The module's own number of query heads for each key head does not hold for repeated key heads.
    groups = query.shape[1] // key.shape[1]
    of_heads: Any = SimpleNamespace(num_key_value_groups=groups, is_causal=getattr(module, "is_causal", True))
    return slices.to_tokens(_attend_row(of_heads, query, key, value, packing, **options)), None


def _attend_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    **options: Any,
) -> torch.Tensor:
    """Attention inside each sequence of a row: query, key, value [1, h, T, d] -> [1, T, h, d]."""
    if query.is_cuda:
        # The kernel takes half precision only. Under autocast query and key may still be float32 after the rotary embedding.
        kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
        if kind != torch.float32 and query.shape[-1] <= FLASH_HEAD and not options.get("dropout"):
            return _attend_flash(query.to(kind), key.to(kind), value.to(kind), packing, **options)
    sizes = [count * length for count, length in packing.runs]
    outputs = []
    for run, *row in zip(packing.runs, *(x[0].split(sizes, 1) for x in (query, key, value)), strict=True):
        q, k, v = (x.unflatten(1, run).transpose(0, 1) for x in row)  # [h, s * L, d] -> [s, h, L, d]
        outputs.append(_attend_batch(module, q, k, v, None, **options).flatten(0, 1))
    return torch.cat(outputs)[None]


def _attend_batch(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """Causal attention of s separate sequences: [s, h, L, d] -> [s, L, h, d]."""
    length = query.shape[2]
    if attention_mask is None and sliding_window is not None and sliding_window < length:
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)
        attention_mask = seen[None, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]


def _attend_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_options: Any,
) -> torch.Tensor:
    """All sequences of the row in one kernel, in half precision on a GPU: [1, h, T, d] -> [1, T, h, d]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, h, d]
    kernel, takes_groups = _kernel()
    if takes_groups:
        options: dict[str, Any] = {"enable_gqa": True}
    else:
        options, groups = {}, q.shape[1] // k.shape[1]
        k, v = (x if groups == 1 else x.repeat_interleave(groups, 1) for x in (k, v))
    offsets, longest = packing.offsets, packing.longest
    # (tokens to the left, tokens to the right) that a token sees; -1: all.
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    return kernel(q, k, v, offsets, offsets, longest, longest, scale=scaling, window_size=window, **options)[None]


@cache
def _kernel() -> tuple[Callable[..., Any], bool]:
    """torch's attention over sequences of any length, and whether it takes fewer key heads than query heads (not yet in
    torch 2.11)."""
    # Imported where it is needed: it registers operators with torch.compile, whose import takes as long as all others here.
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters
