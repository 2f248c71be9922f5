"""What teachers send of each trajectory by itself, on its way to the rank of the learner that trains on it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.teacher.base import TeacherCounts
from actors.trajectory import RolloutCounts, TrajectoryId
from cluster.fleet.ray_actor import PerRank
from cluster.loop.teachers import PromptRoutes, Teachers
from cluster.loop.work import Sampled, Scored, ids_of, scores_by_rank, trajectories_of
from learner.collate import minibatch_rows
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


class EachTeacher(FakeTeacher):
    async def call(
        self, method: str, ids: np.ndarray, *trajectories: Reference, returns: int, units: int, **_: Any
    ) -> tuple[TeacherCounts, *tuple[Reference, ...]]:  # type: ignore[override]
        assert (method, returns) == ("score_each", 1 + len(ids))
        counts, _ = await super().call("score", ids, *trajectories, returns=2, units=units)
        names = [TrajectoryId(*row) for row in ids.tolist()]
        return counts, *(EachReference(("scores", {name: None}), self.name, name) for name in names)


class EachReference(Reference):
    """What one teacher says of one trajectory."""

    def __init__(self, value: Any, teacher: str, name: TrajectoryId):
        super().__init__(value)
        self.teacher, self.name = teacher, name


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
            expected = {(who, name) for name, its in zip(names, owner, strict=True) if its == rank for who in "ab"}
            found = [(reference.teacher, reference.name) for reference in own.arguments[rank]]
            assert len(found) == len(expected) and set(found) == expected
        return await super().call(
            method, *common, *(reference for given in own.arguments for reference in given), **how
        )


@pytest.mark.parametrize(("bound", "samples"), [(0, 1), (2, 1), (2, 3)])
def test_each_rank_is_given_all_that_teachers_said_of_its_trajectories_alone(
    tmp_path: Path, bound: int, samples: int
) -> None:
    config, world = configuration(tmp_path, updates=12, bound=bound, samples=samples), World(bound=bound, delay=0.01)
    config.learner.replicas, config.learner.minibatches_per_update = RANKS, STEPS
    world.losing = {"score": 0.2, "update": 0.3}
    made = campaign(config, world, rollout=UnevenRollout(world, 2), prompt_lengths=PROMPTS)
    fleets: Any = {name: EachTeacher(world, 2) for name in "ab"}
    for name, fleet in fleets.items():
        fleet.name = name
    shares = {"a": np.log(0.5), "b": np.log(0.5)}
    made.teachers = Teachers(fleets, PromptRoutes([shares] * len(PROMPTS), {}), each=True)
    made.learner = LearnerOfRanks(world, 1)  # type: ignore[assignment]
    assert run(made)
    trained = [row for update in world.trained for row in update]
    assert len(trained) == len(set(trained)) == 12 * SIZE


LENGTHS = np.array([5, 1, 4, 2])


def sampled(number: int, reference: str = "trajectories", turn: int = 0) -> Sampled:
    return Sampled(number, TrajectoryId(0, number, 0), reference, turn, int(LENGTHS[number]), 0, False)


def scored(number: int, *references: str, turn: int = 0) -> Scored:
    return Scored(sampled(number), references, turn)


def test_a_rank_is_given_the_scores_of_its_own_trajectories_alone() -> None:
    update = [scored(number, f"a {number}", f"b {number}") for number in (0, 2, 3)]
    assert scores_by_rank(update, LENGTHS[[0, 2, 3]], 1, 2).arguments == [
        ["a 0", "b 0"],
        ["a 2", "b 2", "a 3", "b 3"],
    ]


def test_one_object_of_the_scores_of_several_trajectories_is_given_once() -> None:
    update = [scored(number, "a", "b") for number in range(4)]
    assert scores_by_rank(update, LENGTHS, 1, 1).arguments == [["a", "b"]]


def test_scores_of_a_trajectory_that_was_lost_and_sampled_again_are_the_last() -> None:
    waiting = scored(1, "both, as they were", turn=3)  # scored together with 0, which was lost
    again = scored(0, "the one, as it is now", turn=4)
    for update in ([again, waiting], [waiting, again]):
        found = scores_by_rank(update, LENGTHS[[0, 1]], 1, 1).arguments
        assert found == [["both, as they were", "the one, as it is now"]]


def test_a_trajectory_that_was_lost_and_sampled_again_is_the_last() -> None:
    waiting = sampled(1, "both, as they were", turn=1)  # sampled together with 0, which was lost
    again = sampled(0, "the one, as it is now", turn=2)
    for batch in ([again, waiting], [waiting, again]):
        assert trajectories_of(batch) == ["both, as they were", "the one, as it is now"]
        assert [tuple(row) for row in ids_of(batch).tolist()] == [one.id for one in batch]
