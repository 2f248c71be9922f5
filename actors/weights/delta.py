"""Deltas: a lossless code of what changed between two weight versions, in the dtype that engines load.

An optimizer step moves most 16-bit weights by nothing or by one step of their dtype. So bit patterns are mapped to
integers in the order of the numbers, and positions and steps are coded (actors/weights/delta_codec.py, which is imported where a
delta is made or applied, since numba takes its time). Here is what goes around: manifests, checksums, who holds what.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from actors.errors import WeightError
from actors.heartbeat import beat
from actors.weights.buckets import TensorEntry, Version, WeightVersion, torch_dtype, verify, window


@dataclass(frozen=True, slots=True)
class DeltaEntry:
    """How one tensor travels, and the checksum of what it is applied to."""

    coding: str
    """"same" (no bytes), "dense" (its new bytes), or "steps" (blocks)."""
    nbytes: int
    """Bytes in the payload, where tensors lie one after the other."""
    base_checksum: int


@dataclass(frozen=True, slots=True)
class DeltaVersion:
    """The manifest of a delta."""

    base_version: int
    new: WeightVersion
    """What applying it gives; laid out as the base is."""
    entries: tuple[DeltaEntry, ...]
    checksum: int
    """xxh3-64 of all of the above and the payload."""

    @property
    def version(self) -> int:
        """The policy version that applying it gives."""
        return self.new.version

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return sum(entry.nbytes for entry in self.entries)


def _seal(delta: DeltaVersion, payload: np.ndarray) -> int:
    digest = xxhash.xxh3_64(repr(replace(delta, checksum=0)).encode())
    digest.update(memoryview(payload))  # type: ignore[arg-type]
    return digest.intdigest()


def _integers(entry: TensorEntry) -> np.dtype | None:
    """The integers that hold one element, or None for a dtype that is not coded."""
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
    """(manifest, payload [bytes] uint8). A tensor whose code is not below `max_share` of its bytes travels dense."""
    if _layout(base_manifest) != _layout(new_manifest):
        raise WeightError(f"versions {base_manifest.version} and {new_manifest.version} are laid out differently")
    from actors.weights.delta_codec import encode, room

    payload, end = np.empty(sum(room(new.nbytes) for new in new_manifest.tensors), np.uint8), 0
    entries = []
    for base, new in zip(base_manifest.tensors, new_manifest.tensors, strict=True):
        beat()
        coding, nbytes, dtype = "dense", new.nbytes, _integers(new)
        if base.checksum == new.checksum:
            coding, nbytes = "same", 0
        elif dtype is not None:
            old_bits, new_bits = window(base, base_buckets).view(dtype), window(new, new_buckets).view(dtype)
            coded = encode(old_bits, new_bits, payload[end:])
            if coded < max_share * nbytes:
                coding, nbytes = "steps", coded
        if coding == "dense":
            payload[end : end + nbytes] = window(new, new_buckets)
        entries.append(DeltaEntry(coding, nbytes, base.checksum))
        end += nbytes
    delta, payload = DeltaVersion(base_manifest.version, new_manifest, tuple(entries), 0), payload[:end]
    return replace(delta, checksum=_seal(delta, payload)), payload


def apply_delta(
    delta: DeltaVersion, payload: np.ndarray, base_manifest: WeightVersion, base_buckets: Sequence[np.ndarray]
) -> tuple[WeightVersion, list[np.ndarray]]:
    """The new version in buckets of its own; the base is only read. WeightError unless all is as it was encoded."""
    if _seal(delta, payload) != delta.checksum:
        raise WeightError(f"delta from version {delta.base_version}: manifest and payload do not have its checksum")
    checksums = [entry.checksum for entry in base_manifest.tensors] == [e.base_checksum for e in delta.entries]
    if delta.base_version != base_manifest.version or _layout(delta.new) != _layout(base_manifest) or not checksums:
        raise WeightError(f"delta from version {delta.base_version} does not fit version {base_manifest.version}")
    verify(base_manifest, base_buckets)
    buckets, end = [np.zeros(size, np.uint8) for size in base_manifest.bucket_bytes], 0
    for place, entry in zip(delta.new.tensors, delta.entries, strict=True):
        beat()
        code, end = payload[end : end + entry.nbytes], end + entry.nbytes
        if not _decoded(entry, code, place, window(place, base_buckets), window(place, buckets)):
            raise WeightError(f"delta: {place.name} is damaged: {entry.nbytes} bytes, {entry.coding}")
    verify(delta.new, buckets)
    return delta.new, buckets


def _decoded(entry: DeltaEntry, code: np.ndarray, place: TensorEntry, old: np.ndarray, new: np.ndarray) -> bool:
    """Whether `code` is one of this tensor; `new` is it then."""
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
    """Takes versions as they come, whole or as deltas, and keeps a copy of the last for the next delta."""

    def __init__(self, keep: bool):
        """keep: whether there will be deltas."""
        self._keep = keep
        self._held: list[Version] = []
        """What each rank of the learner published."""

    def whole(self, *published: np.ndarray | WeightVersion | DeltaVersion) -> list[Version]:
        """The version as each rank of the learner has it. published: of each rank its buckets and then its manifest.

        WeightError: a delta that is damaged, or of a version that is not held.
        """
        ranks: list[Version] = []
        buckets: list[np.ndarray] = []
        for part in published:
            if isinstance(part, np.ndarray):
                buckets.append(part)
            else:
                ranks.append(
                    (part, buckets) if isinstance(part, WeightVersion) else self._changed(len(ranks), part, buckets)
                )
                buckets = []
        return ranks

    def _changed(self, rank: int, delta: DeltaVersion, buckets: list[np.ndarray]) -> Version:
        if rank >= len(self._held):
            raise WeightError(f"a delta from version {delta.base_version}, and no version is held")
        if self._held[rank][0] == delta.new:  # it comes a second time
            return self._held[rank]
        return apply_delta(delta, buckets[0], *self._held[rank])

    def hold(self, ranks: list[Version]) -> None:
        """This version has been loaded."""
        if self._keep:
            self._held = ranks
