"""A learning rate that is planned anew while a campaign runs: no jump, no second warm-up, and the way to the end."""

import itertools
import math
from dataclasses import replace

import pytest

from learner.config import OptimizerConfig
from learner.schedule import Plan, learning_rate, planned_again

COSINE = OptimizerConfig(1.0, warmup_updates=4, schedule="cosine", final_fraction=0.1)


def rates(total: int, config: OptimizerConfig, plans: list[Plan]) -> list[float]:
    return [learning_rate(update, total, config, plans) for update in range(1, total + 1)]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_longer_campaign_goes_on_from_its_present_rate_to_the_final_one_over_what_is_left(schedule: str) -> None:
    config = replace(COSINE, schedule=schedule)
    plans = planned_again(10, (20, config, []), (40, config))
    before, after = rates(20, config, []), rates(40, config, plans)
    assert after[:10] == pytest.approx(before[:10]), "a campaign that goes back takes the same rates again"
    steps = [b - a for a, b in itertools.pairwise(after[4:])]
    assert max(steps) <= 1e-12, "no jump back up, and no warm-up"
    assert abs(after[10] - after[9]) < abs(before[10] - before[9]), "slower, since more is left"
    assert after[-1] == pytest.approx(0.1)
    p = 15 / 30  # halfway through what is left
    expected = (1 + math.cos(math.pi * p)) / 2 if schedule == "cosine" else 1 - p
    assert after[24] == pytest.approx(0.1 + (before[9] - 0.1) * expected)


def test_within_the_warm_up_the_warm_up_continues() -> None:
    plans = planned_again(2, (20, COSINE, []), (40, COSINE))
    assert rates(40, COSINE, plans) == pytest.approx(rates(40, COSINE, []))


def test_a_second_change_begins_at_the_rate_of_the_first_and_nothing_changed_changes_nothing() -> None:
    first = planned_again(10, (20, COSINE, []), (40, COSINE))
    second = planned_again(30, (40, COSINE, first), (35, COSINE))
    assert planned_again(30, (40, COSINE, first), (40, COSINE)) == first
    found = rates(35, COSINE, second)
    assert found[:30] == pytest.approx(rates(40, COSINE, first)[:30])
    assert found[29] > found[30] > found[34] and found[34] == pytest.approx(0.1)


def test_another_learning_rate_counts_from_here_on_and_other_shapes_begin_at_the_present_rate() -> None:
    other = replace(COSINE, learning_rate=0.5)
    plans = planned_again(10, (20, COSINE, []), (20, other))
    assert plans[-1].rate == 0.5 and rates(20, other, plans)[-1] == pytest.approx(0.05)
    flat = replace(COSINE, schedule="constant")
    now = learning_rate(10, 20, COSINE)
    assert rates(20, flat, planned_again(10, (20, COSINE, []), (20, flat)))[10:] == pytest.approx([now] * 10)


def test_a_constant_rate_needs_no_plan_and_an_end_at_zero_has_no_way_on_but_the_learning_rate() -> None:
    flat = OptimizerConfig(1.0, warmup_updates=4)
    assert planned_again(2, (20, flat, []), (40, flat)) == planned_again(10, (20, flat, []), (40, flat)) == []
    assert planned_again(0, (20, COSINE, []), (40, COSINE)) == []
    ended = replace(COSINE, final_fraction=0.0)
    assert planned_again(20, (20, ended, []), (40, ended))[-1].rate == 0
    again = planned_again(20, (20, ended, []), (40, ended), afresh=True)
    assert again[-1].rate == 1.0 and learning_rate(30, 40, ended, again) == pytest.approx(0.5)
    assert Plan(**again[-1].to_json()) == again[-1]
