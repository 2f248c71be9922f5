"""What passes between the stages of the loop: numbers, ids, counts, and references to the arrays. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.trajectory import TrajectoryId
from cluster.fleet.ray_actor import PerRank
from learner.batch import minibatch_rows
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
    scores: list[Any] = field(default_factory=list)
    """References of TeacherScores, likewise."""
    large: dict[TrajectoryId, list[Any]] = field(default_factory=dict)
    """Where the learner has several ranks: of each trajectory the references of LargeScores, one for each teacher that
    has scored it. Empty where scores are whole."""
    sampled_in: int = 0
    """The turn in which it was sampled: of an id that was sampled again, the last trajectory counts."""
    scored_in: int = 0
    """The turn in which it was scored, likewise."""
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

    @property
    def names(self) -> list[TrajectoryId]:
        """[B] the ids, by each of which there may be something in `large`."""
        return [TrajectoryId(*row) for row in self.ids.tolist()]

    def receive(self, scores: list[Any], large: dict[TrajectoryId, list[Any]], turn: int) -> None:
        """It has been scored, perhaps with others: references of TeacherScores, and of LargeScores where they are apart."""
        self.scores, self.scored_in = scores, turn
        self.large = {name: large[name] for name in self.names if large}


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
    """Single trajectories, each the row of a scored work that holds it and perhaps others, in this order.

    Scores are in the order in which they came: of a trajectory that was lost and sampled again, the old ones may lie in
    one object with those of another that was not, and the last ones count. So it is with trajectories.
    """
    works = sorted(_each_once(work for work, _ in rows), key=lambda work: work.scored_in)
    names = {work: work.names for work in works if work.large}
    return Work(
        numbers=[work.numbers[row] for work, row in rows],
        ids=np.array([work.ids[row] for work, row in rows], np.int64).reshape(-1, 3),
        trajectories=_trajectories(works),
        scores=_each_once(reference for work in works for reference in work.scores),
        large={names[work][row]: work.large[names[work][row]] for work, row in rows if work in names},
        lengths=np.array([work.lengths[row] for work, row in rows]),
        oldest_versions=np.array([work.oldest_versions[row] for work, row in rows]),
        truncated=np.array([work.truncated[row] for work, row in rows]),
    )


def singles(work: Work, replica: Any) -> list[Work]:
    """Each trajectory of a group by itself, all for the same actor."""
    return [Work([number], work.ids[row : row + 1], replica=replica) for row, number in enumerate(work.numbers)]


def shared_out(work: Work, costs_B: np.ndarray, minibatches: int, ranks: int) -> PerRank:
    """The large scores of a work, each for the rank that trains on the trajectory: as the learner shares them out.

    costs_B: tokens of prompt and response. minibatches: steps of one epoch.
    """
    owner = owners(costs_B, minibatch_rows(len(work), minibatches), ranks)
    found: list[list[Any]] = [[] for _ in range(ranks)]
    for name, rank in zip(work.names, owner.tolist(), strict=True):
        found[rank] += work.large[name]
    return PerRank(found)


def _trajectories(works: Iterable[Work]) -> list[Any]:
    """References, in the order in which they came."""
    in_order = sorted(works, key=lambda work: work.sampled_in)
    return _each_once(reference for work in in_order for reference in work.trajectories)


def _each_once(things: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(things))
