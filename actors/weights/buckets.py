"""Weight versions: the form in which the learner publishes weights and every engine loads them.

A version is a few contiguous uint8 buckets and a manifest with the place of each tensor in them. Buckets go through the
object store once and are read in place: tensors are views, and are copied only where a view is not possible. Not a
dictionary of torch tensors: Ray copies these, which takes seconds for each GB in every actor.

If the learner has several ranks, each publishes buckets with its own rows, and their manifest. `join` joins them to one
version, in which a tensor has one entry for each rank, all with the same name, in the order of the ranks.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
import xxhash

from actors.errors import WeightError
from actors.heartbeat import beat

T = TypeVar("T")

ALIGNMENT_BYTES = 64
"""Tensors start at multiples of this, so that views are aligned for vector loads."""
SMALL_BYTES = 1 << 20
"""Below this, starting threads costs more than they save."""
DEVICE_BYTES = 256 << 20
"""A tensor above this that comes whole, from one rank, is not copied to the GPU here: its reader copies it to its final
place, so that it is not there twice."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The place of one tensor, or of one rank's rows of it, in the buckets.

    Example: TensorEntry("model.norm.weight", "float32", (64,), bucket=0, offset=128, nbytes=256, checksum=0x1f2e…).
    """

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
        """Total bytes of the buckets."""
        return sum(self.bucket_bytes)


Version = tuple[WeightVersion, Sequence[np.ndarray]]
"""A manifest and its buckets, each [bytes] uint8."""


def torch_dtype(name: str) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`."""
    return getattr(torch, name)


def as_tensor(buffer: np.ndarray, dtype: str, shape: tuple[int, ...], offset: int, nbytes: int) -> torch.Tensor:
    """A tensor that views `nbytes` bytes of a uint8 buffer, from `offset` on. Write to it only if you own the buffer."""
    if not nbytes:  # a rank that has no rows of this tensor; frombuffer refuses an empty view
        return torch.empty(shape, dtype=torch_dtype(dtype))
    with warnings.catch_warnings():
        # Arrays from the object store are read-only, which torch cannot express and warns about.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.frombuffer(buffer[offset : offset + nbytes], dtype=torch_dtype(dtype)).view(shape)


def _checksum(data: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(memoryview(data))  # type: ignore[arg-type]


def lay_out(shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: str, bucket_bytes: int) -> list[list[TensorEntry]]:
    """Places tensors (name, shape) one after the other into buckets of at most `bucket_bytes`.

    A tensor is never split: one that is larger than `bucket_bytes` has a bucket of its own. Checksums are still 0.
    """
    itemsize = torch_dtype(dtype).itemsize
    buckets: list[list[TensorEntry]] = []
    end = bucket_bytes + 1  # beyond a bucket, so the first tensor opens one
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
    """One block of memory that is kept. Fresh memory would cost more than the copy, in page faults."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def of(self, size: int) -> np.ndarray:
        """[size] uint8, the same memory at each call. Pinned where there is a GPU, whose copies are then much faster."""
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
    """Lays out named tensors as a weight version: yields each bucket ([bytes] uint8) once it is filled, then the manifest.

    Tensors are cast to `dtype`. Their checksums are computed here, once on the publishing side.
    buffer: the memory of all buckets. The caller must copy a bucket before it asks for the next, as Ray does.
    """
    tensors = dict(named_tensors)
    entries: list[TensorEntry] = []
    sizes: list[int] = []
    for places in lay_out([(name, tuple(t.shape)) for name, t in named_tensors], dtype, bucket_bytes):
        size = places[-1].offset + places[-1].nbytes
        bucket = buffer.of(size) if buffer else np.empty(size, np.uint8)
        for place in places:
            # `copy_` casts, gathers and transfers from a GPU in one pass over the tensor.
            view = as_tensor(bucket, dtype, place.shape, place.offset, place.nbytes)
            tensor = tensors[place.name]
            view.copy_(tensor.full_tensor() if isinstance(tensor, Deferred) else tensor.detach())
            beat()
            # Of the bytes in the bucket, right after they are written: they are still in the cache.
            data = bucket[place.offset : place.offset + place.nbytes]
            entries.append(replace(place, checksum=_checksum(data)))
        sizes.append(len(bucket))
        yield bucket
    yield WeightVersion(version, tuple(entries), tuple(sizes))


@runtime_checkable
class Deferred(Protocol):
    """A tensor that is computed when it is needed, for example a weight with its LoRA adapter added."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor, known without computing it."""

    def full_tensor(self) -> torch.Tensor:
        """Computes the tensor."""


def pack_all(
    version: int, named_tensors: "Sequence[tuple[str, torch.Tensor | Deferred]]", dtype: str, bucket_bytes: int
) -> tuple[WeightVersion, list[np.ndarray]]:
    """`pack` to the end: (manifest, buckets), each bucket in memory of its own."""
    manifest, buckets = WeightVersion(version, (), ()), []
    for part in pack(version, named_tensors, dtype, bucket_bytes):
        if isinstance(part, WeightVersion):
            manifest = part
        else:
            buckets.append(part)
    return manifest, buckets


def window(entry: TensorEntry, buckets: Sequence[np.ndarray]) -> np.ndarray:
    """The bytes of one tensor: a view, [nbytes] uint8."""
    return buckets[entry.bucket][entry.offset : entry.offset + entry.nbytes]


def verify(manifest: WeightVersion, buckets: Sequence[np.ndarray]) -> None:
    """WeightError unless every bucket has its size and every tensor its checksum."""
    verify_sizes(manifest, buckets)

    def check(entry: TensorEntry) -> None:
        beat()
        verify_tensor(manifest.version, entry, window(entry, buckets))

    in_threads(check, manifest.tensors, nbytes=manifest.nbytes)


def verify_sizes(manifest: WeightVersion, buckets: Sequence[np.ndarray]) -> None:
    """WeightError unless every bucket has its size."""
    sizes = tuple(bucket.nbytes for bucket in buckets)
    if sizes != manifest.bucket_bytes:
        raise WeightError(f"version {manifest.version}: buckets of {sizes} bytes, expected {manifest.bucket_bytes}")


def verify_tensor(version: int, entry: TensorEntry, data: np.ndarray) -> None:
    """WeightError unless the bytes of one tensor have its checksum. version: for the message."""
    found = _checksum(data)
    if found != entry.checksum:
        raise WeightError(f"version {version}: {entry.name} has checksum {found:016x}, expected {entry.checksum:016x}")


def in_threads(function: Callable[..., T], *columns: Sequence[Any], nbytes: int) -> list[T]:
    """[function(*row) for row in zip(*columns)], in as many threads as torch may use.

    For functions that release the GIL for most of their time. nbytes: size of the work; small work runs in this thread.
    The first error, in the order of the rows, is raised.
    """
    threads = torch.get_num_threads()  # follows OMP_NUM_THREADS, which Ray sets to the actor's CPUs
    if threads == 1 or nbytes < SMALL_BYTES:
        return [function(*row) for row in zip(*columns, strict=True)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, *columns))


