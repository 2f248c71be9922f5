"""How long it is waited for more of what comes together: a small share of the time that a request to a rollout actor, or a turn, takes."""

SHARE, LONGEST_SECONDS = 1 / 16, 1.0
"""Of that time. No seat of a rollout actor stays free for it: an eighth of them more requests wait there (loop/queues.py)."""
OLD_SHARE = 0.95
"""The weight of the mean so far when a request is answered."""


class Pause:
    """A share of the mean time of a request; 0 before the first answer."""

    def __init__(self, share: float = SHARE, longest: float = LONGEST_SECONDS) -> None:
        self._share, self._longest = share, longest
        self._mean: float | None = None

    def answered(self, seconds: float) -> None:
        """A request has taken so long."""
        before = seconds if self._mean is None else self._mean
        self._mean = OLD_SHARE * before + (1 - OLD_SHARE) * seconds

    @property
    def seconds(self) -> float:
        """How long to wait."""
        return min(self._share * (self._mean or 0.0), self._longest)
