"""What teachers send of each trajectory by itself, on its way to the rank of the learner that trains on it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.teacher.base import TeacherCounts
from actors.trajectory import RolloutCounts, TrajectoryId
from cluster.fleet.ray_actor import PerRank
from cluster.loop.teachers import Lessons, Teachers
from cluster.loop.work import Work, gather, merge, shared_out
from learner.batch import minibatch_rows
from learner.student.sharding import owners
from tests.unit.cluster.test_campaign import (
    SIZE,
    FakeLearner,
    FakeRollout,
    FakeTeacher,
    Reference,
    World,
    campaign,
    configuration,
    run,
)

RANKS, STEPS = 3, 2
PROMPTS = np.array([1, 9, 2, 7, 1, 30, 4, 4, 2, 8, 3])
"""Tokens of each prompt."""


def response_length(name: TrajectoryId) -> int:
    return 1 + (7 * name.prompt + 5 * name.sample + name.epoch) % 13


class UnevenRollout(FakeRollout):
    async def ask(self, requests: Any, **how: Any) -> Any:
        counts, reference = await super().ask(requests, **how)
        lengths = np.array([response_length(TrajectoryId(*row)) for row in requests.ids.tolist()])
        return RolloutCounts(lengths, *counts[1:]), reference


class ApartTeacher(FakeTeacher):
    async def call(
        self, method: str, ids: np.ndarray, *trajectories: Reference, returns: int, units: int, **_: Any
    ) -> tuple[TeacherCounts, Reference, *tuple[Reference, ...]]:  # type: ignore[override]
        assert (method, returns) == ("score_apart", 2 + len(ids))
        counts, scores = await super().call("score", ids, *trajectories, returns=2, units=units)
        return counts, scores, *(Reference((self.name, TrajectoryId(*row))) for row in ids.tolist())


class LearnerOfRanks(FakeLearner):
    async def call(self, method: str, *arguments: Any, **how: Any) -> Any:
        if method != "update":
            return await super().call(method, *arguments, **how)
        *common, own = arguments
        names = [TrajectoryId(*row) for row in arguments[0].tolist()]
        costs = np.array([PROMPTS[name.prompt] + response_length(name) for name in names])
        owner = owners(costs, minibatch_rows(len(names), STEPS), RANKS)
        assert isinstance(own, PerRank)
        for rank in range(RANKS):
            expected = [(who, name) for name, its in zip(names, owner, strict=True) if its == rank for who in "ab"]
            assert [reference.value for reference in own.arguments[rank]] == expected
        return await super().call(method, *common, **how)


@pytest.mark.parametrize(("bound", "samples"), [(0, 1), (2, 1), (2, 3)])
def test_each_rank_is_given_all_that_teachers_said_of_its_trajectories_alone(
    tmp_path: Path, bound: int, samples: int
) -> None:
    config, world = configuration(tmp_path, updates=12, bound=bound, samples=samples), World(bound=bound, delay=0.01)
    config.learner.replicas, config.learner.minibatches_per_update = RANKS, STEPS
    world.losing = {"score": 0.2, "update": 0.3}
    made = campaign(config, world, rollout=UnevenRollout(world, 2), prompt_lengths=PROMPTS)
    fleets: Any = {name: ApartTeacher(world, 2) for name in "ab"}
    for name, fleet in fleets.items():
        fleet.name = name
    shares = {"a": np.log(0.5), "b": np.log(0.5)}
    made.teachers = Teachers(fleets, Lessons([shares] * len(PROMPTS), {}), apart=True)
    made.learner = LearnerOfRanks(world, 1)  # type: ignore[assignment]
    assert run(made)
    trained = [row for update in world.trained for row in update]
    assert len(trained) == len(set(trained)) == 12 * SIZE


def test_scores_are_apart_where_there_are_several_ranks_and_more_than_one_number_a_token(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    assert not config.scores_apart
    config.learner.replicas = 2
    assert not config.scores_apart  # one number a token
    config.teachers["default"].signal = "topk"
    assert config.scores_apart
    config.learner.replicas = 1
    assert not config.scores_apart


def test_an_update_holds_what_is_large_of_its_own_trajectories_alone() -> None:
    names = [TrajectoryId(0, prompt, 0) for prompt in range(4)]
    scored = Work([0, 1, 2, 3], np.array(names))
    scored.receive(["scores"], {name: [f"large {name}"] for name in (*names, TrajectoryId(0, 9, 0))}, 0)
    assert list(scored.large) == names  # of those that were scored with them nothing is kept
    scored.lengths = scored.oldest_versions = scored.truncated = np.array([5, 1, 4, 2])
    update = gather([(scored, 0), (scored, 2), (scored, 3)])
    assert update.large == {name: [f"large {name}"] for name in (names[0], names[2], names[3])}
    assert shared_out(update, update.lengths, 1, 2).arguments == [
        [f"large {names[0]}"],
        [f"large {names[2]}", f"large {names[3]}"],
    ]
    del update.large[names[2]]
    with pytest.raises(KeyError, match="prompt=2"):
        shared_out(update, update.lengths, 1, 2)


def test_scores_of_a_trajectory_that_was_lost_and_sampled_again_are_the_last() -> None:
    lost, waiting, again = (Work([number], np.array([(0, number, 0)])) for number in (0, 1, 0))
    for work in (lost, waiting, again):
        work.lengths = work.oldest_versions = work.truncated = np.array([1])
    for work in (lost, waiting):  # scored together
        work.receive(["both, as they were"], {}, 3)
    again.receive(["the one, as it is now"], {}, 4)
    for rows in ([(again, 0), (waiting, 0)], [(waiting, 0), (again, 0)]):
        update = gather(rows)
        assert update.scores == ["both, as they were", "the one, as it is now"]
        assert update.numbers == [work.numbers[0] for work, _ in rows]


def test_a_trajectory_that_was_lost_and_sampled_again_is_the_last() -> None:
    lost, waiting, again = (Work([number], np.array([(0, number, 0)])) for number in (0, 1, 0))
    for turn, work in enumerate((lost, waiting, again)):
        work.lengths = work.oldest_versions = work.truncated = np.array([1])
        work.trajectories, work.sampled_in = ["both, as they were" if turn < 2 else "the one, as it is now"], turn
    again.receive(["scores"], {}, 3)
    waiting.receive(["scores"], {}, 4)  # of what was written together one was lost, and the other scored late
    for rows in ([(again, 0), (waiting, 0)], [(waiting, 0), (again, 0)]):
        assert gather(rows).trajectories == ["both, as they were", "the one, as it is now"]
        assert merge([work for work, _ in rows]).trajectories == ["both, as they were", "the one, as it is now"]
