"""Counts the small steps that this process takes, so that its supervisor can tell work from a hang.

A role calls `beat` at every small step (a step of the engine, a micro-batch, an answer from a server), however long its
calls take. The supervisor reads `count` in a thread beside the work: where calls are open and the count stands still,
the actor hangs.
"""

import time

BUILDS, LOADS = "imports and sets up", "loads its model"
"""Phases of the start of most actors."""

FIRST_WAIT_SECONDS = 0.5
"""Shortest pause before something that is away is asked again. It grows to half the time for which it has been away."""
LONGEST_WAIT_SECONDS = 30.0

_count = 0
_does = ""
_phases: list[tuple[str, float]] = []
_waits_for = ""
_waits_since = 0.0


def beat() -> None:
    """Counts one more small step."""
    global _count
    _count += 1


def count() -> int:
    """Number of steps that this process has taken."""
    return _count


def does(what: str) -> None:
    """Says what this process does while it starts, for example which model it downloads. Empty: nothing that takes long."""
    global _does
    _does = what


def phase(what: str) -> None:
    """A phase of this process's start begins, such as an import or the loading of a model; the one before ends. Empty: the
    start is over."""
    _phases.append((what, time.monotonic()))


def phases() -> list[tuple[str, float]]:
    """(name, seconds) of each phase, in their order; the last one until now."""
    ends = [*(began for _, began in _phases[1:]), time.monotonic()]
    return [(what, end - began) for (what, began), end in zip(_phases, ends, strict=False) if what]


def doing() -> str:
    """What this process has said last that it does, or the phase that its start is in."""
    return _does or (_phases[-1][0] if _phases else "")


def wait_for(what: str) -> None:
    """Says what this process waits for, something that is not ours: its supervisor tells it. Empty: for nothing."""
    global _waits_for, _waits_since
    if bool(what) != bool(_waits_for):
        _waits_since = time.monotonic()
    _waits_for = what


def waiting() -> tuple[str, float]:
    """(what this process waits for, seconds since it does); ("", 0.0) for nothing."""
    return _waits_for, time.monotonic() - _waits_since if _waits_for else 0.0
