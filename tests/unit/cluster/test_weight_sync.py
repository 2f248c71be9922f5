"""Teachers that follow the student: which actors get which average, and when. The fleets are fakes."""

import asyncio
from types import SimpleNamespace
from typing import Any

from actors.config import StudentConfig, TeacherConfig
from cluster.config import CampaignConfig
from cluster.loop.weight_sync import EmaTeachers


class Learner:
    """Lays out average after average, numbered."""

    count = 0

    async def stream(self, method: str, name: str) -> list[list[str]]:
        assert method == "publish_average"
        self.count += 1
        return [[f"{name} {part} {self.count} of rank {rank}" for part in ("bucket", "manifest")] for rank in (0, 1)]


def published(number: int) -> tuple[str, ...]:
    """What an actor is given: of each rank its buckets, and then their manifest."""
    return tuple(f"mean {part} {number} of rank {rank}" for rank in (0, 1) for part in ("bucket", "manifest"))


class Teacher:
    """A fleet that remembers what all of its actors were told to load."""

    def __init__(self) -> None:
        self.loaded: list[tuple] = []
        self.prepare: Any = None

    async def call_each(self, method: str, *arguments: str) -> None:
        assert method == "load_weights"
        self.loaded.append(arguments)


def make() -> tuple[EmaTeachers, dict[str, Teacher]]:
    fleets = {"mean": Teacher(), "frozen": Teacher()}
    teachers = {"mean": TeacherConfig("s", ema_decay=0.9), "frozen": TeacherConfig("t")}
    config = CampaignConfig(name="x", student=StudentConfig("s"), teachers=teachers)
    return EmaTeachers(config, fleets, Learner()), fleets  # type: ignore[arg-type]


def test_every_version_is_given_to_the_teachers_that_follow_and_to_no_other() -> None:
    async def scenario() -> None:
        ema, fleets = make()
        for _ in range(2):
            await ema.load(await ema.publish())
        assert fleets["mean"].loaded == [published(1), published(2)]
        assert fleets["frozen"].loaded == [] and fleets["frozen"].prepare is None

    asyncio.run(scenario())


def test_a_new_actor_is_given_the_newest_average_also_when_that_changes_meanwhile() -> None:
    async def scenario() -> None:
        ema, fleets = make()
        given: list[tuple] = []

        async def load(*arguments: str) -> None:
            given.append(arguments)
            if len(given) == 1:
                await ema.load(await ema.publish())

        handle = SimpleNamespace(load_weights=SimpleNamespace(remote=load))
        await fleets["mean"].prepare(handle)
        assert given == []  # nothing has been published: its files are the average
        await ema.load(await ema.publish())
        await fleets["mean"].prepare(handle)
        assert given == [published(1), published(2)]

    asyncio.run(scenario())
