"""How far a new actor's start has come: a thread in its process tells, the campaign reads.

Ray delivers no call to an actor before its constructor has ended, and that is where models are downloaded and loaded. So
the process writes to Ray's key-value store, in one entry of its own, whenever it has made progress: a step was counted
(actors/heartbeat.py: bytes of a download, a loaded model), or it and its children have read or filled STEP_BYTES more.
"""

import resource
import threading
from contextlib import suppress
from typing import Any

import psutil
import ray
from ray.experimental import internal_kv

from actors.heartbeat import count, doing

TELL_SECONDS = 1.0
"""Between two looks of the thread."""
STEP_BYTES = 16 << 20
NAMESPACE = b"understudy"


class Teller:
    """The thread in the actor's process."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        # Outside Ray there is nobody to tell.
        self._key = (ray.get_runtime_context().get_actor_id() or "") if ray.is_initialized() else ""
        self._progress, self._most, self._steps, self._told = 0, 0, -1, ""
        if self._key:
            threading.Thread(target=self._run, name="start", daemon=True).start()

    def end(self) -> None:
        """The actor has started."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(TELL_SECONDS):
            with suppress(Exception):  # of any kind: what cannot be told must not end a start
                self._look()

    def _look(self) -> None:
        steps, filled = count(), _filled()
        if steps != self._steps or filled > self._most + STEP_BYTES:
            self._progress, self._steps, self._most = self._progress + 1, steps, max(filled, self._most)
        if (line := f"{self._progress} {doing()}") != self._told:
            internal_kv._internal_kv_put(_entry(self._key), line.encode(), overwrite=True, namespace=NAMESPACE)
            self._told = line


def told(handle: Any) -> tuple[str, str]:
    """(a text that changes with each progress, what the actor does); it blocks. ("", "") where nothing is told yet."""
    line = internal_kv._internal_kv_get(_entry(handle._actor_id.hex()), namespace=NAMESPACE) or b""
    progress, _, does = line.decode(errors="replace").partition(" ")
    return progress, does


def forget(handle: Any) -> None:
    """Removes the entry of an actor that has started; it blocks."""
    internal_kv._internal_kv_del(_entry(handle._actor_id.hex()), namespace=NAMESPACE)


def _entry(actor: str) -> bytes:
    return f"start {actor}".encode()


def _filled() -> int:
    """Bytes that this process and its children have read from disks, or hold: it grows while a model is loaded."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    total = (usage.ru_maxrss << 10) + usage.ru_majflt * resource.getpagesize()
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        with suppress(psutil.Error, OSError):
            total += process.io_counters().read_bytes + (0 if process is this else process.memory_info().rss)
    return total
