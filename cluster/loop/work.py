"""The types that pass between the stages of the loop, and how they become arguments of calls. Pure.

    issue -- Issued --> sample -- Sampled --> score -- Scored --> train

Arrays stay in Ray's object store. These types hold references to them, and the few numbers that the loop decides by.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.trajectory import EpisodeCounts, TrajectoryId
from cluster.fleet.ray_actor import PerRank
from learner.collate import minibatch_rows
from learner.student.sharding import owners


@dataclass(frozen=True, eq=False, slots=True)
class Issued:
    """Trajectories to be sampled, which travel to one rollout actor.

    Example: the two trajectories of the group with cursor 6 in epoch 0, whose prompt is number 40:
    Issued(numbers=[12, 13], ids=np.array([(0, 40, 0), (0, 40, 1)]), replica=None)
    """

    numbers: list[int]
    """[B] numbers in the ledger."""
    ids: np.ndarray
    """[B, 3] int64: epoch, prompt, sample."""
    replica: Any = None
    """The Replica that a whole group goes to, which has the prompt in its prefix cache; None: any."""
    update: int | None = None
    """The update that they are for, where a limit follows a schedule; None: none does."""

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, eq=False, slots=True)
class Sampled:
    """One trajectory that a rollout actor has sampled.

    Example: Sampled(number=13, id=TrajectoryId(0, 40, 1), trajectories=ObjectRef(...), turn=5, length=118,
    oldest_version=3, truncated=False): 118 tokens, the first one sampled with the weights of version 3.
    """

    number: int
    """Its number in the ledger."""
    id: TrajectoryId
    trajectories: Any
    """The reference of Trajectories that hold it, and perhaps others."""
    turn: int
    """Counts the answers of rollout actors; of a trajectory that was lost and sampled again the last turn is valid."""
    length: int
    """Response tokens."""
    oldest_version: int
    """The weight version of its oldest token."""
    truncated: bool
    """Whether the response ended at the length limit."""
    parts: dict[str, float] = field(default_factory=dict)
    """Named parts of its reward."""
    context: int = 0
    """Response tokens that the student did not write."""
    episode: EpisodeCounts | None = None
    """Its turns; None where no environment answers."""


@dataclass(frozen=True, eq=False, slots=True)
class Scored:
    """One trajectory that its teachers have scored.

    Example, with two teachers: Scored(sampled=Sampled(number=13, ...), scores=(ObjectRef(...), ObjectRef(...)), turn=2)
    """

    sampled: Sampled
    scores: tuple[Any, ...]
    """One reference for each of its teachers: of TeacherScores that hold it, and perhaps others."""
    turn: int
    """Counts the answers of teachers; of a trajectory that was scored again the last turn is valid."""


def ids_of(sampled: Iterable[Sampled]) -> np.ndarray:
    """[B, 3] int64: epoch, prompt, sample."""
    return np.array([one.id for one in sampled], np.int64).reshape(-1, 3)


def trajectories_of(sampled: Iterable[Sampled]) -> list[Any]:
    """The references that hold these trajectories, each once, in the order in which they were sampled.

    The order matters: a trajectory that was lost and sampled again may be in two objects, and the older object may still
    be needed for another trajectory. Readers take the last.
    """
    in_order = sorted(sampled, key=lambda one: one.turn)
    return each_once(one.trajectories for one in in_order)


def scores_by_rank(
    scored: Sequence[Scored], costs_B: np.ndarray, minibatches: int, ranks: int, sequence_parallel: int = 1
) -> PerRank:
    """The references of each rank's scores: of the trajectories that it trains on, as the learner divides them.

    `sequence_parallel` consecutive ranks train on the same trajectories, and get the same references.

    scored: the B trajectories of an update. costs_B: [B] tokens of prompt and response, by which the learner balances
    its ranks. minibatches: optimiser steps of one epoch. Each rank's references are in the order of scoring, for the
    same reason as in `trajectories_of`, and each is there once: one object may hold a whole batch.
    """
    # The same function with the same arguments as in the learner: each rank finds the scores that it expects.
    groups = ranks // sequence_parallel
    owner = owners(costs_B, minibatch_rows(len(scored), minibatches), groups).tolist()
    found: list[list[Any]] = [[] for _ in range(groups)]
    for one, group in sorted(zip(scored, owner, strict=True), key=lambda pair: pair[0].turn):
        found[group] += one.scores
    return PerRank([each_once(found[rank // sequence_parallel]) for rank in range(ranks)])


def split_evenly(count: int, parts: int) -> list[range]:
    """0 ... count-1 in at most `parts` consecutive ranges, none empty, sizes within one of each other."""
    parts = max(1, min(parts, count))
    edges = [count * i // parts for i in range(parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(edges)]


def each_once(things: Iterable[Any]) -> list[Any]:
    """The distinct things, in the order of their first appearance."""
    return list(dict.fromkeys(things))