def join(ranks: Sequence[Version]) -> tuple[WeightVersion, list[np.ndarray]]:
    """Joins the parts that the learner's ranks have published into one version. Copies nothing.

    The buckets keep the order of the ranks. WeightError: the parts belong to different versions.
    """
    versions = sorted({manifest.version for manifest, _ in ranks})
    if len(versions) != 1:
        raise WeightError(f"the learner's ranks have published different versions: {versions}")
    buckets = [bucket for _, part in ranks for bucket in part]
    entries: list[TensorEntry] = []
    sizes: list[int] = []
    for manifest, _ in ranks:
        entries += (replace(entry, bucket=entry.bucket + len(sizes)) for entry in manifest.tensors)
        sizes += manifest.bucket_bytes
    return WeightVersion(versions[0], tuple(entries), tuple(sizes)), buckets


def shapes(manifest: WeightVersion) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor, with the rows of all ranks. If two parts have different columns, the last one counts."""
    found: dict[str, tuple[int, ...]] = {}
    for entry in manifest.tensors:
        before = found.get(entry.name)
        if before is not None and before[1:] == entry.shape[1:]:
            found[entry.name] = (before[0] + entry.shape[0], *entry.shape[1:])
        else:
            found[entry.name] = entry.shape
    return found


def unpack(
    manifest: WeightVersion, buckets: Sequence[np.ndarray], device: torch.device | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) for every tensor: a view of its bucket, or the concatenated rows of several ranks.

    device: a GPU. Rows are then copied straight to their place in a tensor on it, without waiting for the copies: the
    caller synchronises before the buckets change. Only a tensor above DEVICE_BYTES that one rank has whole stays a view,
    so that no second copy of it is on the GPU.
    """
    for name, rows in rows_of(manifest, buckets):
        if device is None or (len(rows) == 1 and rows[0].nbytes > DEVICE_BYTES):
            yield name, rows[0] if len(rows) == 1 else torch.cat(rows)
            continue
        shape = (sum(map(len, rows)), *rows[0].shape[1:]) if rows[0].ndim else rows[0].shape
        whole = torch.empty(shape, dtype=rows[0].dtype, device=device)
        copy_rows(rows, whole)
        yield name, whole


def rows_of(manifest: WeightVersion, buckets: Sequence[np.ndarray]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yields (name, the rows of each rank that has any, in the order of the ranks): views of the buckets."""
    entries: dict[str, list[TensorEntry]] = {}
    for entry in manifest.tensors:
        entries.setdefault(entry.name, []).append(entry)
    for name, parts in entries.items():
        # A rank without rows of this tensor has an empty part; without it a single part needs no copy.
        yield name, [as_tensor(buckets[e.bucket], e.dtype, e.shape, e.offset, e.nbytes) for e in parts if e.nbytes]


def copy_rows(rows: Sequence[torch.Tensor], whole: torch.Tensor) -> None:
    """Copies the rows of all ranks to their places in a tensor, which may be on a GPU; does not wait for the copies."""
    places = whole.split([len(own) for own in rows]) if whole.ndim else [whole]
    for place, own in zip(places, rows, strict=True):
        place.copy_(own, non_blocking=True)
