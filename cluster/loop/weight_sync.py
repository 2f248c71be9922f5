"""Sends weight versions from the learner to the rollout actors, and averages to teachers. References and counts only.

The campaign process owns the objects (what the learner returns outlives the learner) and keeps what a new actor needs:
the last dense version, its *anchor*, and the deltas after it. It drops everything older, and Ray frees it.

    learner    each rank: bucket 0, bucket 1, ... manifest      each bucket travels while the next is filled
    node       one pull of each bucket, however many rollout actors it has
    actor      verifies, decodes a delta onto its base; then the engine pauses and loads the complete version
"""

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.errors import LearnerLostError, LostObjectError
from cluster.config import CampaignConfig, WeightsConfig
from cluster.fleet.ray_actor import fetched
from cluster.fleet.ray_fleet import Fleet

LOST = "its weights are gone with its node"

Averages = dict[str, list[Any]]
"""Teacher -> references of a weight version: for each rank of the learner its buckets, then their manifest."""


@dataclass(eq=False)
class Published:
    """One weight version, and the record of the update that made it."""

    version: int
    references: list[Any]
    """For each rank of the learner its buckets, then their manifest: a WeightVersion, or a DeltaVersion."""
    nbytes: int
    """Total bytes of the buckets."""
    seconds: float
    """Time from the start of publishing until every rollout actor has loaded it."""
    delta: bool = False
    record: dict[str, Any] = field(default_factory=dict)
    """The update's line of metrics.jsonl; empty for the version that a campaign starts with."""
    trained: int = 0
    """Trajectories of the update, whose slots are released when the version is loaded."""
    averages: Averages = field(default_factory=dict)
    """The weights of this version for the teachers that follow the student."""


class WeightTransport(Protocol):
    """Brings weights from the learner into every engine. `weights.transport` chooses the class.

    Whatever a transport does, an engine holds one version or the next, never a mixture. Another one, for example from
    GPU to GPU, would be a class with these methods and a row in TRANSPORTS.
    """

    newest: Published | None
    """The version that the rollout actors hold or are loading; None before the first."""

    @property
    def version(self) -> int:
        """Policy version of `newest`."""

    async def publish(self) -> Published:
        """Takes a copy of the learner's weights; later updates do not change it. LearnerLostError: the learner died."""

    async def load(self, published: Published) -> None:
        """Loads a version into every living rollout actor, and makes it `newest`. Returns when all have it that are not
        left behind (Fleet.call_each); these get no work before they have it."""

    async def give(self, handle: Any) -> None:
        """Loads `newest` into one actor that is new or was left behind, also when it changes meanwhile. Awaited before
        the actor gets work."""


