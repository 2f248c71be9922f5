"""A campaign in which actors are killed, stopped and made to fail on a schedule: real Ray, fleets, learner and teachers.

The rollout engine is a light one, so that a new actor starts as fast as its imports. With `environment.name:
tests.chaos_campaign:ChaosGuess` episodes can be held in the middle. As a program:

    python -m tests.chaos_campaign CONFIG SCHEDULE RESULT [--pause SECONDS] [--hold]

SCHEDULE is a JSON list of faults, RESULT gets one row for each that was done.
--pause: what a rollout actor sleeps in each call, and the others a quarter of it, so that updates take as long as those
    of a real campaign.
--hold: the campaign is held in the state that a fault asks for, and until it has recovered, so that no result depends
    on how fast anything is.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cluster.roles
import cluster.run
from actors.heartbeat import beat
from actors.teacher.local import LocalTeacher
from cluster.config_file import load_config
from cluster.fleet.ray_actor import Replica, invoke
from cluster.fleet.ray_environments import EnvironmentFleet
from cluster.fleet.ray_fleet import Fleet
from cluster.records.writer import read_jsonl
from learner.learner import Learner
from tests.guessing import Guess
from tests.light_engine import LightEngine
from tests.processes import below, command_of

ROLES = ("rollout", "teacher.default", "learner")
ENVIRONMENT = "environment"
"""A further role, of campaigns with one."""
CAMPAIGN = "campaign"
"""This process, which can be killed only."""
KINDS = ("kill", "stop", "raise")
PAUSE, FLAGS = "CHAOS_PAUSE", "CHAOS_FLAGS"
"""Environment variables of the actors: seconds, and the folder of the files `fail.ROLE` and `hold.ROLE`."""
REACHED = "an.episode.is.held"
PATIENCE_SECONDS = 600.0
"""Guards against hanging only."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    role: str
    kind: str
    """`kill` is SIGKILL, `stop` SIGSTOP, `raise` an exception in the next call."""
    busy: bool
    """Whether the actor is at work then."""
    after: int
    """The first update that must have been done."""
    in_episode: bool = False
    """Whether an environment is at work on an episode then."""


def schedule(seed: int, first: int, every: int, count: int | None = None) -> list[Fault]:
    """Every role, kind and state in a seeded order, one every `every` updates. Only an actor at work can raise."""
    matrix = [one for one in itertools.product(ROLES, KINDS, (False, True)) if one[1] != "raise" or one[2]]
    random.Random(seed).shuffle(matrix)
    return [Fault(*one, first + every * place) for place, one in enumerate(matrix[:count])]


def work(role: str, share: float = 1.0) -> None:
    """What a call of a role does first: it fails where a file asks for it, once; it waits while a file asks for that."""
    flag, hold = (Path(os.environ[FLAGS], f"{what}.{role}") for what in ("fail", "hold"))
    if flag.exists():
        flag.unlink()
        raise ZeroDivisionError("chaos")
    time.sleep(share * float(os.environ[PAUSE]))
    while hold.exists():
        time.sleep(0.02)
        beat()


class ChaosGuess(Guess):
    """Waits where it is asked to, and says that it does."""

    async def step(self, message: dict[str, Any]) -> Any:
        """The game's own."""
        flags = Path(os.environ[FLAGS])
        while (flags / f"hold.{ENVIRONMENT}").exists():
            (flags / REACHED).touch()
            await asyncio.sleep(0.02)
        return await super().step(message)


class ChaosEngine(LightEngine):
    """Waits and fails when it is asked to."""

    def _generate(self, *arguments: Any) -> Any:
        work("rollout")
        return super()._generate(*arguments)


class ChaosTeacher(LocalTeacher):
    """Waits and fails when it is asked to."""

    def score(self, *arguments: Any, **keywords: Any) -> Any:
        """The teacher's own, except in its first call, which belongs to the start."""
        if hasattr(self, "_probe_logprob"):
            work("teacher.default", 0.25)
        return super().score(*arguments, **keywords)


class ChaosLearner(Learner):
    """Waits and fails when it is asked to."""

    def update(self, *arguments: Any, **keywords: Any) -> Any:
        """The learner's own."""
        work("learner", 0.25)
        return super().update(*arguments, **keywords)


