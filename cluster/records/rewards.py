"""How the rewards of an evaluation are told. Standard library only.

An answer is right if its reward is at least 1. The metric `accuracy` is the mean of the rewards. Where all rewards are 0 or 1, this
is the share of right answers. Other rewards are called graded: their mean is told as a mean reward, and the share of right answers
is another metric, `right`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

MEANS = ("accuracy", "accuracy_sampled", "accuracy_teacher", "majority")
"""Metrics of an evaluation that are means of rewards, without their prefix."""


class Told(NamedTuple):
    """How such a mean is told. Example: `f"{told.name} {value:{told.form}}"`."""

    name: str
    """`accuracy` or `mean reward`."""
    form: str
    """Format specification."""


SHARE, REWARD = Told("accuracy", ".1%"), Told("mean reward", ".4g")


def is_right(reward: float) -> bool:
    """Whether an answer with this reward is right."""
    return reward >= 1


def are_graded(rewards: Iterable[float]) -> bool:
    """Whether some are neither 0 nor 1, so that their mean is no share of right answers."""
    return any(reward not in (0, 1) for reward in rewards)


def is_graded(values: Mapping[str, Any], of: str = "eval/") -> bool:
    """Whether the rewards of an evaluation were graded. values: its metrics. of: what their keys begin with, such as `eval/<set>/`."""
    if any(values.get(f"{of}{key}") is not None for key in ("right", "right_teacher")):
        return True
    # An earlier release did not measure the share of right answers.
    means = [mean for key in MEANS if (mean := values.get(f"{of}{key}")) is not None]
    return any(math.isfinite(mean) and not 0 <= mean <= 1 for mean in means)


def told_as(graded: bool) -> Told:
    """How the means are told of an evaluation, or of several that are shown side by side: some of them may have no graded reward."""
    return REWARD if graded else SHARE
