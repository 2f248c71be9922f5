"""Environment actors on a real Ray: they die in the middle of episodes, and every trajectory is trained once all the same."""

import asyncio
import json
import os
import signal
import socketserver
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from actors.config import EnvironmentConfig
from cluster.console.status import read_status
from cluster.fleet.ray_actor import Resources
from cluster.fleet.ray_environments import EnvironmentFleet, RayEnvironmentActor, RayEnvironments
from cluster.fleet.ray_fleet import Fleet
from cluster.records.writer import read_jsonl
from tests.light_campaign import assert_ledger_adds_up, fingerprint, finish, make_folder, start
from tests.tiny_models import make_tiny_model
from tests.unit.cluster.test_environments import ROOT, UPDATES, campaign
from tests.waiting import PATIENCE_SECONDS, until

pytestmark = pytest.mark.integration


def told(command: str, *arguments: Any) -> str:
    """What a command that ends well says."""
    words = [sys.executable, "-m", "cluster", command, *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_environment_actors_that_die_are_replaced_and_their_episodes_begin_again(tmp_path: Path) -> None:
    light = {"cpus_per_replica": 0.2, "replicas": 1}
    file = campaign(
        make_folder(tmp_path),
        "dying",
        {
            "arguments": {"fails": "dies", "each": 4, "log": str(tmp_path / "log")},
            "step_timeout_seconds": 60,
            "attempts": 9,  # an episode may be begun on a process that another one ends
            "replicas": 2,
            "cpus_per_replica": 0.2,
        },
        rollout=light,
        learner={"cpus_per_replica": 0.2},
        teachers={"default": {"model": str(tmp_path / "teacher"), "dtype": "float32", **light}},
        ray={"object_store_mebibytes": 100},
    )
    told("run", file)
    run = tmp_path / "runs" / "dying"
    assert_ledger_adds_up(run, UPDATES, 8, 0)
    died = [row for row in read_jsonl(run / "events.jsonl") if row["kind"] == "actor_died"]
    assert died and all(row["actor"].startswith("environment-") for row in died)
    assert any(row["episode_retries"] for row in read_jsonl(run / "metrics.jsonl")[1:])
    processes = {line.split()[3] for line in (tmp_path / "log").read_text().splitlines()}
    assert len(processes) > 2  # those that were replaced

    # The same of an evaluation without training: the first held-out prompt's episodes end their process once.
    seen = told("evaluate", tmp_path / "student", file, "--output", tmp_path / "found.json")
    assert "environment-0" in seen and "died" in seen
    found = json.loads((tmp_path / "found.json").read_text())["sets"]
    [values] = found["greedy"]["values"].values()
    assert found.keys() == {"greedy", "sampled"} and 0 <= values["accuracy"] <= 1


class Sandbox(socketserver.ThreadingUnixStreamServer):
    """Answers with a word, and counts what it is asked."""

    asked = 0

    class RequestHandlerClass(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"here")
            self.server.asked += 1

    def __init__(self, path: Path):
        path.unlink(missing_ok=True)
        super().__init__(str(path), self.RequestHandlerClass)


@contextmanager
def serving(path: Path) -> Iterator[Sandbox]:
    """A server that is there. Afterwards connections to the path are refused."""
    with Sandbox(path) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_server_that_is_away_for_a_while_costs_no_episode_and_changes_no_bit(tmp_path: Path) -> None:
    light = {"cpus_per_replica": 0.2, "replicas": 1}
    common: dict[str, Any] = {
        "rollout": light,
        "learner": {"cpus_per_replica": 0.2},
        "teachers": {"default": {"model": str(tmp_path / "teacher"), "dtype": "float32", **light}},
        "ray": {"object_store_mebibytes": 100},
    }
    folder, path = make_folder(tmp_path), tmp_path / "sandbox"
    own = {"attempts": 1, "cpus_per_replica": 0.2}
    asks = {"name": "tests.guessing:Asks", "arguments": {"socket": str(path)}}
    calm, file = campaign(folder, "calm", own, **common), campaign(folder, "away", own | asks, **common)
    run = tmp_path / "runs" / "away"
    with ThreadPoolExecutor() as threads:
        with serving(path) as server:
            running = threads.submit(told, "run", file)
            # Some of an evaluation, and then of the first update.
            until(lambda: server.asked > 12, "some episodes", lambda: not running.done())
        waits: list[dict[str, Any]] = []

        def waiting() -> bool:
            waits[:] = [actor for actor in read_status(run)["actors"] if actor.get("waits_for")]
            return bool(waits)

        until(waiting, "what the status tells of the server", lambda: not running.done())
        with serving(path):
            said = running.result()
    assert [actor["name"] for actor in waits] == ["rollout-0"] and waits[0]["waits_seconds"] > 0
    assert waits[0]["waits_for"].startswith("environment: step raised ConnectionRefusedError")
    assert "rollout-0 waits: environment: step raised ConnectionRefusedError" in said
    assert_ledger_adds_up(run, UPDATES, 8, 0)
    kinds = [row["kind"] for row in read_jsonl(run / "events.jsonl")]
    assert "outside_away" in kinds and not {"trajectory_refused", "episodes_failed", "actor_hung"} & {*kinds}
    assert any(row["episode_retries"] for row in read_jsonl(run / "metrics.jsonl")[1:])
    finish(start(calm), calm)
    assert fingerprint(run) == fingerprint(tmp_path / "runs" / "calm")


class Player:
    """Takes a place for an episode, as a rollout actor does."""

    async def status(self) -> int:
        return os.getpid()

    async def begin(self, environments: RayEnvironments) -> bool:
        return await environments.call(environments.places[0], "enter", "0/0/0/0/0")


@pytest.mark.usefixtures("ray_session")
def test_the_episodes_of_a_rollout_actor_end_with_it() -> None:
    async def play() -> None:
        common = {"resources": Resources(0.1, 0.0), "max_restarts": 2, "start_timeout_seconds": 600.0}
        common["on_event"] = lambda kind, **fields: None
        players = Fleet("player", Player, (), {}, replicas=2, **common)
        one_place = EnvironmentConfig(name="tests.guessing:Guess", episodes_per_replica=2)
        hosts = EnvironmentFleet("environment", RayEnvironmentActor, (one_place, None, ""), {}, replicas=1, **common)
        hosts.serve(players)
        try:
            async with asyncio.timeout(600):
                await asyncio.gather(players.start(), hosts.start())
                there = RayEnvironments([hosts.replicas[0].handle])
                for replica in players.replicas:  # both call their episode by the same name
                    assert await players.call("begin", there, at=replica)
                assert await hosts.call("status") == {"episodes": 2}
                os.kill(await players.call("status", at=players.replicas[0]), signal.SIGKILL)
                while (await hosts.call("status"))["episodes"] != 1:
                    await asyncio.sleep(0.05)
                players.resize(0)
                while (await hosts.call("status"))["episodes"]:
                    await asyncio.sleep(0.05)
        finally:
            players.close()
            hosts.close()

    asyncio.run(play())


def test_a_program_plays_an_evaluation_of_several_models(tmp_path: Path) -> None:
    light = {"cpus_per_replica": 0.2, "replicas": 1}
    folder = make_folder(tmp_path)
    for seed, name in enumerate(("student", "teacher")):
        make_tiny_model(folder / name, hidden=32, layers=1, context=256, seed=seed)
    agent = ["python", str(ROOT / "tests/agent.py"), "--turns", "1", "--branches", "--what", "raises", "--each", "2"]
    file = campaign(
        folder,
        "programs",
        {"name": None, "command": agent, "listen": "network", "episodes_per_replica": 2, "cpus_per_replica": 0.2},
        sampling={"max_response_tokens": 200},
        rollout=light,
        learner={"cpus_per_replica": 0.2},
        ray={"object_store_mebibytes": 100},
    )
    told("evaluate", tmp_path / "student", tmp_path / "teacher", file, "--output", tmp_path / "found.json")
    sets = json.loads((tmp_path / "found.json").read_text())["sets"].values()
    assert all(of_set["prompts"] == 4 and len(of_set["values"]) == 2 for of_set in sets)
    # Not where all episodes of a model were cut before their end.
    found = [values["accuracy"] for of_set in sets for values in of_set["values"].values() if "accuracy" in values]
    assert len(found) > 1 and all(0 <= accuracy <= 1 for accuracy in found)
