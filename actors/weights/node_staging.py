"""One copy of a weight version for all engines of a node whose workers are other processes, which map it.

vLLM's tensor-parallel workers cannot read what is in the memory of their engine's process. The first engine of a node that
gets a version copies it into memory that all processes of this user can map; the others find it there.

    meeting file   says which version lies where. An engine holds its lock shared while its workers read, exclusively while
                   it copies a version: so none is overwritten under a reader.
    segment        anonymous memory (memfd). It ends with the last process that has it open, however that process ends, and
                   is no file in /dev/shm, which is 64 MB in many containers.
"""

import fcntl
import hashlib
import json
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from actors.errors import CampaignError
from actors.heartbeat import beat
from actors.weights.buckets import WeightVersion, in_threads

PAGE_BYTES = mmap.ALLOCATIONGRANULARITY
"""Buckets begin at multiples of this, so that they can be mapped one by one."""
POLL_SECONDS = 0.01


class Place(NamedTuple):
    """Where a bucket lies."""

    path: str
    offset: int
    nbytes: int


class NodeStaging:
    """The node's copy, as one engine uses it. `stage` before the load, `release` after it."""

    def __init__(self, name: str):
        """name: equal for all engines of the node that load the same versions, and for no others."""
        self.copies = 0
        """Versions that this engine has copied."""
        self._path = Path(tempfile.gettempdir(), f"understudy-{os.getuid()}-{name}.weights")
        self._meeting: Any = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if os.fstat(self._meeting).st_uid != os.getuid():
            raise CampaignError(f"{self._path}: found a file of another user, expected none or our own")
        self._segment: int | None = None
        self._mapped = np.empty(0, np.uint8)
        self._free = threading.Lock()
        """Held while a version is being loaded."""

    def stage(self, manifest: WeightVersion, buckets: Sequence[np.ndarray]) -> list[Place]:
        """Where this version lies on the node, in the order of its buckets; copies it there unless it is there.

        It stays there until `release`. Waits while another version is read or copied.
        """
        self._free.acquire()
        try:
            version, ends = (
                _digest(manifest),
                np.cumsum([-(-size // PAGE_BYTES) * PAGE_BYTES for size in manifest.bucket_bytes]),
            )
            offsets = [0, *ends[:-1].tolist()]
            while True:
                self._lock(fcntl.LOCK_SH)
                if self._there(version):
                    break
                self._lock(fcntl.LOCK_EX)  # the shared lock is given up meanwhile, so another may be faster
                if not self._there(version):
                    self._copy(version, buckets, offsets, int(ends[-1]))
            path = _path_of(self._segment)
            return [Place(path, *rest) for rest in zip(offsets, manifest.bucket_bytes, strict=True)]
        except BaseException:
            self.release()
            raise

    def release(self, _loaded: "Future | None" = None) -> None:
        """The load has ended, well or not. Any thread may call this."""
        fcntl.flock(self._meeting, fcntl.LOCK_UN)
        self._free.release()

    def close(self) -> None:
        """Gives up this engine's hold of the segment. The meeting file, of 150 bytes, stays for the others."""
        self._mapped = np.empty(0, np.uint8)
        for descriptor in (self._segment, self._meeting):
            if descriptor is not None:
                os.close(descriptor)
        self._segment = self._meeting = None

    def _lock(self, how: int) -> None:
        """Waits with signs of life: a holder that hangs is ended by its own watch, and its locks with it."""
        while True:
            try:
                return fcntl.flock(self._meeting, how | fcntl.LOCK_NB)
            except BlockingIOError:
                beat()
                time.sleep(POLL_SECONDS)

    def _there(self, version: str) -> bool:
        """Whether the segment holds this version; opens it."""
        told = self._told()
        return told.get("version") == version and self._open(told)

    def _told(self) -> dict[str, Any]:
        """What the meeting file says; {} for a new one, and where the last copy or the machine was broken off."""
        with suppress(ValueError):
            return json.loads(os.pread(self._meeting, 4096, 0))
        return {}

    def _open(self, told: dict[str, Any]) -> bool:
        """Opens the segment that the meeting file names; False: it is gone, with all that had it open."""
        if self._segment is not None and _identity(self._segment) == told["identity"]:
            return True
        with suppress(OSError):
            found = os.open(told["path"], os.O_RDWR)
            if _identity(found) == told["identity"]:  # the number of a process may have been given to another
                self._use(found)
                return True
            os.close(found)
        return False

    def _use(self, segment: int) -> None:
        if self._segment is not None:
            os.close(self._segment)
        self._segment, self._mapped = segment, np.empty(0, np.uint8)

    def _copy(self, version: str, buckets: Sequence[np.ndarray], offsets: list[int], size: int) -> None:
        """Copies a version into the segment. The lock is held exclusively."""
        told = self._told()
        if not (told and self._open(told)):
            self._use(os.memfd_create("weights"))
        assert self._segment is not None
        os.ftruncate(self._meeting, 0)  # until the copy is complete it is no version
        if size > os.fstat(self._segment).st_size:
            os.ftruncate(self._segment, size)
        if size > len(self._mapped):
            self._mapped = np.frombuffer(mmap.mmap(self._segment, size), np.uint8)

        def copy(bucket: np.ndarray, offset: int) -> None:
            beat()
            np.copyto(self._mapped[offset : offset + bucket.nbytes], bucket)

        in_threads(copy, buckets, offsets, nbytes=size)
        self.copies += 1
        now = {"version": version, "path": _path_of(self._segment), "identity": _identity(self._segment)}
        os.pwrite(self._meeting, json.dumps(now).encode(), 0)


def mapped(place: Place) -> np.ndarray:
    """The bucket at a place, [nbytes] uint8, to be read only. mmap refuses what is empty: a rank without rows has such a bucket."""
    path, offset, nbytes = place
    return np.memmap(path, np.uint8, "r", offset, (nbytes,)) if nbytes else np.empty(0, np.uint8)


def _identity(descriptor: int) -> list[int]:
    """Of the file that is open, among all of this machine."""
    found = os.fstat(descriptor)
    return [found.st_dev, found.st_ino]


def _path_of(descriptor: int | None) -> str:
    """By which other processes of this user open it while this process lives."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _digest(manifest: WeightVersion) -> str:
    """Equal for versions that have the same bytes at the same places: a number alone comes again after a rollback."""
    return hashlib.blake2b(
        repr((manifest.version, manifest.bucket_bytes, manifest.tensors)).encode(), digest_size=16
    ).hexdigest()
