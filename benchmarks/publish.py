"""Time to bring a weight version from one process to four, over one memory copy and a pickled state_dict; and for how long
an engine stands still while it loads one. Prints two tables.

    python -m benchmarks.publish [--mebibytes 512] [--readers 4] [--rounds 5] [--ranks 4]

`versions` is what a campaign does (cluster/loop/weight_sync.py): it lays out buckets with checksums and streams them into the
object store, where every reader verifies them in place. `pickled state_dict` is the simplest way: pickle.dumps, one object,
pickle.loads in every reader, no check. Neither includes an engine. The ways take turns; the best of several rounds counts.

The second table has the two parts of a load, of a version with the rows of several ranks, into parameters on the GPU where
there is one: before, tensors were verified one after the other, and the engine stood still while rows were concatenated in
fresh memory and copied. After, they are verified and staged in as many threads as torch may use, beside the engine, and rows
are copied straight to their places. `--mebibytes` counts in both.
"""

import argparse
import asyncio
import logging
import os
import pickle
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch

from actors.trajectory import LoadSeconds
from actors.weights.buckets import (
    WeightVersion,
    copy_rows,
    join,
    pack_all,
    rows_of,
    unpack,
    verify,
    verify_sizes,
    verify_tensor,
    window,
)
from actors.weights.delta import Receiver
from actors.weights.staging import Staging
from cluster.config import WeightsConfig
from cluster.fleet.ray_actor import Resources
from cluster.fleet.ray_fleet import Fleet
from cluster.loop.weight_sync import ObjectStoreTransport
from learner.student.publishing import Publisher

BUCKET_BYTES = 64 << 20


