"""What passes between the stages of the loop: numbers, ids, counts, and references to the arrays. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.trajectory import TrajectoryId
from cluster.fleet.ray_actor import PerRank
from learner.collate import minibatch_rows
from learner.student.sharding import owners


@dataclass(eq=False)
class Work:
    """Trajectories that travel together; arrays are references."""

    numbers: list[int]
    """[B] numbers in the ledger."""
    ids: np.ndarray
    """[B, 3] epoch, prompt, sample."""
    trajectories: list[Any] = field(default_factory=list)
    """References of Trajectories that hold these ids, and perhaps others."""
    scores: list[tuple[Any, ...]] = field(default_factory=list)
    """[B] of each trajectory the references of TeacherScores that hold it, one for each of its teachers."""
    sampled_in: int = 0
    """The turn in which it was sampled: of an id that was sampled again, the last trajectory counts."""
    scored_in: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[B] the turn in which each was scored: of an id that was scored again, the last scores count."""
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[B] response tokens."""
    oldest_versions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """[B] version of each one's oldest token."""
    truncated: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """[B] whether it was cut at the length limit."""
    replica: Any = None
    """Where a group is sampled, so that its trajectories share the cached prefix."""
    parts: "Sequence[Work]" = ()
    """The works that this one was merged of."""

    def __len__(self) -> int:
        return len(self.numbers)

    def receive(self, scores: Mapping[TrajectoryId, tuple[Any, ...]], turn: int) -> None:
        """Teachers have answered. scores: id -> the references of its scores, perhaps with ids of other works."""
        self.scores = [scores[TrajectoryId(*row)] for row in self.ids.tolist()]
        self.scored_in = np.full(len(self), turn)


def merge(works: Sequence[Work]) -> Work:
    """One work of all, in the order of the ledger: what is computed from it does not depend on who was faster."""
    numbers = np.concatenate([work.numbers for work in works])
    order = np.argsort(numbers, kind="stable")
    return Work(
        numbers=numbers[order].tolist(),
        ids=np.concatenate([work.ids for work in works])[order],
        trajectories=_trajectories(works),
        lengths=np.concatenate([work.lengths for work in works])[order],
        parts=works,
    )


def gather(rows: Sequence[tuple[Work, int]]) -> Work:
    """Single trajectories, each the row of a scored work that holds it and perhaps others, in this order."""
    return Work(
        numbers=[work.numbers[row] for work, row in rows],
        ids=np.array([work.ids[row] for work, row in rows], np.int64).reshape(-1, 3),
        trajectories=_trajectories(each_once(work for work, _ in rows)),
        scores=[work.scores[row] for work, row in rows],
        scored_in=np.array([work.scored_in[row] for work, row in rows]),
        lengths=np.array([work.lengths[row] for work, row in rows]),
        oldest_versions=np.array([work.oldest_versions[row] for work, row in rows]),
        truncated=np.array([work.truncated[row] for work, row in rows]),
    )


def singles(work: Work, replica: Any) -> list[Work]:
    """Each trajectory of a group by itself, all for the same actor."""
    return [Work([number], work.ids[row : row + 1], replica=replica) for row, number in enumerate(work.numbers)]


def scores_by_rank(work: Work, costs_B: np.ndarray, minibatches: int, ranks: int) -> PerRank:
    """The references of each rank's scores: those of the trajectories that it trains on, as the learner divides them.

    costs_B: tokens of prompt and response. minibatches: optimiser steps of one epoch.
    In the order of scoring: where a trajectory was lost and sampled again, its old scores may lie in one object with
    those of another trajectory, and the learner takes the last ones.
    """
    owner = owners(costs_B, minibatch_rows(len(work), minibatches), ranks)
    found: list[list[Any]] = [[] for _ in range(ranks)]
    for row in np.argsort(work.scored_in, kind="stable"):
        found[owner[row]] += work.scores[row]
    return PerRank([each_once(references) for references in found])


def _trajectories(works: Iterable[Work]) -> list[Any]:
    """References, in the order in which they came."""
    in_order = sorted(works, key=lambda work: work.sampled_in)
    return each_once(reference for work in in_order for reference in work.trajectories)


def each_once(things: Iterable[Any]) -> list[Any]:
    """The different ones, in the order of their first appearance."""
    return list(dict.fromkeys(things))
