"""Trajectories -> micro-batches by token budget: sequences end to end in one row, nothing padded.

Shapes: B trajectories, N response tokens of all; b sequences of T tokens together and n response tokens in one
micro-batch. The order is a function of the lengths alone: the same trajectories make the same micro-batches.
"""

from dataclasses import dataclass

import numpy as np

from actors.trajectory import ragged_rows


@dataclass(frozen=True, slots=True)
class Microbatch:
    """One forward pass."""

    rows: np.ndarray
    """[b] int64: which trajectories."""
    lengths: np.ndarray
    """[b] int64: tokens of each, prompt and response."""
    input_ids: np.ndarray
    """[T] int64: prompt and response of one after the other."""
    positions: np.ndarray
    """[n] int64: places in the row whose next token is a response token."""
    tokens: np.ndarray
    """[n] int64: places of those response tokens in the flat arrays of [N]."""


def group_by_budget(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Row numbers, shortest first, cut so that a group's lengths add up to at most the budget; a row that is longer
    goes alone. What has one length lies side by side.

    lengths: [B]. Returns arrays of row numbers that together hold each of the B rows once.
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
) -> list[Microbatch]:
    """Cuts B trajectories, flat and ragged, into forward passes of at most `token_budget` tokens."""
    prompts, responses = np.diff(prompt_offsets), np.diff(response_offsets)
    out = []
    for rows in group_by_budget(prompts + responses, token_budget):
        before, after = prompts[rows], responses[rows]
        is_response = np.repeat(np.tile([False, True], len(rows)), np.stack([before, after], 1).reshape(-1))
        input_ids = np.empty(len(is_response), np.int64)
        input_ids[~is_response] = ragged_rows(prompt_tokens, prompt_offsets, rows)
        input_ids[is_response] = ragged_rows(response_tokens, response_offsets, rows)
        out.append(
            Microbatch(
                rows=rows,
                lengths=before + after,
                input_ids=input_ids,
                positions=np.flatnonzero(is_response) - 1,
                tokens=ragged_rows(np.arange(len(response_tokens)), response_offsets, rows),
            )
        )
    return out
