"""Weight versions on their way from the learner to the rollout actors. References and counts, never a tensor.

The campaign process owns the objects (what the learner returns outlives it), holds the newest version, and drops the
one before. An actor that was replaced is given the newest before its first work.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from cluster.ray_fleet import Fleet


@dataclass
class Published:
    """One weight version, with what is to be recorded of the update that made it."""

    version: int
    manifest: Any
    """Reference."""
    buckets: list[Any]
    """References."""
    nbytes: int
    seconds: float
    record: dict[str, Any] = field(default_factory=dict)
    trained: int = 0
    """Trajectories whose slots it releases."""
    averages: dict[str, list[Any]] = field(default_factory=dict)
    """For teachers that follow the student: references, as in followers.py."""


class Versions:
    """Publishes the learner's weights and has the rollout actors load them."""

    def __init__(self, learner: Fleet, rollout: Fleet):
        self.newest: Published | None = None
        """The version that the rollout actors hold, or are about to."""
        self._learner, self._rollout = learner, rollout

    @property
    def version(self) -> int:
        """Of the newest."""
        assert self.newest is not None
        return self.newest.version

    async def publish(self) -> Published:
        """Has the learner lay out its weights; the campaign owns the buckets."""
        start = time.perf_counter()
        references = await self._learner.stream("publish")
        manifest = await references[-1]
        return Published(
            manifest.version, references[-1], references[:-1], manifest.nbytes, time.perf_counter() - start
        )

    async def load(self, published: Published) -> None:
        """Has every rollout actor load a version; from here on it is what new actors get."""
        start = time.perf_counter()
        self.newest = published
        await self._rollout.call_each("load_weights", published.manifest, *published.buckets)
        published.seconds += time.perf_counter() - start
        if published.record:
            published.record["publish_seconds"] = published.seconds

    async def give(self, handle: Any) -> None:
        """What a new actor gets before its first work: the newest version, also when that changes meanwhile."""
        given = None
        while given is not self.newest:
            given = self.newest
            assert given is not None
            await handle.load_weights.remote(given.manifest, *given.buckets)
