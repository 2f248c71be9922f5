"""A whole campaign in one process: the real loop, learner, teacher and files, with neither Ray nor vLLM.

Fleets are objects of this process, and the rollout engine is LightEngine. All else is what `cluster.run` does, in a
second instead of half a minute, so that it can be killed often.
"""

import asyncio
import hashlib
import inspect
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml

import cluster.cli
import cluster.commands.evaluate
import cluster.commands.score
import cluster.roles
import cluster.run
from actors.errors import ActorFaultError, CampaignError, LearnerLostError, UserError
from actors.trajectory import Requests
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.fleet.ray_cluster import Room, role_resources
from cluster.records.writer import read_jsonl
from tests import clean_process
from tests.light_engine import BACKEND
from tests.tiny_models import make_tiny_model


class Reference:
    """Stands for an object reference: awaitable, and compared by identity."""

    def __init__(self, value: Any):
        self.value = value

    def __await__(self) -> Iterator[Any]:
        yield from asyncio.sleep(0).__await__()
        return self.value


class LocalFleet:
    """Replicas in this process: one call at a time each, in a thread."""

    def __init__(
        self, role: str, actor_class: type, arguments: tuple, keywords: dict, *, replicas: int, on_event: Any, **_: Any
    ):
        self.role, self.restarts, self.prepare = role, 0, None
        self._make = lambda: actor_class(*arguments, **keywords)
        self._on_event = on_event
        self.replicas = [
            SimpleNamespace(
                **{"name": f"{role}-{i}", "alive": False, "under_way": 0, "calls": 0, "restarts": 0, "version": None},
                **{"handle": None, "behind": False, "silent": "", "silent_since": 0.0, "waits_for": "", "doing": ""},
                doing_since=0.0,
            )
            for i in range(replicas)
        ]

    async def start(self, *, patient: bool = False) -> None:
        for replica in self.replicas:
            replica.actor, replica.turn, replica.alive = self._make(), asyncio.Lock(), True
            self._on_event("actor_started", actor=replica.name)

    async def _on(self, replica: Any, method: str, arguments: tuple, keywords: dict) -> Any:
        values = [argument.value if isinstance(argument, Reference) else argument for argument in arguments]
        async with replica.turn:
            bound = getattr(replica.actor, method)
            try:
                if inspect.iscoroutinefunction(bound):
                    return await bound(*values, **keywords)
                return await asyncio.to_thread(_result, bound, values, keywords)
            except (UserError, CampaignError):
                raise
            except Exception as error:
                if self.role != "learner":
                    raise
                cause = ActorFaultError(f"{method} failed: {type(error).__name__}: {error}")
                raise LearnerLostError(f"learner-0 failed: {cause}") from cause

    async def call(
        self, method: str, *arguments: Any, returns: int = 1, units: int = 1, at: Any = None, **keywords: Any
    ) -> Any:
        replica = at or min(self.replicas, key=lambda r: r.under_way)
        replica.under_way += units
        replica.calls += 1
        try:
            result = await self._on(replica, method, arguments, keywords)
        finally:
            replica.under_way -= units
            replica.calls -= 1
        return result if returns == 1 else (result[0], *map(Reference, result[1:]))

    async def call_beside(self, method: str) -> None:
        for replica in self.replicas:
            getattr(replica.actor, method)()

    def put(self, value: Any) -> Reference:
        return Reference(value)

    async def ask(self, requests: Requests, *, units: int, at: Any) -> Any:
        return await self.call("generate", requests, returns=2, units=units, at=at)

    async def call_each(self, method: str, *arguments: Any) -> list[Any]:
        return await asyncio.gather(*(self._on(replica, method, arguments, {}) for replica in self.replicas))

    async def stream(self, method: str, *arguments: Any, on_item: Any = None) -> list[list[Reference]]:
        return [[Reference(value) for value in await self._on(self.replicas[0], method, arguments, {})]]

    async def watched(self) -> None:
        await asyncio.Event().wait()

    async def room(self, calls: int) -> Any:
        while all(replica.calls >= calls for replica in self.replicas):
            await asyncio.sleep(0.001)
        return min(self.replicas, key=lambda replica: (replica.calls >= calls, replica.under_way))

    def inherit(self, lost: Any) -> None:
        pass

    def close(self) -> None:
        pass


