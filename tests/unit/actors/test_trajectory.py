"""Ragged arrays, and the joining of batches by id."""

import itertools
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest

from actors.teacher_scores import WIDE_FIELDS, TeacherScores, select_scores, split_scores
from actors.trajectory import Aside, Requests, RolloutCounts, Trajectories, offsets_of, ragged_rows, select_trajectories


def trajectories(ids: list[tuple[int, int, int]], lengths: list[int], start: int = 0) -> Trajectories:
    total = sum(lengths)
    return Trajectories(
        ids=np.array(ids),
        prompt_tokens=np.arange(2 * len(ids), dtype=np.int32) + start,
        prompt_offsets=offsets_of([2] * len(ids)),
        response_tokens=np.arange(total, dtype=np.int32) + start,
        response_offsets=offsets_of(lengths),
        behaviour_logprobs=-np.arange(total, dtype=np.float32) - start,
        policy_versions=np.full(total, start, np.int32),
        finish_reasons=np.arange(len(ids), dtype=np.uint8) % 2,
    )


def scores(ids: list[tuple[int, int, int]], logprobs: list[list[float]], teacher: str, share: float) -> TeacherScores:
    flat = np.array(sum(logprobs, []), np.float32)  # noqa: RUF017
    return TeacherScores(
        ids=np.array(ids),
        response_offsets=offsets_of(map(len, logprobs)),
        logprobs=flat,
        teacher=teacher,
        log_weights=np.full(len(ids), np.log(share), np.float32),
        support_ids=np.zeros((len(flat), 0), np.int32),
        support_logprobs=np.stack([flat, np.log1p(-np.exp(flat))], 1),
    )


def test_ragged_rows_are_taken_in_the_order_asked() -> None:
    values, offsets = np.arange(10), offsets_of([3, 0, 2, 5])
    assert ragged_rows(values, offsets, [2, 0]).tolist() == [3, 4, 0, 1, 2]
    assert ragged_rows(values, offsets, [1]).tolist() == []
    assert ragged_rows(values, offsets, np.array([3, 3])).tolist() == [5, 6, 7, 8, 9] * 2


def test_trajectories_are_found_by_id_in_any_batch_and_order() -> None:
    first = trajectories([(0, 5, 0), (0, 5, 1)], [3, 1])
    second = trajectories([(0, 2, 0)], [4], start=100)
    chosen = select_trajectories(np.array([(0, 2, 0), (0, 5, 1)]), [first, second])
    assert chosen.ids.tolist() == [[0, 2, 0], [0, 5, 1]]
    assert chosen.response_tokens.tolist() == [100, 101, 102, 103, 3]
    assert chosen.response_offsets.tolist() == [0, 4, 5]
    assert chosen.prompt_tokens.tolist() == [100, 101, 2, 3]
    assert chosen.behaviour_logprobs.tolist() == [-100, -101, -102, -103, -3]
    assert chosen.policy_versions.tolist() == [100, 100, 100, 100, 0]
    assert chosen.finish_reasons.tolist() == [0, 1]


def test_a_batch_that_is_asked_for_as_it_is_comes_back_itself() -> None:
    ids = [(0, 5, 0), (0, 5, 1)]
    written = trajectories(ids, [3, 1])
    assert select_trajectories(np.array(ids), [written]) is written
    turned = select_trajectories(np.array(ids[::-1]), [written])
    assert turned.ids.tolist() == [[0, 5, 1], [0, 5, 0]] and turned.response_tokens.tolist() == [3, 0, 1, 2]
    assert select_trajectories(np.array(ids[:1]), [written]).response_tokens.tolist() == [0, 1, 2]
    assert len(select_trajectories(np.array(ids), [written, trajectories([(0, 9, 0)], [2])])) == 2


