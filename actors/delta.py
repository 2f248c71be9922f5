"""Deltas: a lossless code of what changed between two weight versions, in the dtype that engines load.

An optimizer step moves most 16-bit weights by nothing or by one step of their dtype. So bit patterns are mapped to
integers in the order of the numbers, and a tensor is coded in blocks: gaps between changed elements in Golomb-Rice
code, then signed steps, magnitudes in Exp-Golomb code. What a textbook interleaves lies here in streams of its own, so
that both directions are vectorised: a header `<BBI` (Rice parameter k, Exp-Golomb order, bytes of the quotients, 0
where nothing changed), quotients in unary, k planes of remainder bits, signs, `order` planes of magnitude bits, then
for each level of the Exp-Golomb code a plane of "goes on" and one of a bit for those that do. Planes start at bytes,
lowest bits first. k = 255: the elements follow as they are.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from actors.errors import WeightError
from actors.weights import TensorEntry, Version, WeightVersion, torch_dtype, verify, window

BLOCK = 1 << 18
"""Elements that are coded together: few enough for the cache, enough to forget the header."""

_HEADER = struct.Struct("<BBI")
_PLAIN = 255


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


def _in_order(bits: np.ndarray) -> np.ndarray:
    """Bit patterns of floats <-> integers in the order of the numbers (-0.0 just below 0.0); its own inverse."""
    return bits ^ ((bits >> (8 * bits.itemsize - 1)) & np.iinfo(bits.dtype).max)


def _planes(values: np.ndarray, count: int) -> list[np.ndarray]:
    """The lowest `count` bits of `values`, one packed stream for each, lowest first."""
    return [np.packbits((values & values.dtype.type(1 << bit)) != 0) for bit in range(count)]


def _encode_gaps(changed: np.ndarray, positions: np.ndarray) -> tuple[int, np.ndarray, list[np.ndarray]]:
    """(k, quotients, remainders) of the smallest Golomb-Rice code of the gaps between `positions`."""
    count, last = len(positions), int(positions[-1])
    if 2 * count >= last + 1:  # k = 0, which is a bitmap, is the smallest
        return 0, np.packbits(changed[: last + 1]), []
    gaps = (np.diff(positions, prepend=-1) - 1).astype(np.uint32)
    total = last + 1 - count
    planes = _planes(gaps, min(18, (total // count).bit_length() + 1))
    # The sum of (gap >> k) is (sum of gaps - the bits below k) >> k, and those bits are counted in the planes.
    below = [0]
    for bit, plane in enumerate(planes):
        below.append(below[-1] + (int(np.bitwise_count(plane).sum(dtype=np.int64)) << bit))
    k = min(range(len(below)), key=lambda k: ((total - below[k]) >> k) + count * (k + 1))
    ends = np.cumsum(gaps >> np.uint32(k), dtype=np.int64) + np.arange(count)
    unary = np.zeros(int(ends[-1]) + 1, bool)
    unary[ends] = True
    return k, np.packbits(unary), planes[:k]


def _positions(changed: np.ndarray) -> np.ndarray:
    """Where a bool array is True; looks at bytes of eight first, of which most are empty after a small step."""
    packed = np.packbits(changed)
    touched = np.flatnonzero(packed != 0)
    if 3 * len(touched) > len(packed):
        return np.flatnonzero(changed)
    bits = np.flatnonzero(np.unpackbits(packed.take(touched)).view(bool))
    return (touched.take(bits >> 3) << 3) + (bits & 7)


def _encode_steps(steps: np.ndarray) -> tuple[int, list[np.ndarray]]:
    """(order, streams) of non-zero steps."""
    magnitudes = np.abs(steps).view(f"u{steps.itemsize}")  # the most negative one wraps to itself, which is right
    order, one = 0, magnitudes.dtype.type(1)
    while order < 8 * steps.itemsize - 2 and 3 * np.count_nonzero(magnitudes > 1 << order) > 2 * len(steps):
        order += 1  # until a third of them have the shortest code, which is close to the smallest size
    streams = [np.packbits(steps < 0)]
    streams += _planes(magnitudes - one, order)
    magnitudes = ((magnitudes - one) >> magnitudes.dtype.type(order)) + one
    while len(magnitudes):
        more = magnitudes > 1
        magnitudes = magnitudes.take(np.flatnonzero(more))
        streams += [np.packbits(more), *_planes(magnitudes, 1)]
        magnitudes >>= one
    return order, streams


def _encode_block(old: np.ndarray, new: np.ndarray) -> list[np.ndarray]:
    """The streams of one block ([elements] int16 or int32), header first."""
    changed = old != new
    positions = _positions(changed)
    header, streams = (0, 0, 0), []
    if len(positions):
        k, quotients, remainders = _encode_gaps(changed, positions)
        order, steps = _encode_steps(_in_order(new.take(positions)) - _in_order(old.take(positions)))
        header, streams = (k, order, len(quotients)), [quotients, *remainders, *steps]
    if sum(map(len, streams)) >= new.nbytes:
        header, streams = (_PLAIN, 0, 0), [new.view(np.uint8)]
    return [np.frombuffer(_HEADER.pack(*header), np.uint8), *streams]


class _Reader:
    """Reads streams of bytes; WeightError where they end too early."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = data, 0

    def take(self, nbytes: int) -> np.ndarray:
        if not 0 <= nbytes <= len(self.data) - self.at:
            raise WeightError(f"delta: a stream of {nbytes} bytes, of which {len(self.data) - self.at} are there")
        self.at += nbytes
        return self.data[self.at - nbytes : self.at]

    def bits(self, count: int) -> np.ndarray:
        return np.unpackbits(self.take(-(-count // 8)), count=count).view(bool)

    def planes(self, values: np.ndarray, count: int) -> np.ndarray:
        """`values` shifted up by `count` bits, with planes of as many bits below."""
        values = values << values.dtype.type(count)
        for bit in range(count):
            values |= self.bits(len(values)).astype(values.dtype) << values.dtype.type(bit)
        return values


def _decode_steps(reader: _Reader, order: int, count: int, dtype: np.dtype) -> np.ndarray:
    """[count] steps."""
    negative = reader.bits(count)
    unsigned, one = np.dtype(f"u{dtype.itemsize}"), np.dtype(f"u{dtype.itemsize}").type(1)
    low = reader.planes(np.zeros(count, unsigned), order)
    levels: list[tuple[np.ndarray, np.ndarray]] = []
    while count:  # each level takes bytes, so that a corrupt one ends
        more = reader.bits(count)
        count = int(np.count_nonzero(more))
        levels.append((more, reader.bits(count)))
    magnitudes = np.ones(count, unsigned)
    for more, bits in reversed(levels):
        longer = (magnitudes << one) | bits
        magnitudes = np.ones(len(more), unsigned)
        magnitudes[np.flatnonzero(more)] = longer
    if order:
        magnitudes = ((magnitudes - one) << unsigned.type(order)) + low + one
    flip = -negative.astype(dtype)
    return (magnitudes.view(dtype) ^ flip) - flip


def _decode_block(reader: _Reader, block: np.ndarray) -> None:
    """Turns a block of old elements into the new ones, in place."""
    k, order, nbytes = _HEADER.unpack(reader.take(_HEADER.size).tobytes())
    if k == _PLAIN:
        block.view(np.uint8)[:] = reader.take(block.nbytes)
    elif nbytes:
        if k > 18 or nbytes > -(-len(block) // 8):
            raise WeightError(f"delta: a header of {(k, order, nbytes)} for {len(block)} elements")
        positions = np.flatnonzero(reader.bits(8 * nbytes))
        if k:
            positions = np.cumsum(reader.planes(np.diff(positions, prepend=-1) - 1, k) + 1) - 1
        if not len(positions) or positions[-1] >= len(block):
            raise WeightError(f"delta: {len(positions)} positions beyond a block of {len(block)} elements")
        steps = _decode_steps(reader, order, len(positions), block.dtype)
        block[positions] = _in_order(_in_order(block.take(positions)) + steps)


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
    payload, entries = [np.empty(0, np.uint8)], []
    for base, new in zip(base_manifest.tensors, new_manifest.tensors, strict=True):
        coding, streams, dtype = "dense", [window(new, new_buckets)], _integers(new)
        if base.checksum == new.checksum:
            coding, streams = "same", []
        elif dtype is not None:
            olds, news = window(base, base_buckets).view(dtype), window(new, new_buckets).view(dtype)
            blocks = (slice(at, at + BLOCK) for at in range(0, len(news), BLOCK))
            coded = [stream for block in blocks for stream in _encode_block(olds[block], news[block])]
            if sum(map(len, coded)) < max_share * new.nbytes:
                coding, streams = "steps", coded
        entries.append(DeltaEntry(coding, sum(map(len, streams)), base.checksum))
        payload += streams
    delta, joined = DeltaVersion(base_manifest.version, new_manifest, tuple(entries), 0), np.concatenate(payload)
    return replace(delta, checksum=_seal(delta, joined)), joined


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
    buckets, whole = [np.zeros(size, np.uint8) for size in base_manifest.bucket_bytes], _Reader(payload)
    for place, entry in zip(delta.new.tensors, delta.entries, strict=True):
        reader, target, dtype = _Reader(whole.take(entry.nbytes)), window(place, buckets), _integers(place)
        target[:] = window(place, base_buckets)
        if entry.coding == "dense":
            target[:] = reader.take(len(target))
        elif entry.coding == "steps" and dtype is not None:
            for start in range(0, len(target) // dtype.itemsize, BLOCK):
                _decode_block(reader, target.view(dtype)[start : start + BLOCK])
    verify(delta.new, buckets)
    return delta.new, buckets


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
