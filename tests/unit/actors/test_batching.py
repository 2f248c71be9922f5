"""Micro-batches by token budget."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from actors.forward.packing import Microbatch, group_by_budget, microbatches
from actors.trajectory import offsets_of, ragged_rows


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 200))
def test_every_row_is_in_one_group_and_the_budget_is_kept(lengths: list[int], budget: int) -> None:
    groups = group_by_budget(np.array(lengths), budget)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    for rows in groups:
        assert sum(lengths[row] for row in rows) <= budget or len(rows) == 1
    for rows, following in pairwise(groups):
        assert sum(lengths[row] for row in rows) + lengths[following[0]] > budget, "there was room"


def test_positions_predict_the_tokens_that_follow() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.integers(1, 9, 20), rng.integers(1, 15, 20)
    prompts = rng.integers(1, 99, before.sum()).astype(np.int32)
    responses = rng.integers(1, 99, after.sum()).astype(np.int32)
    prompt_offsets, response_offsets = offsets_of(before), offsets_of(after)
    seen: list[int] = []
    for batch in microbatches(prompts, prompt_offsets, responses, response_offsets, 60):
        np.testing.assert_array_equal(batch.input_ids[batch.positions + 1], responses[batch.tokens])
        ends = np.cumsum(batch.lengths)
        for row, start, end in zip(batch.rows, ends - batch.lengths, ends, strict=True):  # one at a time, the slow way
            text = [
                *prompts[prompt_offsets[row] : prompt_offsets[row + 1]],
                *responses[response_offsets[row] : response_offsets[row + 1]],
            ]
            assert batch.input_ids[start:end].tolist() == text
        assert ends[-1] == len(batch.input_ids), "nothing but prompts and responses is computed"
        seen += batch.tokens.tolist()
    assert sorted(seen) == list(range(len(responses)))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 15)), min_size=1, max_size=30), st.integers(1, 90))
def test_the_micro_batches_are_a_function_of_the_lengths_alone(lengths: list[tuple[int, int]], budget: int) -> None:
    before, after = (np.array(column) for column in zip(*lengths, strict=True))

    def cut(first_token: int) -> list[Microbatch]:
        prompts, responses = np.arange(before.sum()) + first_token, np.arange(after.sum()) + first_token
        return microbatches(prompts, offsets_of(before), responses, offsets_of(after), budget)

    batches = cut(1)
    assert sorted(np.concatenate([batch.rows for batch in batches]).tolist()) == list(range(len(lengths)))
    for batch, other in zip(batches, cut(1000), strict=True):
        assert batch.input_ids.size <= budget or len(batch.rows) == 1
        for name in ("rows", "positions", "tokens"):
            np.testing.assert_array_equal(getattr(batch, name), getattr(other, name))


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 15)), min_size=1, max_size=30),
    st.data(),
    st.integers(1, 90),
)
def test_rows_are_cut_as_a_selection_of_them_would_be(
    lengths: list[tuple[int, int]], data: st.DataObject, budget: int
) -> None:
    before, after = (np.array(column) for column in zip(*lengths, strict=True))
    prompts, responses = np.arange(before.sum()), np.arange(after.sum()) + 1000
    prompt_offsets, response_offsets = offsets_of(before), offsets_of(after)
    rows = np.array(data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True)), np.int64)
    of_rows = [ragged_rows(*flat, rows) for flat in ((prompts, prompt_offsets), (responses, response_offsets))]
    selected = microbatches(of_rows[0], offsets_of(before[rows]), of_rows[1], offsets_of(after[rows]), budget)
    direct = microbatches(prompts, prompt_offsets, responses, response_offsets, budget, rows=rows)
    for one, other in zip(direct, selected, strict=True):
        for name in ("lengths", "input_ids", "positions"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_array_equal(one.rows, rows[other.rows])
        np.testing.assert_array_equal(responses[one.tokens], of_rows[1][other.tokens])