class LocalEnvironments:
    """`Environments` in this process."""

    def __init__(self, places: list[Any]):
        self.places = places

    async def call(self, place: Any, method: str, *arguments: Any) -> Any:
        return await getattr(place, method)(*arguments)


class LocalEnvironmentFleet(LocalFleet):
    """Environment actors in this process, which rollout actors are told of once they are there."""

    clients: list[Any] = []  # noqa: RUF012 (set for each fleet)

    def serve(self, clients: Any) -> None:
        self.clients = [clients]

    async def start(self, *, patient: bool = False) -> None:
        await super().start(patient=patient)
        for replica in self.replicas:
            replica.actor.exit = lambda status: None  # this process is the campaign's
        there = LocalEnvironments([replica.actor for replica in self.replicas])
        for fleet in self.clients:
            for replica in fleet.replicas:
                await replica.actor.use_environments(there)


def _result(bound: Any, values: list[Any], keywords: dict[str, Any]) -> Any:
    """What a method returns, or all that a generator yields."""
    result = bound(*values, **keywords)
    if not inspect.isgenerator(result):
        return result
    # Copies, as in the object store: the learner fills the same buffer again.
    return [value.copy() if isinstance(value, np.ndarray) else value for value in result]


def make_folder(folder: Path) -> Path:
    """Models and prompts of a few kilobytes."""
    make_tiny_model(folder / "student", hidden=32, layers=1, context=64)
    make_tiny_model(folder / "teacher", hidden=32, layers=1, context=64, seed=1)
    for name, first in (("train", 0), ("heldout", 50)):
        lines = [f'{{"prompt": "{i}+{i}=", "answer": "{2 * i}"}}\n' for i in range(first, first + 11)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def configuration(folder: Path, name: str, **changes: Any) -> Path:
    """Writes a campaign in the folder; `changes` are of its sections."""
    content: dict[str, Any] = {
        "name": name,
        "output_dir": str(folder / "runs"),
        "student": {"model": str(folder / "student")},
        "teachers": {"default": {"model": str(folder / "teacher"), "dtype": "float32"}},
        "prompts": {"path": str(folder / "train.jsonl")},
        "sampling": {"max_response_tokens": 6},
        "rollout": {"dtype": "float32", "replicas": 2, "backend": BACKEND},
        "learner": {"compute_dtype": "float32", "optimizer": {"learning_rate": 1e-3}},
        "pipeline": {"updates": 12, "prompts_per_update": 4, "samples_per_prompt": 2},
        "evaluation": {"prompts": {"path": str(folder / "heldout.jsonl"), "limit": 4}, "every_updates": 4},
        "checkpoint": {"every_updates": 2, "keep_last": 1000},
    }
    for section, values in changes.items():
        content[section] = {**content.get(section, {}), **values}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder / f"{name}.yaml"


def without_ray() -> None:
    """Replaces Ray and vLLM in this process for good: campaigns that it runs from now on are light."""
    torch.set_num_threads(1)
    actors: Any = cluster.roles
    actors.Fleet = LocalFleet
    actors.EnvironmentFleet = LocalEnvironmentFleet
    here: Any = cluster.run
    here.control_store_lost = _never
    here.connected = lambda config: nullcontext(True)
    here.room_to_begin = light_room
    evaluating: Any = cluster.commands.evaluate
    scoring: Any = cluster.commands.score
    for command in (evaluating, scoring):
        command.connected, command.room_to_begin = here.connected, light_room


async def _never() -> None:
    await asyncio.Event().wait()


def light_room(config: CampaignConfig, private: bool) -> Room:
    """Room for everything that the configuration asks for."""
    needed = role_resources(config, 0.0, private=True)
    return Room(needed, {role: count for role, (count, _) in needed.items()})


def run_here(config_file: Path, dies_at: int | None = None) -> None:
    """Runs the campaign in this process, which kills itself (SIGKILL) at this operation on a file of the run directory.

    Operations are counted from 1: a file is opened, renamed or removed, or a directory made. A kill by the clock would
    hit another place on a machine of another speed, or come too late.
    """
    without_ray()
    config = load_config(config_file)
    if dies_at is not None:
        die_at_operation(config.run_dir, dies_at)
    cluster.run.run_campaign(config)


def run_command_here(folder: Path, *arguments: str) -> None:
    """Does what `python -m cluster ARGUMENTS` does in this folder; ends in SystemExit with its exit status."""
    os.chdir(folder)
    without_ray()
    cluster.cli.main(list(arguments))


def die_at_operation(folder: Path, number: int) -> None:
    """Kills this process at an operation on the files of a folder."""
    left, inside = itertools.count(number, -1), str(folder)

    def hook(event: str, arguments: tuple) -> None:
        counts = event in ("open", "os.rename", "os.remove", "os.mkdir") and str(arguments[0]).startswith(inside)
        if counts and next(left) <= 1:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def start(config_file: Path, dies_at: int | None = None) -> BaseProcess:
    """Runs the campaign in a process of its own."""
    return clean_process.start(run_here, config_file, dies_at, log=config_file.with_suffix(".log"))


def finish(process: BaseProcess, config_file: Path) -> float:
    """Waits for a campaign to end well; returns the seconds."""
    begun = time.monotonic()
    process.join()
    assert process.exitcode == 0, config_file.with_suffix(".log").read_text()[-3000:]
    return time.monotonic() - begun


def run_with_kills(config_file: Path, kills: int, draw: random.Random, longest: int = 100) -> int:
    """Runs the campaign to its end, killed `kills` times, each time after 30 to `longest` operations on its files.

    A light campaign of 12 updates and 6 checkpoints makes about 340. Returns how many kills have hit; the campaign may
    have ended before the last.
    """
    for killed in range(kills):
        process = start(config_file, draw.randint(30, longest))
        process.join()
        if process.exitcode != -signal.SIGKILL:
            finish(process, config_file)
            return killed
    finish(start(config_file), config_file)
    return kills


OF_TIME = re.compile(
    r"wall_seconds|processor_seconds|busy.*|publish_.*seconds|prepare_seconds|standstill_seconds|loop_seconds|actor_seconds|faults|checksum|"
    r"episode_seconds_mean|environment_seconds.*|environment_idle_seconds|episode_retries"
)


def fingerprint(run_dir: Path) -> dict[str, str]:
    """File -> hash, of the files that must not depend on whether a campaign was killed: checkpoints (weights, optimiser,
    learner, state), metrics, ledger and kept trajectories. Times are left out."""
    found = {}
    for path in sorted(run_dir.rglob("*")):
        name = str(path.relative_to(run_dir))
        if not path.is_file() or not re.match(r"checkpoints/step_|metrics\.jsonl|ledger\.jsonl|trajectories/", name):
            continue
        if path.name == "checksums.json":  # of the other files; each rank lists the pieces that it wrote
            continue
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            rows = [
                without_times(json.loads(line)) for line in content.decode().splitlines() if path.suffix == ".jsonl"
            ]
            content = json.dumps(rows or without_times(json.loads(content))).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def without_times(content: Any) -> Any:
    """JSON without the keys whose values are times."""
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if not OF_TIME.fullmatch(key)}
    return [without_times(item) for item in content] if isinstance(content, list) else content


def assert_ledger_adds_up(run_dir: Path, updates: int, size: int, max_staleness: int) -> None:
    """Every update has trained on `size` trajectories, each of them once; every number issued is trained or dropped."""
    rows = read_jsonl(run_dir / "ledger.jsonl")
    spent = {
        kind: [n for row in rows for a, b in row.get(kind, []) for n in range(a, b)] for kind in ("trained", "dropped")
    }
    counts = json.loads((run_dir / "summary.json").read_text())["ledger"]
    for row in rows:
        assert "dropped" in row or sum(b - a for a, b in row["trained"]) == size
    assert [row["step"] for row in rows if "trained" in row] == list(range(1, updates + 1))
    assert len(spent["trained"]) == updates * size == counts["trained"] and len(spent["dropped"]) == counts["dropped"]
    assert sorted(spent["trained"] + spent["dropped"]) == list(range(counts["issued"]))
    metrics = read_jsonl(run_dir / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(updates + 1))
    assert max(row["staleness_max"] for row in metrics[1:]) <= max_staleness
