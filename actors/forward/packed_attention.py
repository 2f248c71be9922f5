"""Attention within sequences that lie end to end in one row, so that nothing is padded.

Each token sees its own sequence, up to itself, through the window that its layer has. On GPUs one kernel takes all
sequences (torch's variable-length flash attention); elsewhere neighbours of one length are taken as a batch, so that the
cost is that of the sequences and never of the row squared. Shapes: T tokens of a row, h heads, d their size; s sequences
of L tokens each.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "packed"
"""What models are told to use; transformers then calls `_attend` in each layer."""
FLASH_HEAD = 256
"""The largest heads that the kernel of GPUs takes."""
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
"""Of transformers' kinds of layers, those in which nothing but the keys and values that are seen passes between tokens."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the sequences of a row begin and end."""

    runs: tuple[tuple[int, int], ...]
    """(s, L) of neighbours of one length, in the order of the row."""
    offsets: torch.Tensor
    """[sequences + 1] int32: where each begins, and the end of the last."""
    longest: int

    @classmethod
    def of(cls, lengths: np.ndarray, device: str) -> "Packing":
        """lengths: of the sequences, in their order."""
        runs = tuple((len(list(same)), length) for length, same in groupby(lengths.tolist()))
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        return cls(runs, offsets.to(device), int(lengths.max()))


def attend_uncompiled() -> None:
    """From here on `_attend` is left out of what torch.compile compiles."""
    AttentionInterface.register(NAME, torch.compiler.disable(_attend))


@torch.no_grad()
def use_packed_attention(model: PreTrainedModel) -> bool:
    """Tells the model's layers to attend within packed sequences; False, and nothing changed, where they cannot.

    Layers with a state of their own (linear attention, state spaces, convolutions) run on over the end of a sequence,
    and so do models that do not let their attention be replaced: both are found by trying.
    """
    if not set(getattr(model.config.get_text_config(), "layer_types", None) or ()) <= KNOWN_LAYERS:
        return False
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    before = model.config._attn_implementation
    device = str(model.get_input_embeddings().weight.device)
    tokens = np.arange(7) % model.config.get_text_config().vocab_size
    alone = hidden_states(model.base_model, tokens[4:], np.array([3]), device)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation == NAME:
        together = hidden_states(model.base_model, tokens, np.array([4, 3]), device)[4:]
        if (together - alone).abs().max() <= 0.05 * alone.abs().max():
            return True
    model.set_attn_implementation(before)
    return False


def hidden_states(body: torch.nn.Module, tokens: np.ndarray, lengths: np.ndarray, device: str) -> torch.Tensor:
    """[T, H] of sequences with these lengths, whose tokens [T] lie end to end; several only after use_packed_attention."""
    how: dict[str, Any] = {}
    if len(lengths) > 1:
        places = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        how = {"position_ids": torch.from_numpy(places).to(device)[None], "packing": Packing.of(lengths, device)}
    return body(input_ids=torch.from_numpy(tokens).to(device)[None], use_cache=False, **how).last_hidden_state[0]


def _mask(*, attention_mask: torch.Tensor | None = None, **how: Any) -> torch.Tensor | None:
    """None where whole sequences are read; what transformers has where some are padded (generation)."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **how)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Packing | None = None,
    **how: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value [1, h, T, d] -> [1, T, h, d]; without a packing [B, h, T, d], as transformers' sdpa."""
    if packing is None or how.get("position_bias") is not None:  # a bias is of the whole row: found by trying
        return _whole(module, query, key, value, attention_mask, **how), None
    if query.is_cuda:
        kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
        if kind != torch.float32 and query.shape[-1] <= FLASH_HEAD and not how.get("dropout"):
            return _flash(query.to(kind), key.to(kind), value.to(kind), packing, **how), None
    sizes = [count * length for count, length in packing.runs]
    parts = []
    for run, *states in zip(packing.runs, *(x[0].split(sizes, 1) for x in (query, key, value)), strict=True):
        q, k, v = (x.unflatten(1, run).transpose(0, 1) for x in states)  # [s, h, L, d]
        parts.append(_whole(module, q, k, v, None, **how).flatten(0, 1))
    return torch.cat(parts)[None], None


def _whole(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    **how: Any,
) -> torch.Tensor:
    """[s, h, L, d] -> [s, L, h, d], each of the s sequences alone."""
    length = query.shape[2]
    if attention_mask is None and sliding_window is not None and sliding_window < length:
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)
        attention_mask = seen[None, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **how)[0]


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_how: Any,
) -> torch.Tensor:
    """All sequences in one kernel: half precision, on a GPU."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, h, d]
    offsets, longest = packing.offsets, packing.longest
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    out: Any = varlen_attn(
        q, k, v, offsets, offsets, longest, longest, scale=scaling, window_size=window, enable_gqa=True
    )
    return out[None]
