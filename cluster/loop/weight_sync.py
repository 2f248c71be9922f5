"""Weight versions on their way from the learner to the rollout actors. References and counts, never a tensor.

The campaign process owns the objects (what the learner returns outlives it) and holds what a new actor needs: the last
whole version, its *anchor*, and the deltas that came after it. Everything older is let go of, and Ray frees it.

    learner    each rank: bucket 0, bucket 1, ... manifest      each bucket travels while the next is filled
    node       one pull of each bucket, however many rollout actors it has
    actor      verify, decode a delta onto what it holds; then the engine stands still and is given the whole version
"""

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.errors import LearnerLostError, LostObjectError
from cluster.config import WeightsConfig
from cluster.fleet.ray_actor import fetched
from cluster.fleet.ray_fleet import Fleet

WITH_THE_LEARNER = "its weights are gone with its node"


@dataclass(eq=False)
class Published:
    """One weight version, with what is to be recorded of the update that made it."""

    version: int
    references: list[Any]
    """Of each rank of the learner its buckets, and then their manifest: a WeightVersion, or a DeltaVersion."""
    nbytes: int
    """Of the buckets."""
    seconds: float
    delta: bool = False
    record: dict[str, Any] = field(default_factory=dict)
    trained: int = 0
    """Trajectories whose slots it releases."""
    averages: dict[str, list[Any]] = field(default_factory=dict)
    """For teachers that follow the student: references, as in followers.py."""


class WeightTransport(Protocol):
    """How weights get from the learner into every engine. Another one, from GPU to GPU, would be chosen by
    `weights.transport`; whatever it does, an engine holds one version or the next, never a mixture."""

    newest: Published | None
    """The version that the rollout actors hold, or are about to."""

    @property
    def version(self) -> int:
        """Of the newest."""

    async def publish(self) -> Published:
        """Takes the learner's weights as they are now; nothing that the learner does afterwards changes them."""

    async def load(self, published: Published) -> None:
        """Has every rollout actor load a version; from here on it is what new actors get."""

    async def give(self, handle: Any) -> None:
        """What a new actor gets before its first work: the newest version, also when that changes meanwhile."""


class Versions:
    """The transport `object_store`: buckets in Ray's object store, whole or as what changed."""

    def __init__(self, learner: Fleet, rollout: Fleet, config: WeightsConfig):
        self.newest: Published | None = None
        self._learner, self._rollout, self._config = learner, rollout, config
        self._chain: list[Published] = []
        """The last whole version and the deltas after it, to the newest."""

    @property
    def version(self) -> int:
        """As WeightTransport."""
        assert self.newest is not None
        return self.newest.version

    async def publish(self) -> Published:
        """As WeightTransport. The learner's buckets start to travel while it fills the next."""
        start = time.perf_counter()
        anchored = 0 < len(self._chain) < self._config.anchor_every
        delta = self._config.encoding == "delta" and anchored
        ranks = await self._learner.stream("publish", *([True] if delta else []), on_item=self._prefetch)
        try:
            manifests = await fetched(references[-1] for references in ranks)
        except LostObjectError as error:
            raise LearnerLostError(f"{WITH_THE_LEARNER}: {error}") from error
        return Published(
            manifests[0].version,
            [reference for references in ranks for reference in references],
            sum(manifest.nbytes for manifest in manifests),
            time.perf_counter() - start,
            delta=any(hasattr(manifest, "base_version") for manifest in manifests),
        )

    async def load(self, published: Published) -> None:
        """As WeightTransport."""
        start = time.perf_counter()
        self._chain = [*(self._chain if published.delta else []), published]
        self.newest = published
        loading = [replica for replica in self._rollout.replicas if replica.alive]
        try:
            await self._rollout.call_each("load_weights", *published.references)
        except LostObjectError as error:
            raise LearnerLostError(f"{WITH_THE_LEARNER}: {error}") from error
        for replica in loading:
            replica.version = published.version
        published.seconds += time.perf_counter() - start
        if published.record:
            published.record["publish_seconds"] = published.seconds

    async def give(self, handle: Any) -> None:
        """As WeightTransport: the anchor, then every delta after it."""
        given: Published | None = None
        while given is not self.newest:
            first = self._chain.index(given) + 1 if given in self._chain else 0
            given = self._chain[first]
            await handle.load_weights.remote(*given.references)
        for replica in self._rollout.replicas:
            if replica.handle is handle and given is not None:
                replica.version = given.version

    def _prefetch(self, reference: Any) -> None:
        self._rollout.tell_nodes("prefetch", reference)


TRANSPORTS = {"object_store": Versions}
"""By `weights.transport`."""
