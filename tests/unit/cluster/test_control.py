"""Commands reach a campaign that runs, and are answered; those that nobody answers are taken back."""

import asyncio
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import CampaignError, UserError
from cluster import cli
from cluster.console import control
from cluster.console.status import write_status
from cluster.fleet.ray_actor import Resources
from cluster.records.writer import RunRecords, write_atomically
from tests.fake_run import make_fake_run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "EVERY_SECONDS", 0.01)


def with_campaign(run_dir: Path, handlers: Mapping[str, Any], body: Any) -> Any:
    """Runs a function in a thread beside a campaign that obeys."""

    async def run() -> Any:
        obeying = asyncio.create_task(control.obey(run_dir, handlers))
        await asyncio.sleep(0.05)
        try:
            return await asyncio.to_thread(body)
        finally:
            obeying.cancel()

    return asyncio.run(run())


def test_commands_are_obeyed_in_order_and_answered(tmp_path: Path) -> None:
    seen = []

    async def add(arguments: Mapping[str, Any]) -> str:
        seen.append(arguments["n"])
        return f"added {arguments['n']}"

    answers = with_campaign(tmp_path, {"add": add}, lambda: [control.send(tmp_path, "add", {"n": n}) for n in range(5)])
    assert answers == [f"added {n}" for n in range(5)] and seen == list(range(5))
    assert not list((tmp_path / "control").iterdir())


def test_what_the_campaign_will_not_do_is_the_senders_error(tmp_path: Path) -> None:
    async def refuse(_: Mapping[str, Any]) -> str:
        raise UserError("rollout: found in: found", "rolout", "fewer, expected or not", ["rollout"])

    def body() -> None:
        with pytest.raises(UserError) as refused:
            control.send(tmp_path, "refuse")
        known = UserError("rollout: found in: found", "rolout", "fewer, expected or not", ["rollout"])
        assert refused.value.to_json() == known.to_json()  # also where the text looks like the message's own words
        with pytest.raises(UserError, match="expected one of the commands refuse"):
            control.send(tmp_path, "dance")

    with_campaign(tmp_path, {"refuse": refuse}, body)


def test_a_refusal_by_a_campaign_of_an_earlier_release_is_an_error_with_its_text(tmp_path: Path) -> None:
    def answer() -> None:
        while not (asked := list((tmp_path / "control").glob("*.command.json"))):
            time.sleep(0.01)
        old = json.dumps({"done": False, "told": "rollout: found 0, expected 1"})
        write_atomically(asked[0].with_name(asked[0].name.replace(".command.", ".answer.")), old)

    earlier = threading.Thread(target=answer, daemon=True)
    earlier.start()
    with pytest.raises(CampaignError, match="rollout: found 0, expected 1"):
        control.send(tmp_path, "scale")


def test_a_file_that_is_no_command_harms_nobody(tmp_path: Path) -> None:
    async def say(_: Mapping[str, Any]) -> str:
        return "here"

    def body() -> str:
        for number, content in enumerate(("", "[1]", '{"command": []}', '{"command": "say", "arguments": 3}')):
            (tmp_path / "control" / f"{number}.command.json").write_text(content)
        return control.send(tmp_path, "say")

    assert with_campaign(tmp_path, {"say": say}, body) == "here"


def test_a_command_that_nobody_answers_is_taken_back_and_older_ones_are_not_obeyed(tmp_path: Path) -> None:
    with pytest.raises(CampaignError, match=r"has not answered within 0\.3 s"):
        control.send(tmp_path, "stop", patience=0.3)
    assert not list((tmp_path / "control").iterdir())
    (tmp_path / "control" / "0.command.json").write_text('{"command": "stop"}')
    assert with_campaign(tmp_path, {}, lambda: list((tmp_path / "control").iterdir())) == []


def made(**sizes: int) -> tuple[dict[str, Any], list[Any], asyncio.Event, dict[str, Any]]:
    fleets: dict[str, Any] = {}
    for role, count in sizes.items():
        fleet = SimpleNamespace(replicas=[None] * count)
        fleet.resize = lambda n, fleet=fleet: fleet.__setattr__("replicas", [None] * n)
        fleets[role] = fleet
    events: list[Any] = []
    gate = asyncio.Event()
    gate.set()
    needed = {role: (count, Resources(1.0, 0.0)) for role, count in sizes.items()}
    found = control.handlers(
        fleets, needed, gate, lambda kind, **fields: events.append((kind, fields)), asyncio.Event()
    )
    return fleets, events, gate, found


def test_pausing_shuts_the_gate_and_resuming_opens_it() -> None:
    _, events, gate, orders = made(rollout=1)
    for order, opened in (("pause", False), ("pause", False), ("resume", True), ("resume", True)):
        asyncio.run(orders[order]({}))
        assert gate.is_set() is opened
    assert [kind for kind, _ in events] == ["paused", "continued"]


def test_scaling_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control.check_scaled.__globals__["ray"], "cluster_resources", lambda: {"CPU": 6.0})
    fleets, events, _, orders = made(rollout=1, **{"teacher.a": 1})
    assert asyncio.run(orders["scale"]({"rollout": 3, "teacher.a": 2})) == "rollout: 1 -> 3; teacher.a: 1 -> 2"
    assert [len(fleet.replicas) for fleet in fleets.values()] == [3, 2]
    assert events[0] == ("scaled", {"role": "rollout", "before": 1, "after": 3})
    for wanted, said in (
        ({"rollout": 5}, r"rollout.replicas: found 7 CPUs asked .*expected at most the 6 CPUs"),
        ({"teacher.a": 1, "rollout": 0}, "rollout: found 0, expected a number of actors >= 1"),
        ({"learner": 2}, "learner: found no role that can be scaled, expected one of rollout, teacher.a"),
    ):
        with pytest.raises(UserError, match=said):
            asyncio.run(orders["scale"](wanted))
    assert [len(fleet.replicas) for fleet in fleets.values()] == [3, 2] and len(events) == 2
    monkeypatch.setattr(control.check_scaled.__globals__["ray"], "cluster_resources", lambda: {"CPU": 3.0})
    assert asyncio.run(orders["scale"]({"rollout": 2})) == "rollout: 3 -> 2", "also where a node has gone"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pause", "nowhere"], "RUN: found nowhere"),
        (["stop", "{run}"], "which is finished, expected a campaign that is running"),
        (["scale", "{live}", "rollout=many"], "scale: found rollout=many, expected role=N"),
    ],
)
def test_what_cannot_be_steered_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, live = make_fake_run(tmp_path / "run"), make_fake_run(tmp_path / "live")
    RunRecords(live).event("loop_started", step=1)
    write_status(live, json.loads('{"state": "running"}'))
    with pytest.raises(SystemExit) as ended:
        cli.main([argument.format(run=run, live=live) for argument in arguments])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and said in err and len(err.splitlines()) == 1
