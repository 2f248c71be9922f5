"""Weight deltas: a lossless code of the changes between two weight versions, in the dtype that engines load.

An optimizer step leaves most 16-bit weights unchanged, or moves them to a neighbouring number of their dtype. So bit
patterns are mapped to integers in the order of the numbers, and the positions and sizes of the changes are coded
(actors/weights/delta_codec.py). This module holds the rest: manifests, checksums, and the receiver.

Each side computes each checksum once: one for each tensor of the new version (in `pack`, and after decoding), and one for
the delta's manifest and payload. The base is not checked again: a damaged base decodes to a tensor with a wrong checksum.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from actors.errors import WeightError
from actors.heartbeat import beat
from actors.weights.buckets import (
    Buffer,
    TensorEntry,
    Version,
    WeightVersion,
    in_threads,
    torch_dtype,
    verify,
    verify_sizes,
    verify_tensor,
    window,
)


@dataclass(frozen=True, slots=True)
class DeltaEntry:
    """The code of one tensor."""

    coding: str
    """"same" (no bytes), "dense" (its new bytes), or "steps" (blocks of delta_codec.py)."""
    nbytes: int
    """Bytes in the payload. Tensors follow each other in the order of the manifest."""
    base_checksum: int
    """Checksum of the tensor that the code is applied to."""


@dataclass(frozen=True, slots=True)
class DeltaVersion:
    """The manifest of a delta."""

    base_version: int
    new: WeightVersion
    """Manifest of the new version, i.e. the result of applying the delta. It has the layout of the base."""
    entries: tuple[DeltaEntry, ...]
    checksum: int
    """xxh3-64 of all fields above and the payload."""

    @property
    def version(self) -> int:
        """Number of the new policy version."""
        return self.new.version

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return sum(entry.nbytes for entry in self.entries)


def _seal(delta: DeltaVersion, payload: np.ndarray) -> int:
    # The repr of dataclasses of strings and integers is the same in every process.
    digest = xxhash.xxh3_64(repr(replace(delta, checksum=0)).encode())
    digest.update(memoryview(payload))  # type: ignore[arg-type]
    return digest.intdigest()


def _integers(entry: TensorEntry) -> np.dtype | None:
    """The integer dtype of the same size; None for dtypes without a code, whose tensors are sent dense."""
    dtype = torch_dtype(entry.dtype)
    return np.dtype(f"i{dtype.itemsize}") if dtype.is_floating_point and dtype.itemsize in (2, 4) else None


def _layout(manifest: WeightVersion) -> list[object]:
    return [manifest.bucket_bytes, *(replace(entry, checksum=0) for entry in manifest.tensors)]


def encode_delta(
    base_manifest: WeightVersion,
    base_buckets: Sequence[np.ndarray],
    new_manifest: WeightVersion,
    new_buckets: Sequence[np.ndarray],
    max_share: float = 1.0,
) -> tuple[DeltaVersion, np.ndarray]:
    """Encodes the changes from a base version to a new one: (manifest, payload [bytes] uint8).

    The buckets are only read. A tensor whose code is not smaller than `max_share` of its bytes is sent dense, so the
    payload is never larger than the new version. Tensors are encoded in parallel, in as many threads as torch may use.
    WeightError: the versions have different layouts.
    """
    if _layout(base_manifest) != _layout(new_manifest):
        raise WeightError(f"versions {base_manifest.version} and {new_manifest.version} are laid out differently")
    # numba takes a second to import, which only processes with deltas should pay.
    from actors.weights.delta_codec import encode, room

    def encode_tensor(base: TensorEntry, new: TensorEntry) -> tuple[DeltaEntry, np.ndarray]:
        beat()
        old_bytes, new_bytes, dtype = window(base, base_buckets), window(new, new_buckets), _integers(new)
        # Equal checksums of 64 bits are taken for equal bytes, so an unchanged tensor is not read.
        if base.checksum == new.checksum:
            return DeltaEntry("same", 0, base.checksum), new_bytes[:0]
        if dtype is not None:
            code = np.empty(room(new.nbytes), np.uint8)
            nbytes = encode(old_bytes.view(dtype), new_bytes.view(dtype), code)
            if nbytes < max_share * new.nbytes:
                return DeltaEntry("steps", nbytes, base.checksum), code[:nbytes]
        return DeltaEntry("dense", new.nbytes, base.checksum), new_bytes

    coded = in_threads(encode_tensor, base_manifest.tensors, new_manifest.tensors, nbytes=new_manifest.nbytes)
    # The empty array: a rank without rows has no codes, and concatenate needs at least one.
    payload = np.concatenate([np.empty(0, np.uint8), *(code for _, code in coded)])
    delta = DeltaVersion(base_manifest.version, new_manifest, tuple(entry for entry, _ in coded), 0)
    return replace(delta, checksum=_seal(delta, payload)), payload


def apply_delta(
    delta: DeltaVersion,
    payload: np.ndarray,
    base_manifest: WeightVersion,
    base_buckets: Sequence[np.ndarray],
    memory: Callable[[int, int], np.ndarray] = lambda _, size: np.zeros(size, np.uint8),
) -> tuple[WeightVersion, list[np.ndarray]]:
    """Decodes a delta onto its base: (manifest, buckets) of the new version, verified.

    memory: (number of a bucket, its bytes) -> [bytes] uint8 for it, not that of the base; by default new memory. The base
    is only read, so a failure leaves it as it was. WeightError: manifest or payload are damaged, the base is
    another version or damaged, or a tensor does not have the new version's checksum.
    """
    if _seal(delta, payload) != delta.checksum:
        raise WeightError(f"delta from version {delta.base_version}: manifest and payload do not have its checksum")
    checksums = [entry.checksum for entry in base_manifest.tensors] == [e.base_checksum for e in delta.entries]
    if delta.base_version != base_manifest.version or _layout(delta.new) != _layout(base_manifest) or not checksums:
        raise WeightError(f"delta from version {delta.base_version} does not fit version {base_manifest.version}")
    verify_sizes(base_manifest, base_buckets)
    buckets = [memory(number, size) for number, size in enumerate(base_manifest.bucket_bytes)]
    codes, end = [], 0
    for entry in delta.entries:
        codes.append(payload[end : end + entry.nbytes])
        end += entry.nbytes

    def decode_tensor(place: TensorEntry, entry: DeltaEntry, code: np.ndarray) -> None:
        beat()
        new = window(place, buckets)
        if not _decoded(entry, code, place, window(place, base_buckets), new):
            raise WeightError(f"delta: {place.name} is damaged: {entry.nbytes} bytes, {entry.coding}")
        verify_tensor(delta.version, place, new)  # here, while the tensor is still in the cache

    in_threads(decode_tensor, delta.new.tensors, delta.entries, codes, nbytes=delta.new.nbytes)
    return delta.new, buckets


def _decoded(entry: DeltaEntry, code: np.ndarray, place: TensorEntry, old: np.ndarray, new: np.ndarray) -> bool:
    """Decodes one tensor into `new`. False: `code` is not a code for a tensor of this size."""
    from actors.weights.delta_codec import decode

    dtype = _integers(place)
    if entry.coding == "steps" and dtype is not None:
        return len(code) == entry.nbytes and decode(code, old.view(dtype), new.view(dtype))
    source = {"same": old, "dense": code}.get(entry.coding)
    if source is None or len(code) != entry.nbytes or len(source) != len(new):
        return False
    new[:] = source
    return True


class Receiver:
    """Receives published versions, dense or as deltas, verifies them, and keeps the last one as the next delta's base."""

    def __init__(self, keep: bool):
        """keep: keep a copy of the last version on the host, which deltas are applied to."""
        self._keep = keep
        self._held: list[Version] = []
        """The last version, one part for each rank of the learner."""
        self._decoded: list[defaultdict[tuple[int, int], Buffer]] = [defaultdict(Buffer), defaultdict(Buffer)]
        """Memory of two versions by (rank, bucket): one is decoded into the first while the second may be its base."""

    def receive(self, *published: np.ndarray | WeightVersion | DeltaVersion) -> list[Version]:
        """The published version with verified checksums, one (manifest, buckets) for each rank of the learner.

        published: for each rank its buckets and then its manifest. Buckets of a dense version are not copied. A delta is
        decoded into kept memory, which the next call overwrites unless `hold` was called. WeightError: a tensor, manifest or payload is damaged, or a delta's base is not held.
        """
        ranks: list[Version] = []
        buckets: list[np.ndarray] = []
        for part in published:
            if isinstance(part, np.ndarray):
                buckets.append(part)
            elif isinstance(part, WeightVersion):
                verify(part, buckets)
                ranks.append((part, buckets))
                buckets = []
            else:
                ranks.append(self._apply(len(ranks), part, buckets))
                buckets = []
        return ranks

    def _apply(self, rank: int, delta: DeltaVersion, buckets: list[np.ndarray]) -> Version:
        if rank >= len(self._held):
            raise WeightError(f"a delta from version {delta.base_version}, and no version is held")
        if self._held[rank][0] == delta.new:  # a retried call: the first one has already loaded this delta
            return self._held[rank]
        memory = self._decoded[0]
        return apply_delta(
            delta, buckets[0], *self._held[rank], memory=lambda bucket, size: memory[rank, bucket].of(size)
        )

    def hold(self, ranks: list[Version]) -> None:
        """Makes this version the next delta's base. Called once the engine has loaded it."""
        if not self._keep or (self._held and all(map(operator.is_, ranks, self._held))):  # or it was loaded again
            return
        self._held = ranks
        self._decoded.reverse()  # what is held now is not overwritten
