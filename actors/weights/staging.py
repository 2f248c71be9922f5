"""Where a weight version lies while an engine loads it: in memory that is kept from version to version.

Buckets come in pageable memory, from which a GPU copies at a fraction of the rate of pinned memory, and which other
processes cannot map. They are copied before the load, while the engine goes on; during the load it stands still.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from actors.heartbeat import beat
from actors.weights.buckets import Buffer, WeightVersion, as_tensor, in_threads
from actors.weights.node_staging import NodeStaging


class Staging:
    """Kept memory for one version: a block for each of its buckets, in pinned memory where there is a GPU."""

    def __init__(self) -> None:
        self._blocks: list[Buffer] = []
        self._free = threading.Lock()

    def stage(self, _manifest: WeightVersion, buckets: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The same bytes in kept memory, which stays as it is until `release`. Buckets that are pinned are not copied.

        Deltas are decoded into pinned memory: then the block that the first, dense version was copied to is given up.
        Waits while the version before is still being loaded from there. Copies in as many threads as torch may use.
        """
        self._free.acquire()
        try:
            self._blocks += [Buffer() for _ in range(len(buckets) - len(self._blocks))]
            staged = list(buckets)
            moved = [number for number, bucket in enumerate(buckets) if not self._in_place(bucket)]
            for number in set(range(len(self._blocks))) - set(moved):
                self._blocks[number] = Buffer()

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


def staging_for(device: str, other_processes: str) -> "Staging | NodeStaging | None":
    """For an engine on this device. None: it reads buckets best where they are.

    other_processes: "" for workers in this process; else the name that all engines of this campaign have in common, which
    then share one copy on each node.
    """
    if other_processes:
        return NodeStaging(other_processes)
    return None if device == "cpu" else Staging()