class ObjectStoreTransport:
    """The transport `object_store`: buckets in Ray's object store, dense or as deltas."""

    def __init__(self, learner: Fleet, rollout: Fleet, config: WeightsConfig):
        self.newest: Published | None = None
        self._learner, self._rollout, self._config = learner, rollout, config
        self._chain: list[Published] = []
        """The last dense version and all deltas after it, up to the newest."""
        self._sent: dict[Any, int] = {}
        """Handle -> the version that was last sent to the actor."""

    @property
    def version(self) -> int:
        """Policy version of `newest`; only after the first `load`."""
        assert self.newest is not None
        return self.newest.version

    async def publish(self) -> Published:
        """Streams the learner's weights into the object store. A delta, unless an anchor is due or it saves too little."""
        start = time.perf_counter()
        # An empty chain has no base for a delta; a long one makes new actors decode many deltas.
        anchored = 0 < len(self._chain) < self._config.anchor_every
        delta = self._config.encoding == "delta" and anchored
        # Each bucket is pulled by the nodes of the rollout actors while the learner still fills the next one.
        ranks = await self._learner.stream("publish", *([True] if delta else []), on_item=self._prefetch)
        try:
            manifests = await fetched(references[-1] for references in ranks)
        except LostObjectError as error:  # no other copy of this version exists: the campaign goes back to a checkpoint
            raise LearnerLostError(f"{LOST}: {error}") from error
        return Published(
            manifests[0].version,
            [reference for references in ranks for reference in references],
            sum(manifest.nbytes for manifest in manifests),
            time.perf_counter() - start,
            # The learner answers with a dense version where a delta would save too little.
            delta=any(hasattr(manifest, "base_version") for manifest in manifests),
        )

    async def load(self, published: Published) -> None:
        """See WeightTransport. An actor that is lost meanwhile is replaced; its successor gets the version by `give`."""
        start = time.perf_counter()
        self._chain = [*(self._chain if published.delta else []), published]
        self.newest = published  # before the calls: actors that start during them load this version through `give`
        loading = [replica for replica in self._rollout.replicas if replica.alive and not replica.behind]
        known = {replica.handle for replica in self._rollout.replicas}
        self._sent = {handle: version for handle, version in self._sent.items() if handle in known}
        self._sent |= {replica.handle: published.version for replica in loading}
        loaded = await _load(self._rollout, published.references)
        for replica in loading:
            if not replica.behind:
                replica.version = published.version
        published.seconds += time.perf_counter() - start
        if published.record:
            published.record["publish_seconds"] = published.seconds
            # Of the slowest actor each: they load side by side.
            published.record["prepare_seconds"] = max((one.prepared for one in loaded), default=0.0)
            published.record["standstill_seconds"] = max((one.stood_still for one in loaded), default=0.0)

    async def give(self, handle: Any) -> None:
        """See WeightTransport. A new actor has no base, so it loads the anchor and then every delta after it. One that was
        left behind has loaded what it was sent, and goes on from there."""
        given = next((one for one in self._chain if one.version == self._sent.get(handle)), None)
        while given is not self.newest:  # loading takes a while, and a newer version may come
            first = self._chain.index(given) + 1 if given in self._chain else 0
            given = self._chain[first]
            await handle.load_weights.remote(*given.references)
            self._sent[handle] = given.version
        # Looked up by the handle: the fleet calls this before the actor counts as alive, and passes no replica.
        for replica in self._rollout.replicas:
            if replica.handle is handle and given is not None:
                replica.version = given.version

    def _prefetch(self, reference: Any) -> None:
        self._rollout.tell_nodes("prefetch", reference)


class NoEngines:
    """In the place of a transport where no rollout actors run: nothing is published."""

    def __init__(self, learner: Fleet):
        self.newest: Published | None = None
        self._learner = learner

    @property
    def version(self) -> int:
        """See WeightTransport."""
        assert self.newest is not None
        return self.newest.version

    async def publish(self) -> Published:
        """The learner's version, without weights."""
        return Published(int((await self._learner.call("status"))["policy_version"]), [], 0, 0.0)

    async def load(self, published: Published) -> None:
        """See WeightTransport."""
        self.newest = published
        if published.record:
            published.record |= {"publish_seconds": 0.0, "prepare_seconds": 0.0, "standstill_seconds": 0.0}

    async def give(self, handle: Any) -> None:
        """There is nobody to give it to."""


TRANSPORTS = {"object_store": ObjectStoreTransport}
"""Transports by `weights.transport`."""


class EmaTeachers:
    """Gives teachers with an `ema_decay` the moving averages of the student's weights. Without such teachers, idle."""

    def __init__(self, config: CampaignConfig, fleets: dict[str, Fleet], learner: Fleet):
        following = {name for name, teacher in config.teachers.items() if teacher.ema_decay is not None}
        self._fleets = {name: fleet for name, fleet in fleets.items() if name in following}
        self._learner = learner
        self._newest: Averages = {}
        for name, fleet in self._fleets.items():
            fleet.prepare = lambda handle, name=name: self._give(name, handle)

    async def publish(self) -> Averages:
        """Streams the learner's current averages into the object store."""
        ranks = {name: await self._learner.stream("publish_average", name) for name in self._fleets}
        return {name: [reference for part in published for reference in part] for name, published in ranks.items()}

    async def load(self, averages: Averages) -> None:
        """Loads the averages into every actor of these teachers. New actors get them from now on."""
        self._newest = averages
        for name, fleet in self._fleets.items():
            await _load(fleet, averages[name])

    async def _give(self, name: str, handle: Any) -> None:
        """Loads the newest average into one new actor, also when it changes meanwhile."""
        given: Averages = {}
        while given is not self._newest:
            given = self._newest
            if given:
                await handle.load_weights.remote(*given[name])


async def _load(fleet: Fleet, references: list[Any]) -> list[Any]:
    """Loads a version into every living actor of a fleet; their answers. LearnerLostError: its objects were lost with a
    node."""
    try:
        return await fleet.call_each("load_weights", *references)
    except LostObjectError as error:
        raise LearnerLostError(f"{LOST}: {error}") from error
