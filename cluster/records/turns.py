"""Who wrote which part of a response of several turns: of a sample trajectory, for those who show it. Standard library only."""

from bisect import bisect
from collections.abc import Sequence
from itertools import count, groupby
from typing import NamedTuple


class Turn(NamedTuple):
    """Tokens side by side that one wrote."""

    by: str
    """`turn 1`, `turn 2`, … of the student; `others`, such as an environment or a tool; `conversation 2`, … where what they wrote
    begins another conversation."""
    student: bool
    """Whether the student wrote it."""
    begin: int
    end: int
    """The number of its first token, and one past the last."""


def turns_of(trained: Sequence[bool], begins: Sequence[int] = ()) -> list[Turn]:
    """The turns in their order. trained: for each token, whether the student wrote it. begins: the numbers of the tokens with which
    each conversation but the first begins."""
    numbers, before, found = count(1), 0, []
    for (student, conversation), run in groupby(
        range(len(trained)), lambda place: (trained[place], bisect(begins, place))
    ):
        places = list(run)
        others = "others" if conversation == before else f"conversation {conversation + 1}"
        found.append(Turn(f"turn {next(numbers)}" if student else others, student, places[0], places[-1] + 1))
        before = conversation
    return found
