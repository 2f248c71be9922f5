"""What is said of an actor that has no place yet."""

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.console.status import _Events
from cluster.fleet.ray_actor import Resources
from cluster.fleet.ray_room import described, needs, shortage
from tests.actors_of_this_process import Events, with_fleet

SMALL, LARGE = {"CPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("bundles", "available", "told"),
    [
        ([{"CPU": 0.3}], [SMALL], ""),
        ([{"CPU": 0.3}], [{"CPU": 0.2}, {}], "0.2 of 10 CPU are free"),
        ([{"CPU": 0.3}], [{"CPU": 0.2}, {"CPU": 0.3}], ""),
        ([{"CPU": 0.3}], [{"CPU": 0.2}, {"CPU": 0.2}], "0.4 of 10 CPU are free"),
        ([{"CPU": 4.0}], [SMALL, {"CPU": 3.0}], "5 of 10 CPU are free"),
        ([{"CPU": 9.0}], [SMALL, LARGE], "no node is large enough, the largest have 8 CPU"),
        ([{"CPU": 1.0, "GPU": 1.0}], [SMALL, {"CPU": 8.0}], "10 of 10 CPU, 0 of 1 GPU are free"),
        ([{"roll": 1.0}], [SMALL, LARGE], "no node is large enough, the largest have 0 roll"),
        ([{"GPU": 0.1}] * 3, [SMALL, {"GPU": 0.3}], ""),
        ([{"CPU": 3.0}] * 3, [SMALL, LARGE], "no node is large enough, the largest have 8 CPU"),
    ],
)
def test_room_is_compared_with_what_is_there(bundles: list, available: list, told: str) -> None:
    assert shortage(bundles, [SMALL, LARGE], available) == told


def test_several_places_are_named_with_their_number() -> None:
    assert needs([{"CPU": 0.5, "GPU": 1.0}]) == "0.5 CPU, 1 GPU"
    assert needs([{"CPU": 0.5}] * 3) == "3 times 0.5 CPU"


def test_who_holds_the_room_is_told_by_job() -> None:
    states = [("01", "a.Mine", "ALIVE"), ("02", "Other", "ALIVE"), ("02", "Other", "ALIVE"), ("03", "X", "DEAD")]
    actors = [{"JobID": job, "ActorClassName": name, "State": state} for job, name, state in states]
    jobs = [{"JobID": "02", "DriverPid": 7, "DriverIPAddress": "10.0.0.1"}]
    assert described(actors, "01", jobs) == "job 02, process 7 on 10.0.0.1: 2 Other; this campaign: 1 Mine"
    many = [{"JobID": f"{i:02}", "ActorClassName": "X", "State": "ALIVE"} for i in range(10)]
    assert described(many, "99", []).endswith("; 6 more jobs")


class Worker:
    async def status(self) -> dict[str, Any]:
        return {}


def test_what_only_starts_slowly_is_starting_and_the_news_of_a_wait_end_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reasons: Iterator[list[str]] = iter([["0 of 2 CPU are free", ""], [""], []])

    async def place(held: Any, nodes: Any, bundles: Any, on_wait: Any) -> None:
        for reason in next(reasons, []):
            on_wait(reason)

    async def body(fleet: Any, events: Events) -> None:
        assert [(kind, fields["actor"]) for kind, fields in events] == [
            ("waiting_for_resources", "worker-0"),
            ("actor_starting", "worker-0"),
            ("actor_starting", "worker-1"),
            ("actor_started", "worker-0"),
            ("actor_started", "worker-1"),
        ]
        assert events[0][1]["cause"].endswith("; the campaign waits for it (0 of 2 CPU are free)")
        status = _Events()
        for kind, fields in events[:3]:
            status.add({"kind": kind, **fields})
        assert len(status.news) == 3
        for kind, fields in events[3:]:
            status.add({"kind": kind, **fields})
        assert not status.news

    with_fleet(monkeypatch, Worker, body, place=place, resources=Resources(0.3, 0.0))
