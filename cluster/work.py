"""What passes between the stages of the loop: numbers, ids, counts, and references to the arrays. Pure."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass
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
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[B] response tokens."""
    oldest_versions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """[B] version of each one's oldest token."""
    truncated: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """[B] whether it was cut at the length limit."""

    def __len__(self) -> int:
        return len(self.numbers)


def merge(works: list[Work]) -> Work:
    """One work of all, in the order of the ledger: what is computed from it does not depend on who was faster."""
    numbers = np.concatenate([work.numbers for work in works])
    order = np.argsort(numbers, kind="stable")
    return Work(
        numbers=numbers[order].tolist(),
        ids=np.concatenate([work.ids for work in works])[order],
        # A reference may be shared by several works; each is passed on once.
        trajectories=list(dict.fromkeys(reference for work in works for reference in work.trajectories)),
        scores=list(dict.fromkeys(reference for work in works for reference in work.scores)),
        lengths=np.concatenate([work.lengths for work in works])[order],
        oldest_versions=np.concatenate([work.oldest_versions for work in works])[order],
        truncated=np.concatenate([work.truncated for work in works])[order],
    )


def rows_of(work: Work, start: int, stop: int) -> Work:
    """Some consecutive trajectories of a work; it refers to the same arrays."""
    rows = slice(start, stop)
    return replace(
        work,
        numbers=work.numbers[rows],
        ids=work.ids[rows],
        lengths=work.lengths[rows],
        oldest_versions=work.oldest_versions[rows],
        truncated=work.truncated[rows],
    )
