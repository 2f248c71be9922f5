"""Trajectories -> micro-batches by token budget.

Rows are sorted by length, so that little is padded, and padded on the right: a causal model never looks there, so no
attention mask is needed. Shapes: B trajectories, N response tokens of all; b rows of T columns and n response tokens
in one micro-batch. The order is a function of the lengths alone: the same trajectories make the same micro-batches.
"""

from dataclasses import dataclass

import numpy as np

from actors.trajectory import ragged_rows


@dataclass(frozen=True, slots=True)
class Microbatch:
    """One forward pass."""

    rows: np.ndarray
    """[b] int64: which trajectories."""
    input_ids: np.ndarray
    """[b, T] int64: prompt and response, 0 where padded."""
    positions: np.ndarray
    """[n] int64: places in the flattened [b * T] whose next token is a response token."""
    tokens: np.ndarray
    """[n] int64: places of those response tokens in the flat arrays of [N]."""


def group_by_budget(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Row numbers, shortest first, cut so that rows x longest <= budget; a longer row than the budget goes alone.

    lengths: [B]. Returns arrays of row numbers that together hold each of the B rows once.
    """
    order = np.argsort(lengths, kind="stable")
    groups: list[np.ndarray] = []
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[end]] > budget:
            groups.append(order[start:end])
            start = end
    return groups


def microbatches(
    prompt_tokens: np.ndarray,
    prompt_offsets: np.ndarray,
    response_tokens: np.ndarray,
    response_offsets: np.ndarray,
    token_budget: int,
) -> list[Microbatch]:
    """Cuts B trajectories, flat and ragged, into forward passes of at most `token_budget` tokens, padding included."""
    prompts, responses = np.diff(prompt_offsets), np.diff(response_offsets)
    out = []
    for rows in group_by_budget(prompts + responses, token_budget):
        before, length = prompts[rows], responses[rows]
        width = int((before + length).max())
        input_ids = np.zeros((len(rows), width), np.int64)
        column = np.arange(width)
        is_prompt = column < before[:, None]
        is_response = ~is_prompt & (column < (before + length)[:, None])
        input_ids[is_prompt] = ragged_rows(prompt_tokens, prompt_offsets, rows)
        input_ids[is_response] = ragged_rows(response_tokens, response_offsets, rows)
        out.append(
            Microbatch(
                rows=rows,
                input_ids=input_ids,
                positions=np.flatnonzero(is_response) - 1,
                tokens=ragged_rows(np.arange(len(response_tokens)), response_offsets, rows),
            )
        )
    return out
