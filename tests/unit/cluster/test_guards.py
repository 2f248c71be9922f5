"""Guards, as functions of the metrics' history; nothing here is a campaign (see test_rollback.py)."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import UserError
from cluster.guards import Finding, GuardConfig, GuardState, check_guards, default_guards, judge
from cluster.records.metric_table import guardable


def guard(**settings: Any) -> GuardConfig:
    return replace(GuardConfig("entropy", action="warn"), **settings)


def play(one: GuardConfig, values: list[Any], state: GuardState | None = None) -> tuple[GuardState, list[Finding]]:
    state, found = state or GuardState(), []
    for step, value in enumerate(values, 1):
        state, findings = judge({"g": one}, state, {"step": step, "entropy": value})
        found += findings
    return state, found


def steps(one: GuardConfig, values: list[Any]) -> list[int]:
    return [finding.step for finding in play(one, values)[1]]


@pytest.mark.parametrize(
    ("one", "values", "expected"),
    [
        (guard(above=2.0), [1, 2, 2.0001, 1], [3]),
        (guard(below=2.0), [3, 2, 1.9999, 3], [3]),
        (guard(above=2.0, below=1.0), [1.5, 0, 1.5, 3], [2, 4]),
        (guard(above=2.0, updates=3), [3, 3, 1, 3, 3, 3, 3], [6]),
        (guard(above=-1.0), [-2, -0.5], [2]),
        (guard(above=2.0), [math.inf], [1]),
        (guard(below=2.0), [-math.inf], [1]),
    ],
)
def test_a_guard_acts_when_the_metric_is_beyond_its_bound_for_long_enough(
    one: GuardConfig, values: list[float], expected: list[int]
) -> None:
    assert steps(one, values) == expected


def test_a_warning_is_given_once_while_it_lasts_and_again_when_it_comes_back() -> None:
    assert steps(guard(above=2.0, updates=2), [3, 3, 3, 3, 1, 3, 3]) == [2, 7]


def test_what_was_not_measured_leaves_the_guard_as_it_was() -> None:
    assert steps(guard(above=2.0, updates=2), [3, None, math.nan, 3]) == [4]
    state, _ = judge({"g": guard(above=2.0)}, GuardState(), {"step": 1})
    assert state == GuardState()


def test_a_relative_bound_is_silent_until_the_mean_is_known_and_then_a_multiple_of_it() -> None:
    one = guard(above=3.0, relative_to_updates=2)
    assert steps(one, [1, 100]) == []
    # means: 1, 2, then 2 + (6 - 2) / 2 = 4; 12 is not above 3 * 4, 12.1 is
    assert steps(one, [1, 3, 6, 12]) == []
    _, found = play(one, [1, 3, 6, 12.1])
    assert [(f.step, f.value, f.bound) for f in found] == [(4, 12.1, 12.0)]
    assert "12.1, above 12 (3 times its running mean)" in found[0].reason


def test_what_is_out_of_bounds_does_not_move_the_mean_it_is_compared_with() -> None:
    state, found = play(guard(above=2.0, relative_to_updates=2, updates=100), [1, 1, *[5.0] * 50])
    assert not found and state.watches["g"].mean == 1.0 and state.watches["g"].streak == 50


def test_a_relative_bound_on_a_mean_that_is_not_positive_is_silent() -> None:
    assert steps(guard(above=2.0, relative_to_updates=2), [-1, -1, 50]) == []


def test_a_lowered_rate_multiplies_and_the_guard_then_waits_as_long_again() -> None:
    one = guard(above=2.0, updates=2, action="lower_rate", rate_factor=0.5, at_most=2)
    state, found = play(one, [3] * 4)
    assert [(f.step, f.action) for f in found] == [(2, "lower_rate"), (4, "lower_rate")]
    assert state.rate_scale == 0.25


@pytest.mark.parametrize("action", ["lower_rate", "roll_back"])
def test_a_guard_that_would_act_too_often_stops_the_campaign_and_says_so(action: Any) -> None:
    state, found = play(guard(above=2.0, action=action, at_most=2), [3] * 3)
    assert [f.action for f in found] == [action, action, "stop"]
    assert f"{action} was done 2 times before (guards.g.at_most)" in found[-1].reason
    assert state.rate_scale == 0.25


def test_a_finding_names_metric_value_bound_and_since_when() -> None:
    _, (found,) = play(guard(above=2.0, updates=3, action="stop"), [1, 3, 3, 3.5])
    assert (found.guard, found.metric, found.value, found.bound) == ("g", "entropy", 3.5, 2.0)
    assert (found.since, found.step, found.action) == (2, 4, "stop")
    assert found.reason == "entropy is 3.5, above 2, the 3rd update in a row"


def test_a_guard_that_is_turned_off_remembers_nothing() -> None:
    assert play(guard(above=2.0, action="none"), [3, 3]) == (GuardState(), [])


def test_after_a_roll_back_the_memory_is_that_of_then_but_what_was_done_stays_done() -> None:
    one = guard(above=3.0, relative_to_updates=2, action="roll_back", at_most=2)
    then, _ = play(one, [1, 1])
    now, found = play(one, [1, 1, 1.5, 9])
    back = now.rolled_back(then)
    assert found[0].since == 4 and now.watches["g"].mean == 1.25
    assert (back.watches["g"].mean, back.watches["g"].streak, back.watches["g"].acted) == (1.0, 0, 1)
    assert back.rate_scale == now.rate_scale == 0.5


histories = st.lists(st.one_of(st.none(), st.floats(-10, 10), st.just(math.inf), st.just(math.nan)), max_size=30)
guards = st.builds(
    lambda above, relative, updates, action, at_most: guard(
        above=above, relative_to_updates=relative, updates=updates, action=action, at_most=at_most
    ),
    st.floats(0.1, 5),
    st.one_of(st.none(), st.integers(2, 4)),
    st.integers(1, 4),
    st.sampled_from(["warn", "lower_rate", "roll_back", "stop"]),
    st.integers(1, 3),
)


@settings(deadline=None, max_examples=300)
@given(guards, histories, st.integers(0, 30))
def test_a_state_that_was_saved_and_read_back_at_any_update_judges_as_if_it_had_not_been(
    one: GuardConfig, history: list[Any], cut: int
) -> None:
    state, found, again, found_again = GuardState(), [], GuardState(), []
    for step, value in enumerate(history, 1):
        record = {"step": step, "entropy": value}
        state, findings = judge({"g": one}, state, record)
        found += findings
        if step == cut:
            again = GuardState.from_json(json.loads(json.dumps(again.to_json())))
        again, findings = judge({"g": one}, again, record)
        found_again += findings
    assert (state, found) == (again, found_again)


@settings(deadline=None, max_examples=300)
@given(guards, histories)
def test_an_absolute_guard_agrees_with_counting_runs_in_the_whole_history(one: GuardConfig, history: list[Any]) -> None:
    one = replace(one, relative_to_updates=None, action="warn")
    measured = [(step, v) for step, v in enumerate(history, 1) if v is not None and not math.isnan(v)]
    expected = []
    for i, (step, _) in enumerate(measured):
        run = 0
        while run <= i and measured[i - run][1] > one.above:
            run += 1
        if run == one.updates:
            expected.append(step)
    assert steps(one, history) == expected


METRICS = guardable("sampled", [], [])


def test_what_can_be_guarded_depends_on_what_the_teachers_send_and_who_they_are() -> None:
    sampled, full, named = (set(guardable(signal, [], [])) for signal in ("sampled", "full", "student_topk"))
    assert full - sampled == {"top1_agreement", "top8_overlap"}
    assert named - sampled == {"student_support_mass", "teacher_support_mass"}
    assert set(guardable("topk", [], [])) == full | named
    assert set(guardable("sampled", ["a"], ["b"])) - sampled == {
        *("teacher/a/token_share", "teacher/a/reverse_kl", "domain/b/token_share", "domain/b/reverse_kl"),
    }


def test_the_guards_that_every_campaign_has_are_in_order() -> None:
    check_guards(default_guards(), METRICS, 300)
    stopping = {"no_step_for_long", "no_token_for_long"}
    assert {name for name, one in default_guards().items() if one.action != "warn"} == stopping


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (guard(metric="entropi", above=1.0), "guards.g.metric: found entropi, expected a metric .*did you mean 'entropy'"),
        (guard(), r"guards.g.above: found null, expected a number, or one for guards.g.below"),
        (guard(above=math.nan), "guards.g.above: found nan, expected a finite number"),
        (guard(below=-math.inf), "guards.g.below: found -inf, expected a finite number"),
        (guard(above=-1.0, relative_to_updates=5), "guards.g.above: found -1.0, expected a number > 0: it is a multiple"),
        (guard(above=1.0, below=1.0), "guards.g.below: found 1.0, expected less than above=1"),
        (guard(above=1.0, action="roll_back", updates=301), "guards.g.updates: found 301, expected at most 300"),
    ],
)  # fmt: skip
def test_a_guard_that_cannot_work_is_refused(one: GuardConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_guards({"g": one}, METRICS, 300)


def test_a_guard_that_is_turned_off_may_be_anything() -> None:
    check_guards({"g": guard(metric="x", action="none")}, METRICS, 300)