class Writer:
    """A learner with weights in bfloat16 and without an optimizer."""

    def __init__(self, mebibytes: int):
        self._version = 0
        self._publisher = Publisher(BUCKET_BYTES, keep=False)
        self._weights = {f"layer.{i}": torch.randn(4 << 19).bfloat16() for i in range(mebibytes // 4)}

    def status(self) -> None:
        """Alive."""

    def publish(self, delta: bool = False) -> Iterator[Any]:
        """Publishes a version as the learner does."""
        self._version += 1
        yield from self._publisher.full(self._version, list(self._weights.items()), "bfloat16")

    def pickled(self) -> bytes:
        """All weights in one object."""
        return pickle.dumps(self._weights, protocol=pickle.HIGHEST_PROTOCOL)


class Reader:
    """A rollout actor without an engine."""

    def status(self) -> None:
        """Alive."""

    def prefetch(self, bucket: np.ndarray) -> None:
        """Does nothing, as in the rollout actor."""

    def load_weights(self, *published: np.ndarray | WeightVersion) -> LoadSeconds:
        """Verifies every tensor."""
        join(Receiver(False).receive(*published))
        return LoadSeconds(0.0, 0.0)

    def unpickle(self, content: bytes) -> int:
        """Unpickles the state_dict."""
        return len(pickle.loads(content))


def fleet(role: str, actor: type, *arguments: Any, replicas: int = 1) -> Fleet:
    """A fleet of real actors."""
    return Fleet(
        role, actor, arguments, {}, replicas=replicas, resources=Resources(0.1, 0), max_restarts=0,
        start_timeout_seconds=120.0, on_event=lambda kind, **_: None,
    )  # fmt: skip


async def measure(mebibytes: int, readers: int, rounds: int) -> dict[str, float]:
    """Way -> seconds, the best of the rounds."""
    writer, reading = fleet("learner", Writer, mebibytes), fleet("rollout", Reader, replicas=readers)
    best: dict[str, float] = {}
    source = np.random.default_rng(0).integers(0, 255, mebibytes << 20, dtype=np.uint8)
    target = np.empty_like(source)

    def note(name: str, start: float) -> None:
        best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)

    try:
        await asyncio.gather(writer.start(), reading.start())
        versions = ObjectStoreTransport(writer, reading, WeightsConfig())
        for _ in range(rounds):
            start = time.perf_counter()
            np.copyto(target, source)
            note("memcpy", start)
            start = time.perf_counter()
            await versions.load(await versions.publish())
            note("versions", start)
            start = time.perf_counter()
            content = writer.replicas[0].handle.pickled.remote()
            await asyncio.gather(*(replica.handle.unpickle.remote(content) for replica in reading.replicas))
            note("pickled state_dict", start)
            del content
    finally:
        writer.close()
        reading.close()
    return best


def work(mebibytes: int, rounds: int) -> dict[str, float]:
    """Part of the work -> processor seconds of one thread, the best of the rounds: what no schedule can do without."""
    named = [(f"layer.{i}", torch.randn(4 << 19).bfloat16()) for i in range(mebibytes // 4)]
    publisher, best = Publisher(BUCKET_BYTES, keep=False), dict.fromkeys(("layout", "copy", "verify"), float("inf"))
    store = np.zeros(mebibytes << 20, np.uint8)

    def note(part: str, start: float) -> None:
        best[part] = min(best[part], time.thread_time() - start)

    for _ in range(rounds):
        start = time.thread_time()
        for _ in publisher.full(1, named, "bfloat16"):
            pass
        note("layout", start)
        manifest, buckets = pack_all(1, named, "bfloat16", BUCKET_BYTES)
        start = time.thread_time()
        for bucket in buckets:
            store[: len(bucket)] = bucket
        note("copy", start)
        start = time.thread_time()
        for entry in manifest.tensors:
            verify_tensor(1, entry, window(entry, buckets))
        note("verify", start)
    return best


def load_seconds(mebibytes: int, ranks: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Way -> seconds (prepared beside the engine, standing still), the best of the rounds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = [(f"layer.{i}", torch.randn(1 << 10, 4 << 9).bfloat16()) for i in range(mebibytes // 4)]
    parts = [
        pack_all(1, [(name, tensor.chunk(ranks)[rank]) for name, tensor in named], "bfloat16", BUCKET_BYTES)
        for rank in range(ranks)
    ]
    manifest, buckets = join(parts)
    parameters = {name: tensor.to(device) for name, tensor in named}
    staging = Staging()

    def before() -> tuple[float, float, float]:
        start = time.perf_counter()
        verify_sizes(manifest, buckets)
        for entry in manifest.tensors:
            verify_tensor(1, entry, window(entry, buckets))
        prepared = time.perf_counter()
        for name, tensor in unpack(manifest, buckets):
            parameters[name].copy_(tensor)
        return start, prepared, time.perf_counter()

    def after() -> tuple[float, float, float]:
        start = time.perf_counter()
        verify(manifest, buckets)
        staged = staging.stage(manifest, buckets)
        prepared = time.perf_counter()
        for name, rows in rows_of(manifest, staged):
            copy_rows(rows, parameters[name])
        if device.type == "cuda":
            torch.cuda.synchronize()
        staging.release()
        return start, prepared, time.perf_counter()

    best = {}
    for way in (before, after):
        taken = [way() for _ in range(rounds + 1)][1:]  # the first fills kept memory, once in a campaign
        best[way.__name__] = (min(b - a for a, b, _ in taken), min(c - b for _, b, c in taken))
    for name, tensor in named:
        assert torch.equal(parameters[name].cpu(), tensor)
    return best


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    options = parser.parse_args()
    parts = work(options.mebibytes, options.rounds)
    loads = load_seconds(options.mebibytes, options.ranks, options.rounds)
    ray.init(
        address="local", include_dashboard=False, num_cpus=8, log_to_driver=False, logging_level=logging.ERROR,
        object_store_memory=(options.mebibytes * 4) << 20,
    )  # fmt: skip
    best = asyncio.run(measure(options.mebibytes, options.readers, options.rounds))
    print("| way | seconds | over one memcpy |\n|---|---|---|")
    for name, seconds in best.items():
        print(f"| {name} | {seconds:.3f} | {seconds / best['memcpy']:.1f} |")
    least = parts["layout"] + parts["copy"] + options.readers * parts["verify"]
    told = ", ".join(f"{part} {seconds / best['memcpy']:.2f}" for part, seconds in parts.items())
    cores = os.cpu_count() or 1
    print(f"\nprocessor time over one memcpy: {told}; with {options.readers} readers {least / best['memcpy']:.1f}, "
          f"on {cores} cores at least {least / best['memcpy'] / cores:.1f}")  # fmt: skip
    print(f"\npickled / versions: {best['pickled state_dict'] / best['versions']:.1f}\n")
    print("| load | prepared beside the engine (s) | standing still (s) |\n|---|---|---|")
    for name, (prepared, still) in loads.items():
        print(f"| {name} | {prepared:.3f} | {still:.3f} |")
    print(f"\nstanding still, before / after: {loads['before'][1] / loads['after'][1]:.1f}")


if __name__ == "__main__":
    main()
