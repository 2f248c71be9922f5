"""Teachers that follow the student: they are given the learner's moving averages, as rollout actors are its weights."""

from typing import Any

from actors.errors import LearnerLostError, LostObjectError
from cluster.config import CampaignConfig
from cluster.fleet.ray_fleet import Fleet
from cluster.loop.weight_sync import WITH_THE_LEARNER

Averages = dict[str, list[Any]]
"""Teacher -> references of a weight version: of each rank of the learner its buckets, and then their manifest."""


class Followers:
    """The teachers with an `ema_decay`; without one, nothing here does anything."""

    def __init__(self, config: CampaignConfig, fleets: dict[str, Fleet], learner: Fleet):
        following = {name for name, teacher in config.teachers.items() if teacher.ema_decay is not None}
        self._fleets = {name: fleet for name, fleet in fleets.items() if name in following}
        self._learner = learner
        self._newest: Averages = {}
        for name, fleet in self._fleets.items():
            fleet.prepare = lambda handle, name=name: self._give(name, handle)

    async def publish(self) -> Averages:
        """Has the learner lay out its averages; the campaign owns the buckets."""
        ranks = {name: await self._learner.stream("publish_average", name) for name in self._fleets}
        return {name: [reference for own in published for reference in own] for name, published in ranks.items()}

    async def load(self, averages: Averages) -> None:
        """Has every actor of these teachers load its average; from here on it is what new actors get."""
        self._newest = averages
        for name, fleet in self._fleets.items():
            try:
                await fleet.call_each("load_weights", *averages[name])
            except LostObjectError as error:
                raise LearnerLostError(f"{WITH_THE_LEARNER}: {error}") from error

    async def _give(self, name: str, handle: Any) -> None:
        """What a new actor gets before its first work: the newest average, also when that changes meanwhile."""
        given: Averages = {}
        while given is not self._newest:
            given = self._newest
            if given:
                await handle.load_weights.remote(*given[name])
