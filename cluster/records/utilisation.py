"""Measures how each actor spends its time and what that costs; writes a trace for chrome://tracing or ui.perfetto.dev.

Fleets report when a call to an actor begins and ends. At each moment an actor is in one state, so the seconds of all
states add up to the wall clock. Everything is pure except for the clock.

    busy         at least one call to generate, score, update or save is under way
    loading      its weights are replaced (rollout), or laid out to be published (learner)
    environment  its engine has nothing to write, because environments are waited for
    blocked      idle because later stages have not caught up
    waiting      idle because earlier stages have not caught up
    away         it has died, and its replacement is starting
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

STATES = ("busy", "loading", "environment", "blocked", "waiting", "away")
TRACE_FILE = "trace.json"
MAX_SLICES = 40_000
"""Most slices of a trace; above it, neighbouring slices of an actor are merged, the shortest first."""

LOADS = {"publish": "loading", "away": "away"}
"""Method whose call is not work -> state of the actor meanwhile."""
IGNORED = frozenset({"status", "abort", "saved", "load_weights"})
"""Calls that are not counted. An actor keeps working while weights arrive; `load_weights` returns how long it paused."""


@dataclass
class _Track:
    """One actor."""

    role: str
    since: float
    """When the current state began."""
    blocked_before: float
    """The role's blocked seconds at that time."""
    under_way: dict[str, int] = field(default_factory=dict)
    """Method -> calls under way."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STATES, 0.0))

    @property
    def doing(self) -> str:
        """The method that determines the state; "" for an idle actor."""
        # A method of LOADS wins over work at the same time.
        return max(self.under_way, key=lambda method: LOADS.get(method) is not None, default="")


class Utilisation:
    """Tracks all actors, from its creation on."""

    def __init__(self, actors: Mapping[str, str], clock: Callable[[], float] = time.perf_counter):
        """actors: name -> role."""
        self._clock, self._start = clock, clock()
        self._blocked: dict[str, tuple[float, float | None]] = {}
        """Role -> (seconds blocked so far, start of the current block or None)."""
        self._tracks = {name: _Track(role, self._start, 0.0) for name, role in actors.items()}
        self._slices: list[tuple[str, str, float, float]] = []
        """(actor, method, start, end) of everything except idle time."""
        self._finest = 1e-4
        """Slices with a shorter gap between them, in seconds, are merged once there are too many."""
        self._counters: list[tuple[float, dict[str, int]]] = []

    def began(self, actor: str, role: str, method: str) -> None:
        """A call to an actor begins."""
        if method not in IGNORED:
            track = self._track(actor, role)
            if method not in track.under_way:
                self._pass_time(actor, track, self._clock())
            track.under_way[method] = track.under_way.get(method, 0) + 1

    def ended(self, actor: str, role: str, method: str, answer: Any = None) -> None:
        """A call has ended. `load_weights` returns for how long the engine has paused, just before now; the counts of
        `generate` say for how long its engine has waited for environments since they last did."""
        track = self._track(actor, role)
        if (
            stood_still := getattr(answer, "stood_still", None)
        ) is not None:  # without an import of LoadSeconds, and of numpy
            self._stood_still(actor, track, stood_still)
        elif method in track.under_way:
            if track.under_way[method] == 1:
                self._pass_time(actor, track, self._clock())
                del track.under_way[method]
            else:
                track.under_way[method] -= 1
        counts = answer[0] if type(answer) is tuple else None
        self._waited(actor, track, getattr(counts, "waited_seconds", 0.0))

    def blocked(self, role: str, is_blocked: bool) -> None:
        """Whether idle actors of this role wait for later stages (blocked) instead of earlier ones (waiting)."""
        seconds, since = self._blocked.get(role, (0.0, None))
        if is_blocked != (since is not None):
            now = self._clock()
            self._blocked[role] = (seconds, now) if since is None else (seconds + now - since, None)

    def queues(self, depths: dict[str, int]) -> None:
        """Adds stage -> trajectories that wait for it now, as a counter of the trace."""
        self._counters.append((self._clock(), depths))
        if len(self._counters) > MAX_SLICES // 10:
            self._counters = self._counters[::2]

    def seconds(self) -> dict[str, dict[str, float]]:
        """Actor -> state -> seconds; for each actor they add up to the time since it was first seen."""
        now = self._clock()
        for name, track in self._tracks.items():
            self._pass_time(name, track, now)
        return {name: dict(track.seconds) for name, track in self._tracks.items()}

    def write_trace(self, path: Path) -> None:
        """Writes trace events as JSON: one track for each actor, times in microseconds since the creation."""
        self.seconds()
        numbers = {name: number for number, name in enumerate(self._tracks, 1)}
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": name}}
            for name, number in numbers.items()
        ]
        events += [
            {"ph": "X", "name": what, "cat": LOADS.get(what, "busy"), "pid": 1, "tid": numbers[actor]}
            | {"ts": self._microseconds(start), "dur": self._microseconds(end) - self._microseconds(start)}
            for actor, what, start, end in self._slices
        ]
        events += [
            {"ph": "C", "name": "queues", "pid": 1, "ts": self._microseconds(when), "args": depths}
            for when, depths in self._counters
        ]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), "utf-8")
        temporary.replace(path)

    def _microseconds(self, when: float) -> int:
        return round((when - self._start) * 1e6)

    def _track(self, actor: str, role: str) -> _Track:
        if actor not in self._tracks:  # a fleet that has grown
            now = self._clock()
            self._tracks[actor] = _Track(role, now, self._blocked_until(role, now))
        return self._tracks[actor]

    def _pass_time(self, actor: str, track: _Track, now: float, state: str = "", what: str = "") -> None:
        """Ends the current state now and begins the next. state, what: override the state and its method."""
        blocked, what = self._blocked_until(track.role, now), what or track.doing
        if what:
            track.seconds[state or LOADS.get(what, "busy")] += now - track.since
            self._add_slice((actor, what, track.since, now))
        else:
            while_blocked = min(max(blocked - track.blocked_before, 0.0), now - track.since)
            track.seconds["blocked"] += while_blocked
            track.seconds["waiting"] += now - track.since - while_blocked
        track.since, track.blocked_before = now, blocked

    def _stood_still(self, actor: str, track: _Track, seconds: float) -> None:
        now = self._clock()
        # The pause lies in the past, but not before the last change of state: that time is counted already.
        self._pass_time(actor, track, max(now - seconds, track.since))
        self._pass_time(actor, track, now, "loading", "load_weights")

    def _waited(self, actor: str, track: _Track, seconds: float) -> None:
        """Seconds that count as busy so far were waiting for environments."""
        if seconds:
            self._pass_time(actor, track, self._clock())
            moved = min(seconds, track.seconds["busy"])
            track.seconds["busy"] -= moved
            track.seconds["environment"] += moved

    def _blocked_until(self, role: str, now: float) -> float:
        seconds, since = self._blocked.get(role, (0.0, None))
        return seconds if since is None else seconds + max(now - since, 0.0)

    def _add_slice(self, new: tuple[str, str, float, float]) -> None:
        if new[3] > new[2]:
            self._slices.append(new)
        if len(self._slices) > MAX_SLICES:
            while len(self._slices) > MAX_SLICES // 2:
                self._slices = _joined(self._slices, self._finest)
                self._finest *= 2


def _joined(slices: Iterable[tuple[str, str, float, float]], gap: float) -> list[tuple[str, str, float, float]]:
    """Merges neighbouring slices of an actor with less than `gap` seconds between them: those of one method, and those of which
    one is shorter than `gap`; the longer one names both. With a large gap one slice of each actor is left."""
    last: dict[str, int] = {}
    found: list[tuple[str, str, float, float]] = []
    for actor, what, start, end in slices:
        if actor in last:
            _, before, began, ended = found[last[actor]]
            short = min(ended - began, end - start) < gap
            if start - ended < gap and (before == what or short):
                found[last[actor]] = (actor, before if ended - began >= end - start else what, began, end)
                continue
        last[actor] = len(found)
        found.append((actor, what, start, end))
    return found


def add_up(*parts: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Actor -> state -> seconds, summed over several processes of one campaign."""
    total: dict[str, dict[str, float]] = {}
    for part in parts:
        for actor, states in part.items():
            into = total.setdefault(actor, dict.fromkeys(STATES, 0.0))
            for state, seconds in states.items():
                into[state] += seconds
    return total


