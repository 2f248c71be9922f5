"""The seconds of all states add up to the wall clock, whatever the order of calls; the trace says the same."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from actors.trajectory import LoadSeconds, RolloutCounts
from cluster.records.utilisation import STATES, Utilisation, _joined, add_up, by_role, mean_actors


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def states(**seconds: float) -> dict[str, float]:
    return {**dict.fromkeys(STATES, 0.0), **seconds}


def test_an_actor_is_busy_while_any_call_is_under_way(clock: Clock) -> None:
    found = Utilisation({"rollout-0": "rollout"}, clock)
    clock.now += 1
    found.began("rollout-0", "rollout", "generate")
    clock.now += 2
    found.began("rollout-0", "rollout", "generate")
    clock.now += 4
    found.ended("rollout-0", "rollout", "generate")
    clock.now += 8
    found.ended("rollout-0", "rollout", "generate")
    clock.now += 16
    assert found.seconds() == {"rollout-0": states(busy=14, waiting=17)}


def test_idle_seconds_are_blocked_while_the_role_is(clock: Clock) -> None:
    found = Utilisation({"rollout-0": "rollout", "rollout-1": "rollout", "learner-0": "learner"}, clock)
    found.began("rollout-1", "rollout", "generate")
    clock.now += 1
    found.blocked("rollout", True)
    clock.now += 2
    found.blocked("rollout", True)
    found.ended("rollout-1", "rollout", "generate")
    clock.now += 4
    found.blocked("rollout", False)
    clock.now += 8
    assert found.seconds() == {
        "rollout-0": states(blocked=6, waiting=9),
        "rollout-1": states(busy=3, blocked=4, waiting=8),
        "learner-0": states(waiting=15),
    }


def test_loading_is_what_the_engine_stood_still(clock: Clock) -> None:
    found = Utilisation({"rollout-0": "rollout", "learner-0": "learner"}, clock)
    found.began("rollout-0", "rollout", "generate")
    found.began("learner-0", "learner", "publish")
    clock.now += 4
    found.began("rollout-0", "rollout", "load_weights")
    clock.now += 6
    found.ended("rollout-0", "rollout", "load_weights", LoadSeconds(2.0, 1.5))
    found.ended("learner-0", "learner", "publish")
    clock.now += 2
    assert found.seconds() == {"rollout-0": states(busy=10.5, loading=1.5), "learner-0": states(loading=10, waiting=2)}


def counts(waited: float) -> tuple[RolloutCounts, None]:
    """The answer of `generate`, as the campaign gets it."""
    return RolloutCounts(np.ones(1), np.ones(1), np.ones(1, bool), 0.1, waited_seconds=waited), None


def test_what_an_engine_waited_for_environments_is_not_busy(clock: Clock) -> None:
    found = Utilisation({"rollout-0": "rollout"}, clock)
    found.began("rollout-0", "rollout", "generate")
    found.began("rollout-0", "rollout", "generate")
    clock.now += 4
    found.ended("rollout-0", "rollout", "generate", counts(3.0))  # while another call goes on
    clock.now += 2
    found.ended("rollout-0", "rollout", "generate", counts(0.5))
    clock.now += 1
    assert found.seconds() == {"rollout-0": states(busy=2.5, environment=3.5, waiting=1)}
    found.ended("rollout-0", "rollout", "generate", counts(100.0))  # more than there can be: the states still add up
    assert found.seconds() == {"rollout-0": states(environment=6, waiting=1)}


def test_a_dead_actor_is_away_until_its_place_is_taken(clock: Clock) -> None:
    found = Utilisation({"rollout-0": "rollout"}, clock)
    found.began("rollout-0", "rollout", "generate")
    clock.now += 1
    found.began("rollout-0", "rollout", "away")
    found.ended("rollout-0", "rollout", "generate")
    clock.now += 5
    found.ended("rollout-0", "rollout", "away")
    clock.now += 1
    assert found.seconds() == {"rollout-0": states(busy=1, away=5, waiting=1)}


@pytest.mark.parametrize("seed", range(20))
def test_the_states_of_every_actor_add_up_to_the_wall_clock(clock: Clock, seed: int, tmp_path: Path) -> None:
    draw, start = random.Random(seed), clock.now
    actors = {f"{role}-{i}": role for role in ("rollout", "teacher.a", "learner") for i in range(2)}
    found, born = Utilisation(actors, clock), dict.fromkeys(actors, start)
    under_way: list[tuple[str, str]] = []
    for _ in range(300):
        clock.now += draw.choice([0.0, draw.random()])
        if draw.random() < 0.02:
            name = f"rollout-{len(actors)}"
            actors[name], born[name] = "rollout", clock.now
            found.began(name, "rollout", "status")
            found.began(name, "rollout", "generate")
            under_way.append((name, "generate"))
        name = draw.choice(list(actors))
        if draw.random() < 0.2:
            found.blocked(actors[name], draw.random() < 0.5)
        elif under_way and draw.random() < 0.5:
            name, method = under_way.pop(draw.randrange(len(under_way)))
            answers = {"load_weights": LoadSeconds(1.0, draw.random()), "generate": counts(draw.random() / 4)}
            found.ended(name, actors[name], method, answers.get(method))
        else:
            method = draw.choice(["generate", "update", "publish", "load_weights", "status", "away"])
            under_way.append((name, method))
            found.began(name, actors[name], method)
    seconds = found.seconds()
    for name in actors:
        assert sum(seconds[name].values()) == pytest.approx(clock.now - born[name], abs=1e-9), name
        assert min(seconds[name].values()) >= 0
    found.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert sorted(names.values()) == sorted(actors)
    for tid, name in names.items():
        traced = sum(event["dur"] for event in events if event["ph"] == "X" and event["tid"] == tid)
        told = sum(seconds[name][state] for state in ("busy", "loading", "environment", "away"))
        assert traced / 1e6 == pytest.approx(told, abs=1e-3), name


def test_a_long_trace_is_told_in_fewer_slices_and_loses_no_actor(clock: Clock, tmp_path: Path) -> None:
    found = Utilisation({"rollout-0": "rollout", "rollout-1": "rollout"}, clock)
    for turn in range(100_000):
        name = f"rollout-{turn % 2}"
        found.began(name, "rollout", "generate")
        clock.now += 1e-3
        found.ended(name, "rollout", "generate")
        found.queues({"train": turn})
    found.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert len(events) < 50_000 and {event["tid"] for event in slices} == {1, 2}
    for tid in (1, 2):
        own = [event for event in slices if event["tid"] == tid]
        assert own[0]["ts"] < 2000 and own[-1]["ts"] + own[-1]["dur"] == pytest.approx(1e8, abs=2000)
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in itertools.pairwise(own))


def test_runs_of_one_campaign_are_added_up_and_roles_are_means() -> None:
    first = {"teacher.a-0": states(busy=1, waiting=3), "rollout-0": states(busy=2, loading=2)}
    second = {"teacher.a-0": states(busy=1, waiting=1), "teacher.b-0": states(busy=2)}
    total = add_up(first, second)
    assert total["teacher.a-0"] == states(busy=2, waiting=4)
    assert by_role(total) == {"teacher": states(busy=2, waiting=2), "rollout": states(busy=2, loading=2)}
    assert first["teacher.a-0"]["busy"] == 1, "the parts stay as they were"


def test_actors_that_come_late_or_are_away_count_for_the_time_that_they_are_there() -> None:
    seconds = {
        "rollout-0": states(busy=6, waiting=4),
        "rollout-1": states(busy=1, blocked=1, away=3),
        "teacher.a-0": states(loading=1, waiting=9),
        "teacher.b-0": states(waiting=5),
    }
    assert mean_actors(seconds, 10.0) == {"rollout": 1.2, "teacher": 1.5}
    assert mean_actors(seconds, 0.0) == {}


def test_a_trace_whose_slices_alternate_stays_small_too(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learner updates and publishes by turns: no two neighbouring slices are of one method."""
    monkeypatch.setattr("cluster.records.utilisation.MAX_SLICES", 64)
    found = Utilisation({"learner-0": "learner", "rollout-0": "rollout"}, clock)
    for number in range(1000):
        for method, seconds in (("update", 3.0), ("publish", 1.0)):
            found.began("learner-0", "learner", method)
            found.began("rollout-0", "rollout", ("generate", "publish")[number % 2])
            clock.now += seconds
            found.ended("rollout-0", "rollout", ("generate", "publish")[number % 2])
            found.ended("learner-0", "learner", method)
    assert len(found._slices) <= 64
    found.write_trace(tmp_path / "trace.json")
    slices = [one for one in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if one["ph"] == "X"]
    learner = [one for one in slices if one["tid"] == 1]
    assert {one["name"] for one in learner} >= {"update"}, "the longer of two names both"
    for tid in (1, 2):
        own = sorted((one["ts"], one["ts"] + one["dur"]) for one in slices if one["tid"] == tid)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(own))
        assert own[0][0] == 0 and own[-1][1] == 4000e6 and sum(end - start for start, end in own) == 4000e6
    assert found.seconds()["learner-0"]["busy"] == 3000 and found.seconds()["learner-0"]["loading"] == 1000


@pytest.mark.parametrize(
    ("slices", "joined"),
    [
        ([("update", 0, 3), ("publish", 3, 3.5)], [("update", 0, 3.5)]),
        ([("publish", 0, 0.5), ("update", 0.5, 3)], [("update", 0, 3)]),
        ([("update", 0, 3), ("publish", 3, 5)], [("update", 0, 3), ("publish", 3, 5)]),  # both are long
        ([("update", 0, 3), ("update", 3.5, 5)], [("update", 0, 5)]),
        ([("update", 0, 3), ("update", 4, 5)], [("update", 0, 3), ("update", 4, 5)]),  # too far apart
        ([("update", 0, 3), ("publish", 4, 4.5)], [("update", 0, 3), ("publish", 4, 4.5)]),
    ],
)
def test_a_short_slice_is_part_of_its_longer_neighbour(slices: list, joined: list) -> None:
    assert _joined([("learner-0", *one) for one in slices], 1.0) == [("learner-0", *one) for one in joined]
