"""How far this process has come with its work: what tells an actor that works from one that hangs.

A role counts at every small step (an engine's step, a micro-batch, an answer from a server), whatever its calls take as
a whole. Whoever supervises it asks for the count, beside the work.
"""

_steps = 0


def advance() -> None:
    """One more small step has been taken."""
    global _steps
    _steps += 1


def steps() -> int:
    """Taken so far by this process."""
    return _steps
