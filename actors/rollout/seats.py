"""How many responses an engine should write at a time: as many as its key-value cache holds at their usual length. Pure.

With more, vLLM takes a running response's blocks away for another one's (preemption), and later computes all of its keys and
values again.
"""

from collections import deque

WEIGHT = 32
"""Sequences that the expected length counts for among the measured ones."""
RECENT = 512
"""Sequences whose mean length is the usual one."""
WAITING = 9 / 8
"""The campaign has an eighth more at an actor than its seats, so that a free one is taken at once."""


class Seats:
    """The number of seats of one engine, which follows the lengths of its sequences."""

    def __init__(self, most: int, cache_tokens: int, block: int, expected: float):
        """most: the engine's own limit. cache_tokens: that its cache holds, in blocks of `block` tokens. expected: tokens of
        a sequence, prompt and response, before any has ended."""
        self._most, self._cache, self._block, self._expected = most, cache_tokens, block, expected
        self._recent: deque[int] = deque(maxlen=RECENT)
        self._sum = 0

    def ended(self, tokens: int) -> None:
        """A sequence has ended with so many tokens, its prompt included."""
        if len(self._recent) == RECENT:
            self._sum -= self._recent[0]
        held = -(-tokens // self._block) * self._block
        self._recent.append(held)
        self._sum += held

    @property
    def number(self) -> int:
        """Seats now: at least 1, at most the engine's own limit."""
        usual = (WEIGHT * self._expected + self._sum) / (WEIGHT + len(self._recent))
        return max(1, min(self._most, int(self._cache / (usual * WAITING))))
