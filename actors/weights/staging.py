"""Where a weight version lies while an engine loads it: in memory that is kept from version to version.

Buckets come in pageable memory, from which a GPU copies at a fraction of the rate of pinned memory, and which other
processes cannot map. They are copied before the load, while the engine goes on; during the load it stands still.
"""

import mmap
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from actors.heartbeat import beat
from actors.weights.buckets import Buffer, as_tensor, in_threads


class _Block(Protocol):
    def of(self, size: int) -> np.ndarray: ...


class Staging:
    """Kept memory for one version: a block for each of its buckets, in pinned memory where there is a GPU."""

    block: type[_Block] = Buffer

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._free = threading.Lock()

    def stage(self, buckets: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The same bytes in kept memory, which stays as it is until `release`. Buckets that are pinned are not copied.

        Waits while the version before is still being loaded from there. Copies in as many threads as torch may use.
        """
        self._free.acquire()
        try:
            self._blocks += [self.block() for _ in range(len(buckets) - len(self._blocks))]
            staged = list(buckets)
            moved = [number for number, bucket in enumerate(buckets) if not self._in_place(bucket)]

            def copy(number: int) -> None:
                beat()
                staged[number] = self._blocks[number].of(buckets[number].nbytes)
                np.copyto(staged[number], buckets[number])

            in_threads(copy, moved, nbytes=sum(buckets[number].nbytes for number in moved))
            return staged
        except BaseException:
            self._free.release()
            raise

    def release(self, _loaded: "Future | None" = None) -> None:
        """The load has ended, well or not. Any thread may call this."""
        self._free.release()

    def _in_place(self, bucket: np.ndarray) -> bool:
        """Whether the workers read this bucket best where it is."""
        return as_tensor(bucket, "uint8", bucket.shape, 0, bucket.nbytes).is_pinned()  # a decoded delta


class SharedBlock:
    """Memory that other processes of this user may map by `path`. It ends with the last of them, however they end."""

    def __init__(self) -> None:
        # No file in /dev/shm: that would be left behind by a process that is killed, and is 64 MB in many containers.
        self._file = os.fdopen(os.memfd_create("weights"), "r+b", buffering=0)
        self._bytes = np.empty(0, np.uint8)
        self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"

    def of(self, size: int) -> np.ndarray:
        """[size] uint8, the same memory at each call."""
        if size > len(self._bytes):
            self._file.truncate(size)
            self._bytes = np.frombuffer(mmap.mmap(self._file.fileno(), size), np.uint8)
        return self._bytes[:size]


class Shared(Staging):
    """The same in memory that workers in other processes map."""

    block = SharedBlock

    def paths(self, count: int) -> list[str]:
        """The paths of the first `count` blocks, in the order of the buckets that were staged last."""
        return [block.path for block in self._blocks[:count]]  # type: ignore[attr-defined]

    def _in_place(self, bucket: np.ndarray) -> bool:
        return False


def staging_for(device: str, other_processes: bool) -> Staging | None:
    """For an engine on this device, whose workers may be in other processes. None: it reads buckets best where they are."""
    if other_processes:
        return Shared()
    return None if device == "cpu" else Staging()