def test_an_id_that_no_batch_holds_is_an_error() -> None:
    with pytest.raises(KeyError, match="9"):
        select_trajectories(np.array([(0, 9, 0)]), [trajectories([(0, 1, 0)], [2])])
    with pytest.raises(KeyError, match="9"):
        select_scores(np.array([(0, 9, 0)]), [scores([(0, 1, 0)], [[-1.0]], "a", 1.0)])


def test_scores_of_one_teacher_come_through_to_the_bit() -> None:
    one, two = scores([(0, 1, 0)], [[-0.1, np.nan]], "a", 1.0), scores([(0, 2, 0)], [[-3.3]], "a", 1.0)
    chosen = select_scores(np.array([(0, 2, 0), (0, 1, 0)]), [one, two])
    np.testing.assert_array_equal(chosen.logprobs, np.array([-3.3, -0.1, np.nan], np.float32))
    np.testing.assert_array_equal(chosen.support_logprobs[1], one.support_logprobs[0])


def test_of_what_a_teacher_has_said_twice_the_last_counts() -> None:
    before = scores([(0, 1, 0), (0, 2, 0)], [[-1.0, -2.0], [-3.0]], "a", 1.0)
    after = scores([(0, 1, 0)], [[-4.0, -5.0, -6.0]], "a", 1.0)
    chosen = select_scores(np.array([(0, 1, 0), (0, 2, 0)]), [before, after])
    assert chosen.logprobs.tolist() == [-4.0, -5.0, -6.0, -3.0] and chosen.response_offsets.tolist() == [0, 3, 4]


def test_several_teachers_of_one_trajectory_are_their_mixture_in_probability_space() -> None:
    ids = [(0, 1, 0)]
    mixed = select_scores(
        np.array(ids),
        [scores(ids, [[np.log(0.5), np.log(0.2)]], "a", 0.25), scores(ids, [[np.log(0.1), np.nan]], "b", 0.75)],
    )
    assert np.exp(mixed.logprobs[0]) == pytest.approx(0.25 * 0.5 + 0.75 * 0.1)
    assert np.isnan(mixed.logprobs[1])  # one of them is missing: so is the mixture
    assert np.exp(mixed.support_logprobs[0]).sum() == pytest.approx(1.0)


def test_teachers_of_different_domains_each_score_their_own() -> None:
    maths, code = scores([(0, 1, 0)], [[-1.0]], "maths", 1.0), scores([(0, 2, 0)], [[-2.0, -3.0]], "code", 1.0)
    chosen = select_scores(np.array([(0, 2, 0), (0, 1, 0)]), [maths, code])
    assert chosen.logprobs.tolist() == [-2.0, -3.0, -1.0]
    assert replace(chosen, teacher="x").response_offsets.tolist() == [0, 2, 3]


def test_scores_are_split_by_trajectory_and_put_together_for_any_of_them() -> None:
    ids = [(0, 1, 0), (0, 2, 0), (0, 3, 0)]
    together = scores(ids, [[-1.0, -2.0], [-3.0], [-4.0, -5.0, -6.0]], "a", 0.5)
    parts = split_scores(together)
    assert [part.ids.tolist() for part in parts] == [[list(row)] for row in ids]
    assert [len(part.support_logprobs) for part in parts] == [2, 1, 3]
    assert all(part.log_weights.tolist() == together.log_weights[:1].tolist() for part in parts)
    assert np.shares_memory(parts[1].support_logprobs, together.support_logprobs)
    other = scores(ids, [[-7.0, -7.0], [-7.0], [-7.0] * 3], "b", 0.5)
    asked = np.array([ids[2], ids[0]])
    for name in ("logprobs", *WIDE_FIELDS):
        found = getattr(select_scores(asked, [parts[2], other, parts[0]]), name)
        np.testing.assert_array_equal(found, getattr(select_scores(asked, [together, other]), name))
    with pytest.raises(KeyError):
        select_scores(np.array(ids), [parts[0], parts[2]])