class Chaos:
    """Does the faults in turn, each when the campaign has recovered from the one before."""

    def __init__(self, run_dir: Path, faults: Sequence[Fault], flags: Path, hold: bool, roles: Sequence[str] = ROLES):
        """hold: as the module says. roles: those whose fleets there are."""
        self.roles = roles
        self.fleets: dict[str, Fleet] = {}
        self.starts: dict[str, list[float]] = {}
        """Actor -> seconds that each of its starts took."""
        self.rows: list[dict[str, Any]] = []
        self.stopped: set[int] = set()
        """Processes that are to be found hanging."""
        self._run_dir, self._faults, self._flags, self._holding = run_dir, list(faults), flags, hold
        self._task: asyncio.Task | None = None

    def begin(self) -> None:
        """Begins with the faults when the last fleet has started."""
        if self._task is None and set(self.fleets) == set(self.roles):
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        for fault in self._faults:
            await self._until(lambda fault=fault: self._step() >= fault.after)
            row: dict[str, Any] = {**asdict(fault), "wedged": False}
            self.rows.append(row)
            try:
                await self._do(fault, row)
            except TimeoutError:
                row["wedged"] = True
            finally:
                self._hold()

    async def _do(self, fault: Fault, row: dict[str, Any]) -> None:
        seen = len(self._events())
        if fault.kind == "raise":
            began = time.monotonic()
            (self._flags / f"fail.{fault.role}").touch()
        else:
            victim = await self._victim(fault)
            began = time.monotonic()
            if victim is None:
                os.kill(os.getpid(), signal.SIGKILL)
                return
            if fault.kind == "stop":
                self.stopped.add(victim.process)
            os.kill(victim.process, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
            self._hold("rollout")
        lost = await self._event(seen, ("actor_died", "actor_hung", "actor_failed"))
        row["seconds_to_notice"] = time.monotonic() - began
        self._hold("rollout")  # without rollouts the campaign does not end before it has recovered
        await self._event(seen, ("learner_restored" if fault.role == "learner" else "actor_restarted",))
        row["seconds_to_recover"] = time.monotonic() - began
        row["told_as"], row["actor"] = lost["kind"], lost["actor"]
        row["seconds_of_start"] = self.starts[lost["actor"]][-1]

    async def _victim(self, fault: Fault) -> Replica | None:
        """An actor in the state that the fault asks for; None for this process."""
        if fault.in_episode:
            (self._flags / REACHED).unlink(missing_ok=True)
            self._hold(ENVIRONMENT)
            await self._until((self._flags / REACHED).exists)
        if fault.role == CAMPAIGN:
            return None
        if fault.role == ENVIRONMENT:  # other actors call it, so its fleet does not know whether it is at work
            return await self._with_episodes()
        if not fault.in_episode:
            # A role that is held is soon at work for good, and the roles that wait for its results are soon idle for good.
            self._hold(fault.role if fault.busy else "learner" if fault.role == "rollout" else "rollout")
        while True:
            for replica in self.fleets[fault.role].replicas:
                if replica.alive and bool(replica.busy) == fault.busy:
                    return replica
            await asyncio.sleep(0.001)

    async def _with_episodes(self) -> Replica:
        while True:
            for replica in self.fleets[ENVIRONMENT].replicas:
                if replica.alive and (await invoke(replica.handle, "status", (), 1))["episodes"]:
                    return replica
            await asyncio.sleep(0.001)

    def _hold(self, role: str = "") -> None:
        """From now on the calls of this role, and of no other, wait where they begin."""
        if self._holding:
            if role:
                (self._flags / f"hold.{role}").touch()
            for other in set(self.roles) - {role}:
                (self._flags / f"hold.{other}").unlink(missing_ok=True)

    async def _event(self, seen: int, kinds: Sequence[str]) -> dict[str, Any]:
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = [event for event in self._events()[seen:] if event["kind"] in kinds]
            return bool(found)

        await self._until(there)
        return found[0]

    async def _until(self, condition: Any) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not condition():
                await asyncio.sleep(0.02)

    def _events(self) -> list[dict[str, Any]]:
        return read_jsonl(self._run_dir / "events.jsonl")

    def _step(self) -> int:
        return max((row["step"] for row in read_jsonl(self._run_dir / "metrics.jsonl")), default=-1)


def fleet_under(chaos: Chaos, base: type[Fleet] = Fleet) -> type[Fleet]:
    """A fleet that reports its starts to `chaos`, and is deaf to false alarms."""

    class FleetUnderChaos(base):  # type: ignore[valid-type, misc]
        async def start(self, *, patient: bool = False) -> None:
            await super().start(patient=patient)
            chaos.fleets[self.role] = self
            chaos.begin()

        async def _start(self, replica: Replica, *, patient: bool = False) -> None:
            began = time.monotonic()
            await super()._start(replica, patient=patient)
            chaos.starts.setdefault(replica.name, []).append(time.monotonic() - began)

        def _hangs(self, replica: Replica, handle: Any, cause: str) -> None:
            # With a short hang timeout an actor that is only slow, on a busy machine, would be taken for hung.
            if replica.process in chaos.stopped:
                super()._hangs(replica, handle, cause)

    return FleetUnderChaos


def main() -> None:
    """Runs the campaign and writes RESULT."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("schedule", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--hold", action="store_true")
    options = parser.parse_args()
    flags = options.result.with_suffix(".flags")
    flags.mkdir()
    os.environ |= {PAUSE: str(options.pause), FLAGS: str(flags.resolve())}
    config = load_config(options.config, ["rollout.backend=tests.chaos_campaign:ChaosEngine"])
    faults = [Fault(**row) for row in json.loads(options.schedule.read_text())]
    roles = ROLES if config.environment is None else (*ROLES, ENVIRONMENT)
    chaos = Chaos(config.run_dir, faults, flags, options.hold, roles)
    here: Any = cluster.roles
    here.Fleet, here.Learner = fleet_under(chaos), ChaosLearner
    here.EnvironmentFleet = fleet_under(chaos, EnvironmentFleet)
    here.teacher_class = lambda *_: ChaosTeacher
    began = time.monotonic()
    summary, _ = cluster.run.run_campaign(config)
    seconds = time.monotonic() - began
    # `default_worker`: what stands for an actor's process in a Python of tests/warm_python.py.
    commands = map(command_of, below())
    left = [command for command in commands if "ray::" in str(command) or "default_worker" in str(command)]
    found = {"faults": chaos.rows, "seconds": seconds, "orphans": left, "summary": summary, "starts": chaos.starts}
    options.result.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
