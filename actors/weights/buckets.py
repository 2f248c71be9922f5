"""Weight versions: what the learner publishes and every engine loads.

A version is a few contiguous uint8 buckets and a manifest that says where each tensor lies in them. Buckets go through
the object store once and are read in place: nothing here copies a tensor that a view can serve.

Where several ranks hold a model in rows, each publishes its own: buckets and a manifest of the rows that it has. `join`
makes one version of them, in which a tensor is several entries of one name, whose rows follow each other.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import xxhash

from actors.errors import WeightError
from actors.heartbeat import beat

ALIGNMENT_BYTES = 64
"""Tensors start at multiples of this, so that views are aligned for vector loads."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor, or the rows of it that one rank has, lies. Example: TensorEntry("model.norm.weight", "float32", (64,), 0, 128, 256, 0x1f2e…)."""

    name: str
    """Name in a Hugging Face checkpoint."""
    dtype: str
    """Name of a torch dtype."""
    shape: tuple[int, ...]
    bucket: int
    """Index of the bucket that holds it; a tensor is never split."""
    offset: int
    """Bytes from the start of the bucket."""
    nbytes: int
    checksum: int
    """xxh3-64 of its bytes."""


@dataclass(frozen=True, slots=True)
class WeightVersion:
    """The manifest of one weight version."""

    version: int
    """Policy version, 0 = initial weights."""
    tensors: tuple[TensorEntry, ...]
    bucket_bytes: tuple[int, ...]
    """Size of each bucket."""

    @property
    def nbytes(self) -> int:
        """Bytes of all buckets."""
        return sum(self.bucket_bytes)


Version = tuple[WeightVersion, Sequence[np.ndarray]]
"""A manifest and its buckets."""


