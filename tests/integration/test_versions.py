"""Weight versions through a real object store: who gets what, and what is left there."""

import asyncio
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.weights.buckets import WeightVersion
from actors.weights.delta import DeltaVersion, Receiver
from cluster.config import WeightsConfig
from cluster.fleet.ray_actor import Resources
from cluster.fleet.ray_fleet import Fleet
from cluster.loop.weight_sync import ObjectStoreTransport
from learner.student.publishing import Publisher

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]


class Writer:
    """The learner's part of publishing, with weights that move a little each time."""

    def __init__(self, elements: int, keep: bool):
        self.version, self.publisher = -1, Publisher(300_000, keep=keep)
        self.weights = torch.from_numpy(np.random.default_rng(0).normal(0, 1, elements).astype(np.float32))

    def status(self) -> None: ...

    def publish(self, delta: bool = False) -> Iterator[Any]:
        self.version += 1
        self.weights[self.version :: 50] *= 1.1
        named = [("a", self.weights), ("b", self.weights + 1)]
        yield from self.publisher.full_or_delta(self.version, named, "bfloat16", delta=delta)


class Reader:
    """A rollout actor's part."""

    def __init__(self) -> None:
        self.receiver, self.versions, self.prefetched = Receiver(True), [], 0

    def status(self) -> None: ...

    def prefetch(self, bucket: np.ndarray) -> None:
        self.prefetched += bucket.nbytes > 0

    def load_weights(self, *published: np.ndarray | WeightVersion | DeltaVersion) -> float:
        [version] = self.receiver.receive(*published)
        self.receiver.hold([version])
        self.versions.append(version[0].version)
        return 0.0

    def seen(self) -> tuple[list[int], int, int]:
        return self.versions, self.prefetched, sum(entry.checksum for entry in self.receiver._held[0][0].tensors)


def fleets(elements: int, readers: int, keep: bool) -> tuple[Fleet, Fleet]:
    def fleet(role: str, actor: type, *arguments: Any, replicas: int = 1) -> Fleet:
        return Fleet(
            role, actor, arguments, {}, replicas=replicas, resources=Resources(0.5, 0), max_restarts=3,
            start_timeout_seconds=600.0, on_event=lambda kind, **fields: None,
        )  # fmt: skip

    return fleet("learner", Writer, elements, keep), fleet("rollout", Reader, replicas=readers)


def with_versions(config: WeightsConfig, elements: int, readers: int, body: Callable[[Any], Any]) -> None:
    async def run() -> None:
        learner, rollout = fleets(elements, readers, config.encoding == "delta")
        try:
            await asyncio.gather(learner.start(), rollout.start())
            made = SimpleNamespace(
                learner=learner, rollout=rollout, versions=ObjectStoreTransport(learner, rollout, config)
            )
            rollout.prepare = made.versions.give
            await body(made)
        finally:
            learner.close()
            rollout.close()

    asyncio.run(run())


def used_mebibytes() -> float:
    """In the object store, of all processes."""
    key = "object_store_memory"
    return (ray.cluster_resources()[key] - ray.available_resources().get(key, 0)) / (1 << 20)


@pytest.mark.parametrize("count", [80, pytest.param(1000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("encoding", ["dense", "delta"])
def test_the_object_store_does_not_fill_over_many_versions(encoding: str, count: int) -> None:
    async def body(made: Any) -> None:
        bound = 0.0
        for number in range(count):
            published = await made.versions.publish()
            assert published.delta == (encoding == "delta" and number % 8 != 0)
            await made.versions.load(published)
            if number == 10:
                await asyncio.sleep(0.3)  # raylets report what they hold with a delay
                bound = used_mebibytes() + 2
            elif number % 33 == 10:
                # Objects go a moment after their last reference. 80 versions that stayed would be 64 MiB.
                async with asyncio.timeout(600):
                    while used_mebibytes() > bound:
                        await asyncio.sleep(0.05)
        answers = await made.rollout.call_each("seen")
        assert [versions for versions, _, _ in answers] == [list(range(count))] * 2
        assert len({checksum for *_, checksum in answers}) == 1

    with_versions(WeightsConfig(encoding=encoding, anchor_every=8), 200_000, 2, body)  # type: ignore[arg-type]


def test_an_actor_that_is_replaced_gets_the_anchor_and_every_delta_after_it() -> None:
    async def body(made: Any) -> None:
        for _ in range(7):
            await made.versions.load(await made.versions.publish())
        first = made.rollout.replicas[0]
        ray.kill(first.handle)
        for _ in range(3):
            await made.versions.load(await made.versions.publish())
        while not first.alive or first.restarts == 0:
            await asyncio.sleep(0.05)
        await made.versions.load(await made.versions.publish())
        replaced, other = await made.rollout.call_each("seen")
        assert other[0] == list(range(11)) and other[1] > 0
        assert replaced[0] in ([*range(5, 11)], [*range(10, 11)])  # from the last anchor when it came: 5, or 10
        assert replaced[2] == other[2]

    with_versions(WeightsConfig(encoding="delta", anchor_every=5), 20_000, 2, body)
