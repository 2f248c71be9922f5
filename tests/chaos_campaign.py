"""A campaign in which actors are killed, stopped and made to fail on a schedule: real Ray, fleets, learner and teachers.

Rollout actors are light (no engine), so that a new one starts as fast as its imports. As a program:

    python -m tests.chaos_campaign CONFIG SCHEDULE RESULT [--pause SECONDS] [--hold]

SCHEDULE is a JSON list of faults, RESULT gets one row for each that was done. --pause: what a rollout actor sleeps for
each call, and the others a quarter of it, so that updates take as long as those of a real campaign. --hold: the campaign waits until it has recovered.
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

import psutil

import cluster.roles
import cluster.run
from actors.heartbeat import beat
from actors.teacher.local import TeacherActor
from cluster.config_file import load_config
from cluster.fleet.ray_actor import Replica
from cluster.fleet.ray_fleet import Fleet
from cluster.records.writer import read_jsonl
from learner.learner import Learner
from tests.light_campaign import LightRollout

ROLES = ("rollout", "teacher.default", "learner")
KINDS = ("kill", "stop", "raise")
PAUSE, FLAGS = "CHAOS_PAUSE", "CHAOS_FLAGS"
"""Environment of the actors: seconds, and the folder whose files ask a role to fail."""
HOLD = "hold"
"""While there is a file of this name, no rollout actor answers: the campaign does not end before it has recovered."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    role: str
    kind: str
    """`kill` is SIGKILL, `stop` SIGSTOP, `raise` an exception in its next call."""
    busy: bool
    """Whether the actor is at work then."""
    after: int
    """The first update that must have been done."""


def schedule(seed: int, first: int, every: int, count: int | None = None) -> list[Fault]:
    """Every role, kind and state (what raises is at work by nature) in a seeded order, one each `every` updates."""
    matrix = [one for one in itertools.product(ROLES, KINDS, (False, True)) if one[1] != "raise" or one[2]]
    random.Random(seed).shuffle(matrix)
    return [Fault(*one, first + every * place) for place, one in enumerate(matrix[:count])]


def fails_if_asked(role: str) -> None:
    """Of an actor: raises what nobody expects, once, where a file asks for it."""
    flag = Path(os.environ[FLAGS], role)
    if flag.exists():
        flag.unlink()
        raise ZeroDivisionError("chaos")


class ChaosRollout(LightRollout):
    """Slower, and fails when it is asked to."""

    def generate(self, *arguments: Any, **keywords: Any) -> Any:
        """As LightRollout."""
        fails_if_asked("rollout")
        time.sleep(float(os.environ[PAUSE]))
        while Path(os.environ[FLAGS], HOLD).exists():
            time.sleep(0.05)
            beat()
        return super().generate(*arguments, **keywords)


class ChaosTeacher(TeacherActor):
    """Fails when it is asked to."""

    def score(self, *arguments: Any, **keywords: Any) -> Any:
        """As TeacherActor."""
        if hasattr(self, "_probe_logprob"):
            fails_if_asked("teacher.default")
            time.sleep(float(os.environ[PAUSE]) / 4)
        return super().score(*arguments, **keywords)


class ChaosLearner(Learner):
    """Fails when it is asked to."""

    def update(self, *arguments: Any, **keywords: Any) -> Any:
        """As Learner."""
        fails_if_asked("learner")
        time.sleep(float(os.environ[PAUSE]) / 4)
        return super().update(*arguments, **keywords)