def mean_actors(actors: Mapping[str, Mapping[str, float]], loop_seconds: float) -> dict[str, float]:
    """Role -> mean number of actors over the loop: fleets grow, shrink and lose actors for a while."""
    present: dict[str, float] = {}
    for actor, states in actors.items():
        seconds = sum(states.values()) - states["away"]
        role = role_of(actor)
        present[role] = present.get(role, 0.0) + seconds
    return {role: seconds / loop_seconds for role, seconds in present.items()} if loop_seconds else {}


def role_of(actor: str) -> str:
    """`teacher.maths-0` -> `teacher`: all teachers count as one role."""
    return actor.partition("-")[0].partition(".")[0]


def by_role(actors: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Role -> state -> seconds of its mean actor."""
    found: dict[str, list[Mapping[str, float]]] = {}
    for actor, states in actors.items():
        found.setdefault(role_of(actor), []).append(states)
    return {
        role: {state: sum(own.get(state, 0.0) for own in several) / len(several) for state in STATES}
        for role, several in found.items()
    }


class Reserved(Protocol):
    """What an actor of one role reserves."""

    @property
    def cpus(self) -> float:
        """Processor cores."""

    @property
    def gpus(self) -> float:
        """GPUs; less than 1 for a share of one."""


def cost_of(
    actor_seconds: Mapping[str, Mapping[str, float]], reserved: Mapping[str, Reserved], tokens: int
) -> dict[str, Any]:
    """GPU and CPU hours of each role during the loop, and sampled tokens per GPU hour (None without GPUs).

    actor_seconds: actor -> state -> seconds, over all states, so that they sum to the time that the actor
    was there. reserved: what an actor of each role holds. Roles whose seconds are not known are left out, as that of environment
    actors, which rollout actors call.
    """
    known = {actor.rpartition("-")[0] for actor in actor_seconds}
    gpu_hours, cpu_hours = ({role: 0.0 for role in reserved if role in known} for _ in range(2))
    for actor, states in actor_seconds.items():
        role, hours = actor.rpartition("-")[0], sum(states.values()) / 3600
        gpu_hours[role] += hours * reserved[role].gpus
        cpu_hours[role] += hours * reserved[role].cpus
    total = sum(gpu_hours.values())
    return {
        "gpu_hours": gpu_hours,
        "cpu_hours": cpu_hours,
        "tokens_per_gpu_hour": tokens / total if total else None,
    }