def test_a_mixture_does_not_depend_on_who_answered_first() -> None:
    ids, rng = [(0, 1, 0)], np.random.default_rng(0)
    three = [scores(ids, [list(-rng.random(9))], name, 1 / 3) for name in "abc"]
    expected = select_scores(np.array(ids), three)
    for order in itertools.permutations(three):
        np.testing.assert_array_equal(select_scores(np.array(ids), list(order)).logprobs, expected.logprobs)


def test_which_tokens_are_trained_goes_with_them_and_is_all_where_nothing_is_said() -> None:
    one, two = trajectories([(0, 1, 0), (0, 2, 0), (0, 3, 0)], [2, 0, 3]), trajectories([(0, 4, 0)], [2])
    assert one.trained.tolist() == [True] * 5
    one = replace(one, trained=np.array([True, False, False, False, True]))
    chosen = select_trajectories(np.array([(0, 4, 0), (0, 3, 0), (0, 2, 0), (0, 1, 0)]), [one, two])
    assert chosen.trained.tolist() == [True, True, False, False, True, True, False]
    assert chosen.trained_lengths.tolist() == [2, 1, 0, 1] and chosen.lengths.tolist() == [2, 3, 0, 2]
    assert chosen.turns.tolist() == [0, 0, -1, -1, 0, 0, -1] and chosen.turn_counts.tolist() == [1, 1, 0, 1]
    assert chosen.own_places.tolist() == [0, 1, 0, 0, 0, 0, 1]
    turns = replace(one, trained=np.array([False, True, True, False, True]))
    assert turns.turns.tolist() == [-1, 0, 0, -1, 1] and turns.turn_counts.tolist() == [1, 0, 2]
    none = np.iinfo(np.int32).max
    assert chosen.oldest_versions.tolist() == [0, 0, none, 0]
    assert replace(one, policy_versions=np.array([3, -1, 9, 9, 2], np.int32)).oldest_versions.tolist() == [3, none, 2]
    for wrong in (np.ones(4, bool), np.ones(5, np.int8)):
        with pytest.raises(ValueError, match=r"trained is (bool \[4\]|int8 \[5\]), expected bool \[5\]"):
            replace(one, trained=wrong)


def test_where_conversations_begin_goes_with_them() -> None:
    one, two = trajectories([(0, 1, 0), (0, 2, 0)], [2, 3]), trajectories([(0, 4, 0)], [2])
    ids = np.array([(0, 4, 0), (0, 2, 0)])
    assert not select_trajectories(ids, [one, two]).begins.size
    begins = np.array([False, False, False, True, False])
    one = replace(one, trained=~begins)
    for wrong in (begins[1:], ~begins):
        with pytest.raises(ValueError, match=r"Trajectories\.begins is not \[N\]"):
            replace(one, begins=wrong)
    assert select_trajectories(ids, [replace(one, begins=begins), two]).begins.tolist() == [
        False,
        False,
        False,
        True,
        False,
    ]


def test_requests_and_counts_arrive_as_they_were_sent() -> None:
    sent = Requests(
        ids=np.array([(0, 4, 1), (1, 5, 0)]),
        seeds=np.array([2**62, 7]),
        prompt_tokens=np.arange(5, dtype=np.int32),
        prompt_offsets=np.array([0, 2, 5]),
        references=("7", None),
        asides=(Aside("sums"), Aside()),
        max_response_tokens=9,
    )
    came = pickle.loads(pickle.dumps(sent, protocol=5))
    for field in fields(Requests):
        one, other = getattr(sent, field.name), getattr(came, field.name)
        assert type(one) is type(other) and np.array_equal(one, other), field.name
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None)
    counts = RolloutCounts(
        np.array([3, 4]), np.array([1, 2], np.int32), np.array([True, False]), 0.5, seats=8, refused={1: "no"}
    )
    back = pickle.loads(pickle.dumps(counts, protocol=5))
    assert [value.tolist() for value in back[:3]] == [[3, 4], [1, 2], [True, False]]
    assert back[3:] == counts[3:] and isinstance(back, RolloutCounts)