def torch_dtype(name: str) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`."""
    return getattr(torch, name)


def as_tensor(buffer: np.ndarray, dtype: str, shape: tuple[int, ...], offset: int, nbytes: int) -> torch.Tensor:
    """A tensor that views `nbytes` bytes of a uint8 buffer from `offset` on; not to be written to."""
    if not nbytes:  # a rank that has no rows of it
        return torch.empty(shape, dtype=torch_dtype(dtype))
    with warnings.catch_warnings():
        # Arrays from the object store are read-only, which torch cannot express and warns about.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.frombuffer(buffer[offset : offset + nbytes], dtype=torch_dtype(dtype)).view(shape)


def _checksum(data: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(memoryview(data))  # type: ignore[arg-type]


def lay_out(shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: str, bucket_bytes: int) -> list[list[TensorEntry]]:
    """Places tensors (name, shape) one after the other into buckets of at most `bucket_bytes`; larger ones get their own."""
    itemsize = torch_dtype(dtype).itemsize
    buckets: list[list[TensorEntry]] = []
    end = bucket_bytes + 1
    for name, shape in shapes:
        nbytes = int(np.prod(shape, dtype=np.int64)) * itemsize
        start = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if start + nbytes > bucket_bytes:
            buckets.append([])
            start = 0
        buckets[-1].append(TensorEntry(name, dtype, tuple(shape), len(buckets) - 1, start, nbytes, 0))
        end = start + nbytes
    return buckets


class Buffer:
    """Memory that buckets are filled in, one after the other: the pages of new memory cost as much as filling them does."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def of(self, size: int) -> np.ndarray:
        """[size] uint8, the same memory at each call. Pinned where there is a GPU, which copies into it much faster."""
        if size > len(self._bytes):
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy()
        return self._bytes[:size]


def pack(
    version: int,
    named_tensors: "Sequence[tuple[str, torch.Tensor | Deferred]]",
    dtype: str,
    bucket_bytes: int,
    buffer: Buffer | None = None,
) -> Iterator[np.ndarray | WeightVersion]:
    """Yields the buckets ([bytes] uint8), cast to `dtype`, each as soon as it is filled; then the manifest.

    buffer: where all buckets are filled; whoever takes one has copied it before the next is asked for, as Ray does.
    """
    tensors = dict(named_tensors)
    entries: list[TensorEntry] = []
    sizes: list[int] = []
    for places in lay_out([(name, tuple(t.shape)) for name, t in named_tensors], dtype, bucket_bytes):
        size = places[-1].offset + places[-1].nbytes
        bucket = buffer.of(size) if buffer else np.empty(size, np.uint8)
        for place in places:
            # One pass does the cast, the gather and, from a GPU, the transfer.
            view = as_tensor(bucket, dtype, place.shape, place.offset, place.nbytes)
            tensor = tensors[place.name]
            view.copy_(tensor.whole() if isinstance(tensor, Deferred) else tensor.detach())
            beat()
            data = bucket[place.offset : place.offset + place.nbytes]
            entries.append(replace(place, checksum=_checksum(data)))
        sizes.append(len(bucket))
        yield bucket
    yield WeightVersion(version, tuple(entries), tuple(sizes))


@runtime_checkable
class Deferred(Protocol):
    """A tensor that is computed when it is asked for."""

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""

    def whole(self) -> torch.Tensor:
        """The tensor."""


def pack_whole(
    version: int, named_tensors: "Sequence[tuple[str, torch.Tensor | Deferred]]", dtype: str, bucket_bytes: int
) -> tuple[WeightVersion, list[np.ndarray]]:
    """All that `pack` yields, once the last bucket is filled."""
    manifest, buckets = WeightVersion(version, (), ()), []
    for part in pack(version, named_tensors, dtype, bucket_bytes):
        if isinstance(part, WeightVersion):
            manifest = part
        else:
            buckets.append(part)
    return manifest, buckets


def window(entry: TensorEntry, buckets: Sequence[np.ndarray]) -> np.ndarray:
    """The bytes of one tensor, a view."""
    return buckets[entry.bucket][entry.offset : entry.offset + entry.nbytes]


def verify(manifest: WeightVersion, buckets: Sequence[np.ndarray]) -> None:
    """WeightError unless every bucket has its size and every tensor its checksum."""
    sizes = tuple(bucket.nbytes for bucket in buckets)
    if sizes != manifest.bucket_bytes:
        raise WeightError(f"version {manifest.version}: buckets of {sizes} bytes, expected {manifest.bucket_bytes}")
    for entry in manifest.tensors:
        beat()
        found = _checksum(window(entry, buckets))
        if found != entry.checksum:
            raise WeightError(
                f"version {manifest.version}: {entry.name} has checksum {found:016x}, expected {entry.checksum:016x}"
            )


def join(ranks: Sequence[Version]) -> tuple[WeightVersion, list[np.ndarray]]:
    """One version of what each rank has published of it, all buckets in the order of the ranks. Copies nothing.

    WeightError: the ranks have published different versions.
    """
    versions = sorted({manifest.version for manifest, _ in ranks})
    if len(versions) != 1:
        raise WeightError(f"the learner's ranks have published different versions: {versions}")
    buckets = [bucket for _, own in ranks for bucket in own]
    entries: list[TensorEntry] = []
    sizes: list[int] = []
    for manifest, _ in ranks:
        entries += (replace(entry, bucket=entry.bucket + len(sizes)) for entry in manifest.tensors)
        sizes += manifest.bucket_bytes
    return WeightVersion(versions[0], tuple(entries), tuple(sizes)), buckets


def shapes(manifest: WeightVersion) -> dict[str, tuple[int, ...]]:
    """Tensor -> its shape, with the rows of all ranks."""
    found: dict[str, tuple[int, ...]] = {}
    for entry in manifest.tensors:
        before = found.get(entry.name)
        if before is not None and before[1:] == entry.shape[1:]:
            found[entry.name] = (before[0] + entry.shape[0], *entry.shape[1:])
        else:
            found[entry.name] = entry.shape
    return found


def unpack(manifest: WeightVersion, buckets: Sequence[np.ndarray]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) for every tensor: views of the buckets, but where ranks have its rows each, which are put together."""
    entries: dict[str, list[TensorEntry]] = {}
    for entry in manifest.tensors:
        entries.setdefault(entry.name, []).append(entry)
    for name, own in entries.items():
        rows = [as_tensor(buckets[e.bucket], e.dtype, e.shape, e.offset, e.nbytes) for e in own if e.nbytes]
        yield name, rows[0] if len(rows) == 1 else torch.cat(rows)
