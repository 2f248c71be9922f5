"""A start may take any time as long as it makes progress; what it does is in the status. The clock is the test's own."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import CampaignError
from cluster.console.status import live_actors
from cluster.fleet import supervision
from cluster.fleet.ray_fleet import Fleet
from tests.actors_of_this_process import Events, with_fleet


class Worker:
    async def status(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[seconds]. Looks at the progress come every hundredth of a real second."""
    now = [0.0]
    monkeypatch.setattr(supervision, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(supervision, "LOOK_SECONDS", 0.01)
    return now


def started_while(monkeypatch: pytest.MonkeyPatch, preparing: Any) -> None:
    """Starts one more actor, which is prepared by `preparing(fleet, replica)`."""

    async def body(fleet: Fleet, events: Events) -> None:
        async def prepare(handle: Any) -> None:
            [replica] = [one for one in fleet.replicas if one.handle is handle]
            await preparing(replica)

        fleet.prepare = prepare
        fleet.resize(2)
        while not any(kind in ("actor_started", "scaling_failed") for kind, _ in events[1:]):
            await asyncio.sleep(0.005)
        [(kind, fields)] = [
            (kind, fields) for kind, fields in events[1:] if kind in ("actor_started", "scaling_failed")
        ]
        if kind == "scaling_failed":
            raise CampaignError(fields["cause"])

    with_fleet(monkeypatch, Worker, body, replicas=1)


def test_a_download_of_an_hour_is_no_error_and_the_status_says_what_it_does(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    async def preparing(replica: Any) -> None:
        for gigabytes in range(8):  # each after 500 of 600 seconds
            replica.handle.start = (str(gigabytes), f"downloads a model ({gigabytes} GB so far)")
            while replica.doing != replica.handle.start[1]:
                await asyncio.sleep(0.005)
            [row] = live_actors([replica])
            assert row["doing"] == f"downloads a model ({gigabytes} GB so far)"
            clock[0] += 500.0

    started_while(monkeypatch, preparing)
    assert clock[0] > 3600


def test_a_start_without_progress_ends_after_the_limit_with_what_was_heard_last(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    async def preparing(replica: Any) -> None:
        replica.handle.start = ("1", "downloads a model (3 GB so far)")
        while not replica.doing:
            await asyncio.sleep(0.005)
        clock[0] += 601.0
        await asyncio.Event().wait()

    found = (
        r"did not start within 600 s \(ray\.start_timeout_seconds\) of its last progress; the last that was heard: "
        r"downloads a model \(3 GB so far\)"
    )
    with pytest.raises(CampaignError, match=found):
        started_while(monkeypatch, preparing)
