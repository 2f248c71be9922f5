"""Counts the small steps that this process takes, so that its supervisor can tell work from a hang.

A role calls `beat` at every small step (a step of the engine, a micro-batch, an answer from a server), however long its
calls take. The supervisor reads `count` in a thread beside the work: where calls are open and the count stands still,
the actor hangs.
"""

_count = 0


def beat() -> None:
    """Counts one more small step."""
    global _count
    _count += 1


def count() -> int:
    """Number of steps that this process has taken."""
    return _count