class Chaos:
    """Does the faults in turn, each when the one before has been recovered from."""

    def __init__(self, run_dir: Path, faults: Sequence[Fault], flags: Path, patience: float, hold: bool):
        """hold: the campaign waits until it has recovered from a fault; else it goes on meanwhile."""
        self.fleets: dict[str, Fleet] = {}
        self.starts: dict[str, list[float]] = {}
        """Actor -> seconds that each of its starts took."""
        self.rows: list[dict[str, Any]] = []
        self._run_dir, self._faults, self._flags, self._patience = run_dir, list(faults), flags, patience
        self._holding = hold
        self._begun: asyncio.Task | None = None

    def begin(self) -> None:
        """Once all fleets are there."""
        if self._begun is None and set(self.fleets) == set(ROLES):
            self._begun = asyncio.create_task(self._run())

    async def _run(self) -> None:
        for fault in self._faults:
            await self._until(lambda fault=fault: self._step() >= fault.after, 600)
            row: dict[str, Any] = {**asdict(fault), "wedged": False}
            self.rows.append(row)
            try:
                await self._do(fault, row)
            except TimeoutError:
                row["wedged"] = True
            finally:
                (self._flags / HOLD).unlink(missing_ok=True)

    async def _do(self, fault: Fault, row: dict[str, Any]) -> None:
        seen = len(self._events())
        victim = await self._victim(fault)
        began = time.monotonic()
        if fault.kind == "raise":
            (self._flags / fault.role).touch()
        else:
            os.kill(victim.process, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
            self._hold()
        back = "learner_restored" if fault.role == "learner" else "actor_restarted"
        lost = await self._event(seen, ("actor_died", "actor_hung", "actor_failed"))
        row["seconds_to_notice"] = time.monotonic() - began
        self._hold()
        await self._event(seen, (back,))
        row["seconds_to_recover"] = time.monotonic() - began
        row["told_as"], row["actor"] = lost["kind"], lost["actor"]
        row["seconds_of_start"] = self.starts[lost["actor"]][-1]

    def _hold(self) -> None:
        if self._holding:
            (self._flags / HOLD).touch()

    async def _victim(self, fault: Fault) -> Replica:
        while True:
            for replica in self.fleets[fault.role].replicas:
                if replica.alive and bool(replica.busy) == fault.busy:
                    return replica
            await asyncio.sleep(0.001)

    async def _event(self, seen: int, kinds: Sequence[str]) -> dict[str, Any]:
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = [event for event in self._events()[seen:] if event["kind"] in kinds]
            return bool(found)

        await self._until(there, self._patience)
        return found[0]

    async def _until(self, condition: Any, seconds: float) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.02)

    def _events(self) -> list[dict[str, Any]]:
        return read_jsonl(self._run_dir / "events.jsonl")

    def _step(self) -> int:
        return max((row["step"] for row in read_jsonl(self._run_dir / "metrics.jsonl")), default=-1)


def shaken(chaos: Chaos) -> type[Fleet]:
    """The fleet that tells of itself."""

    class Shaken(Fleet):
        async def start(self, *, patient: bool = False) -> None:
            await super().start(patient=patient)
            chaos.fleets[self.role] = self
            chaos.begin()

        async def _start(self, replica: Replica, *, patient: bool = False) -> None:
            began = time.monotonic()
            await super()._start(replica, patient=patient)
            chaos.starts.setdefault(replica.name, []).append(time.monotonic() - began)

    return Shaken


def main() -> None:
    """As the module says."""
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
    config = load_config(options.config)
    faults = [Fault(**row) for row in json.loads(options.schedule.read_text())]
    chaos = Chaos(config.run_dir, faults, flags, patience=config.ray.hang_timeout_seconds * 3 + 60, hold=options.hold)
    here: Any = cluster.roles
    here.Fleet, here.RolloutActor, here.Learner = shaken(chaos), ChaosRollout, ChaosLearner
    here.teacher_class = lambda *_: ChaosTeacher
    began = time.monotonic()
    summary, _ = cluster.run.run_campaign(config)
    seconds = time.monotonic() - began
    left = [child.cmdline() for child in psutil.Process().children(recursive=True) if "ray::" in str(child.cmdline())]
    found = {"faults": chaos.rows, "seconds": seconds, "orphans": left, "summary": summary, "starts": chaos.starts}
    options.result.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
