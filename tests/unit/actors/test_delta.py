import ctypes
import mmap
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import WeightError
from actors.weights import delta as codec
from actors.weights.buckets import TensorEntry, WeightVersion
from actors.weights.delta import DeltaEntry, DeltaVersion, apply_delta, encode_delta
from actors.weights.delta_codec import _HEADER, BLOCK, _fixed, _read_tensor, _write_tensor, decode, room

WORDS: dict[str, Any] = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
SPECIAL = {
    "bfloat16": [0, 0x8000, 1, 0x8001, 0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F7F, 0x0080],
    "float16": [0, 0x8000, 1, 0x8001, 0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0x7BFF, 0x0400],
    "float32": [0, 1 << 31, 1, (1 << 31) + 1, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x00800000],
}
Version = tuple[WeightVersion, list[np.ndarray]]


def version(number: int, tensors: list[np.ndarray], dtype: str = "bfloat16") -> Version:
    """A version of these bit patterns: three tensors in a bucket, with gaps between them."""
    buckets: list[np.ndarray] = []
    entries: list[TensorEntry] = []
    for at in range(0, len(tensors), 3):
        parts, offset = [], 0
        for words in tensors[at : at + 3]:
            raw = words.view(np.uint8)
            checksum = xxhash.xxh3_64_intdigest(raw.tobytes())
            name = f"tensor.{len(entries)}"
            entries.append(TensorEntry(name, dtype, words.shape, len(buckets), offset, raw.nbytes, checksum))
            parts += [raw, np.zeros(-raw.nbytes % 64, np.uint8)]
            offset += raw.nbytes + -raw.nbytes % 64
        buckets.append(np.concatenate(parts))
    return WeightVersion(number, tuple(entries), tuple(len(bucket) for bucket in buckets)), buckets


def drift(words: np.ndarray, share: float, rng: np.random.Generator, spread: float = 1.0) -> np.ndarray:
    """A copy with a share of the elements moved by a few steps, rarely by many."""
    sizes = np.minimum(np.ceil(spread / rng.random(len(words))), 30000) * rng.choice([-1, 1], len(words))
    return (words + np.where(rng.random(len(words)) < share, sizes, 0).astype(np.int64)).astype(words.dtype)


def weights(count: int, rng: np.random.Generator) -> np.ndarray:
    return torch.from_numpy(rng.normal(0, 0.02, count)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def seal(delta: DeltaVersion, payload: np.ndarray) -> DeltaVersion:
    """Recomputes the checksum, as a malicious sender would, so that the checks after it are reached."""
    return replace(delta, checksum=codec._seal(delta, payload))


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def round_trip(base: Version, new: Version) -> tuple[DeltaVersion, np.ndarray]:
    before = [bucket.copy() for bucket in base[1]]
    delta, payload = encode_delta(*base, *new)
    manifest, buckets = apply_delta(delta, payload, *base)
    assert manifest == new[0] and same(buckets, new[1])
    assert same(base[1], before)
    assert payload.dtype == np.uint8 and len(payload) <= sum(entry.nbytes for entry in new[0].tensors)
    return delta, payload


@st.composite
def pairs(draw: st.DrawFn) -> tuple[str, list[np.ndarray], list[np.ndarray]]:
    dtype = draw(st.sampled_from(sorted(WORDS)))
    top = np.iinfo(WORDS[dtype]).max
    word = st.one_of(st.integers(0, top), st.sampled_from(SPECIAL[dtype]))
    old, new = [], []
    for _ in range(draw(st.integers(0, 4))):
        before = draw(st.lists(word, max_size=40)) * draw(st.sampled_from([1, 1, 7, 60]))
        near = draw(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
        near = near + [0] * draw(st.sampled_from([0, 5, 100]))
        after = [(value + near[i % len(near)]) % (top + 1) for i, value in enumerate(before)]
        if draw(st.booleans()):
            after = draw(st.permutations(before)) if len(before) < 50 else before[::-1]
        old.append(np.array(before, WORDS[dtype]))
        new.append(np.array(after, WORDS[dtype]))
    return dtype, old, new


@settings(max_examples=200, deadline=None)
@given(pairs())
def test_any_bits_survive(pair: tuple[str, list[np.ndarray], list[np.ndarray]]) -> None:
    dtype, old, new = pair
    round_trip(version(3, old, dtype), version(4, new, dtype))


@pytest.mark.parametrize("dtype", sorted(WORDS))
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 63, 64, 65, 1000])
@pytest.mark.parametrize("changes", ["none", "all", "first", "last", "ends of the order"])
def test_edges(dtype: str, count: int, changes: str) -> None:
    rng = np.random.default_rng(count)
    old = rng.integers(0, np.iinfo(WORDS[dtype]).max, count, WORDS[dtype], endpoint=True)
    new = old.copy()
    if changes == "all":
        new ^= WORDS[dtype](1)
    elif changes == "ends of the order":  # NaNs of both signs: the longest step there is
        old[:], new[:] = np.iinfo(WORDS[dtype]).max, np.iinfo(WORDS[dtype]).max >> 1
    elif changes != "none":
        new[: count // 8 + 1 if changes == "first" else 0] ^= WORDS[dtype](1)
        new[-1 if changes == "last" else count :] ^= WORDS[dtype](3)
    delta, payload = round_trip(version(0, [old], dtype), version(1, [new], dtype))
    if changes == "none" or not count:
        assert delta.entries[0].coding == "same" and len(payload) == 0


def test_every_word() -> None:
    words = np.arange(1 << 16).astype(np.uint16)
    round_trip(version(0, [words, words]), version(1, [words[::-1].copy(), words + np.uint16(1)]))


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
@pytest.mark.parametrize("share", [0.0001, 0.02, 0.3, 0.9])
def test_several_blocks(size: int, share: float) -> None:
    rng = np.random.default_rng(size)
    old = weights(size, rng)
    new = drift(old, share, rng, spread=1 + 20 * share)
    new[BLOCK // 3 :: 2 * BLOCK] ^= 1
    delta, payload = round_trip(version(0, [old]), version(1, [new]))
    assert delta.entries[0].coding == "steps" and len(payload) < 0.7 * new.nbytes


def test_a_block_that_does_not_compress_travels_as_it_is() -> None:
    rng = np.random.default_rng(0)
    old = weights(3 * BLOCK, rng)
    new = drift(old, 0.01, rng)
    new[:BLOCK] = rng.integers(0, 1 << 16, BLOCK)
    delta, payload = round_trip(version(0, [old]), version(1, [new]))
    assert delta.entries[0].coding == "steps" and 2 * BLOCK < len(payload) < 2.2 * BLOCK


def test_noise_and_other_dtypes_travel_dense() -> None:
    rng = np.random.default_rng(0)
    old, new = (rng.integers(0, 1 << 16, 5000).astype(np.uint16) for _ in range(2))
    delta, payload = round_trip(version(0, [old]), version(1, [new]))
    assert delta.entries[0].coding == "dense" and len(payload) == new.nbytes
    old, new = old[:512], old[:512] + np.uint16(1)
    delta, _ = round_trip(version(0, [old], "int16"), version(1, [new], "int16"))
    assert delta.entries[0].coding == "dense"


def test_share_above_which_a_tensor_travels_dense() -> None:
    rng = np.random.default_rng(0)
    old = weights(10_000, rng)
    new = drift(old, 0.5, rng)
    base, after = version(0, [old]), version(1, [new])
    assert encode_delta(*base, *after)[0].entries[0].coding == "steps"
    delta, payload = encode_delta(*base, *after, max_share=0.05)
    assert delta.entries[0].coding == "dense"
    assert same(apply_delta(delta, payload, *base)[1], after[1])


def test_heavy_tails_stay_small() -> None:
    """Steps across zero have sizes of tens of thousands. Each may cost about two words, not thousands of bits."""
    rng = np.random.default_rng(0)
    old = weights(100_000, rng)
    new = np.where(rng.random(len(old)) < 0.02, old ^ np.uint16(0x8000), old)
    _, payload = round_trip(version(0, [old]), version(1, [new]))
    assert 8 * len(payload) < np.count_nonzero(old != new) * (32 + 9)


def decode_slowly(data: bytes, old: list[int], bits: int) -> list[int]:
    """Decodes one block element by element. Written from the description of the format alone."""
    nbytes, count = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:8], "little")
    assert len(data) == 8 + nbytes
    stream = iter(data[8:])
    if nbytes == len(old) * bits // 8:
        raw = bytes(stream)
        return [int.from_bytes(raw[i : i + bits // 8], "little") for i in range(0, len(raw), bits // 8)]

    def plane(count: int) -> list[int]:
        row = [int(digit) for _ in range((count + 7) // 8) for digit in f"{next(stream):08b}"[::-1]]
        return row[:count]

    def numbers(unary: int) -> list[int]:
        order = next(stream)
        low = [plane(count) for _ in range(order)]
        paths: list[list[int]] = [[] for _ in range(count)]
        going = list(range(count))
        level = 0
        while going:
            on = plane(len(going))
            going = [i for i, bit in zip(going, on, strict=True) if bit]
            lowest = plane(len(going)) if level >= unary else [0] * len(going)
            for i, bit in zip(going, lowest, strict=True):
                paths[i].append(bit)
            level += 1
        found = []
        for i, path in enumerate(paths):
            high = 0
            for level, bit in reversed(list(enumerate(path))):
                high = 1 + (high if level < unary else 2 * high + bit)
            found.append((high << order) + sum(row[i] << bit for bit, row in enumerate(low)))
        return found

    gaps: list[int] = []
    if 5 * count > 2 * len(old):
        places = [i for i, bit in enumerate(plane(len(old))) if bit]
        gaps = [place - before - 1 for before, place in zip([-1, *places], places, strict=False)]
    elif count:
        gaps = numbers(4)
    steps = numbers(1) if count else []
    assert next(stream, None) is None
    out, position, half = list(old), -1, 1 << (bits - 1)

    def number(word: int) -> int:
        return word if word < half else half - 1 - word

    for gap, step in zip(gaps, steps, strict=True):
        position += 1 + gap
        target = number(old[position]) + (step // 2 + 1) * (1 if step % 2 else -1)
        target = (target + half) % (2 * half) - half  # the order is a ring
        out[position] = target if target >= 0 else half - 1 - target
    return out


def guarded(count: int, kind: Any, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """(array, the same with 64 guard bytes on either side), filled with one byte."""
    room = np.full(64 + count * np.dtype(kind).itemsize + 64, fill, np.uint8)
    return room[64:-64].view(kind), room


def intact(rooms: Iterable[np.ndarray], fill: int) -> bool:
    return all((room[:64] == fill).all() and (room[-64:] == fill).all() for room in rooms)


def code_of(old: np.ndarray, new: np.ndarray, fill: int = 0xA5) -> np.ndarray:
    """The code that is written into exactly the room asked for, over old contents, between guard bytes."""
    signed, scratch = np.dtype(f"i{old.itemsize}"), min(len(old), BLOCK) + 32
    sizes = ((scratch, np.uint16), (scratch, old.dtype), (room(old.nbytes), np.uint8))
    arrays, rooms = zip(*(guarded(count, kind, fill) for count, kind in sizes), strict=True)
    nbytes = _write_tensor(_fixed(old.view(signed)), _fixed(new.view(signed)), *arrays)
    assert intact(rooms, fill)
    return arrays[2][:nbytes]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(WORDS)), st.integers(1, 300), st.floats(0.001, 1), st.floats(0.1, 50), st.integers(0, 99))
def test_agrees_with_an_independent_decoder(dtype: str, count: int, share: float, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    old = rng.integers(0, np.iinfo(WORDS[dtype]).max, count, WORDS[dtype], endpoint=True)
    old[: len(SPECIAL[dtype])] = SPECIAL[dtype][:count]
    new = drift(old, share, rng, spread)
    assert decode_slowly(code_of(old, new).tobytes(), old.tolist(), 8 * old.itemsize) == new.tolist()


def test_long_gaps_and_steps_agree_with_an_independent_decoder() -> None:
    old = np.zeros(BLOCK, np.uint16)
    new = old.copy()
    new[[0, 1, 2, 3, 900, 40_000, BLOCK - 1]] = [1, 0x8000, 0x7FFF, 0xFFFF, 3, 0x8001, 2]
    assert decode_slowly(code_of(old, new).tobytes(), old.tolist(), 16) == new.tolist()
    new[: BLOCK - 1] = 0
    assert decode_slowly(code_of(old, new).tobytes(), old.tolist(), 16) == new.tolist()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_code_is_the_same_whatever_lay_in_memory(share: float) -> None:
    rng = np.random.default_rng(0)
    old = weights(1001, rng)
    new = drift(old, share, rng, 5)
    assert len({code_of(old, new, fill).tobytes() for fill in (0, 1, 0x5A, 0xFF)}) == 1


@pytest.fixture(scope="module")
def small() -> tuple[Version, Version, DeltaVersion, np.ndarray]:
    """(base, new version, delta, payload) with tensors of every coding."""
    rng = np.random.default_rng(1)
    old = [weights(count, rng) for count in (400, 1, 90, 0, 64)]
    new = [drift(old[0], 0.2, rng, 3), old[1] ^ np.uint16(7), drift(old[2], 0.05, rng), old[3], old[4]]
    base, after = version(6, old), version(7, new)
    delta, payload = encode_delta(*base, *after)
    assert {entry.coding for entry in delta.entries} == {"same", "dense", "steps"}
    return base, after, delta, payload


def test_a_bit_flip_anywhere_is_refused(small: tuple[Version, Version, DeltaVersion, np.ndarray]) -> None:
    base, _, delta, payload = small
    for at in range(8 * len(payload)):
        flipped = payload.copy()
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(WeightError, match="do not have its checksum"):
            apply_delta(delta, flipped, *base)


def test_a_bit_flip_is_refused_or_harmless_behind_the_checksum(
    small: tuple[Version, Version, DeltaVersion, np.ndarray],
) -> None:
    """Flips of padding bits change nothing. All others are refused with WeightError, and with nothing else."""
    base, after, delta, payload = small
    harmless = 0
    for at in range(8 * len(payload)):
        flipped = payload.copy()
        flipped[at // 8] ^= 1 << at % 8
        try:
            manifest, buckets = apply_delta(seal(delta, flipped), flipped, *base)
        except WeightError:
            continue
        assert manifest == after[0] and same(buckets, after[1])
        harmless += 1
    assert 0 < harmless < len(payload)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_garbage_behind_the_checksum_is_refused_without_a_crash(
    small: tuple[Version, Version, DeltaVersion, np.ndarray], data: st.DataObject
) -> None:
    base, after, delta, payload = small
    kind = data.draw(st.sampled_from(["random", "header", "cut", "longer", "swapped", "lengths", "ones"]))
    broken = payload.copy()
    at = data.draw(st.integers(0, len(payload) - 1))
    if kind == "random":
        row = data.draw(st.binary(min_size=1, max_size=len(payload) - at))
        broken[at : at + len(row)] = np.frombuffer(row, np.uint8)
    elif kind == "ones":
        broken[at:] = 255
    elif kind == "header":
        row = data.draw(st.binary(min_size=_HEADER, max_size=_HEADER))
        broken[:_HEADER] = np.frombuffer(row, np.uint8)
    elif kind == "cut":
        broken = broken[:at]
    elif kind == "longer":
        broken = np.concatenate([broken, broken[: at + 1]])
    elif kind == "swapped":
        broken = np.roll(broken, at)
    else:
        sizes = data.draw(st.lists(st.integers(-(10**18), 10**18), min_size=5, max_size=5))
        entries = tuple(replace(entry, nbytes=n) for entry, n in zip(delta.entries, sizes, strict=True))
        delta = replace(delta, entries=entries)
    try:
        manifest, buckets = apply_delta(seal(delta, broken), broken, *base)
    except WeightError:
        return
    assert manifest == after[0] and same(buckets, after[1])


def header(nbytes: int, count: int) -> bytes:
    return nbytes.to_bytes(4, "little") + count.to_bytes(4, "little")


LIST = b"\x00\x01\x00"
"""A list of one number: order 0; the number continues once."""


@pytest.mark.parametrize(
    "code",
    [
        b"",
        header(0, 0)[:7],
        header(1, 0),  # bytes that are not there
        header(1, 0) + b"\x00",  # bytes that are nothing's
        header(1 << 31, 1) + LIST,
        header((1 << 32) - 1, (1 << 32) - 1) + 2 * LIST,
        header(6, 41) + 2 * LIST,  # more than there are
        header(4, 1) + b"\x29" + LIST,  # an order beyond the dtype's
        header(7, 1) + b"\x10" + b"\xff" * 6,
        header(60, 40) + b"\x00" + b"\xff" * 59,  # numbers that do not end
        header(60, 1) + b"\x00" + b"\xff" * 59,
        header(21, 1) + b"\x11" + bytes(20),  # even where all its planes are there
        header(7, 1) + b"\x06" + b"\xff" * 6,  # a list that ends behind its block
        header(8, 1) + b"\x00\x00" + LIST + bytes(3),  # and one before
        header(10, 1) + b"\x06\xff\xff\xff\xff\xff\xff\x00\x00\x00",  # a place behind the last
        header(25, 20) + b"\xff\xff\x07\x00\x00" + b"\x00" * 4 + bytes(16),  # a plane of fewer changes
        header(25, 20) + b"\xff\xff\x1f\x00\x00" + b"\x00" * 4 + bytes(16),  # and of more
        header(4, 20) + b"\xff\xff\x0f\x00",
        header(5, 20) + b"\xff\xff\x0f\x00\x00",
        header(0, 0) + b"\x00",
        header(79, 0) + bytes(79),
        header(80, 0) + bytes(79),
    ],
)
def test_absurd_blocks_are_refused(code: bytes) -> None:
    old = np.zeros(40, np.int16)
    assert not decode(np.frombuffer(code, np.uint8), old, old.copy())


def test_a_number_without_an_end_is_refused() -> None:
    old = np.zeros(BLOCK, np.int16)
    code = header(2 * BLOCK - 1, 1) + b"\x00" + b"\xff" * (2 * BLOCK - 2)
    assert not decode(np.frombuffer(code, np.uint8), old, old.copy())


def test_nothing_behind_a_code_is_read() -> None:
    """The memory page after the code is not mapped: reading it would end the process."""
    rng = np.random.default_rng(5)
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    place = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    assert mprotect(place + mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
    old = weights(900, rng)
    for _ in range(1000):
        code = code_of(old, drift(old, rng.choice([0.02, 0.3, 1]), rng, 3)).copy()
        code[rng.integers(len(code), size=2)] = rng.integers(256, size=2)
        code[:4] = np.frombuffer((len(code) - 8).to_bytes(4, "little"), np.uint8)
        at_the_end = np.frombuffer(pages, np.uint8, len(code), mmap.PAGESIZE - len(code))
        at_the_end[:] = code
        decode(at_the_end, old.view(np.int16), old.view(np.int16).copy())
    assert mprotect(place + mmap.PAGESIZE, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE) == 0


def test_the_shortest_blocks_are_read() -> None:
    old = np.arange(40, dtype=np.int16)
    new = old.copy()
    padded = b"\x00\xfe" + b"\x00\xfe"  # bits behind the end of a plane, which mean nothing
    codes = ((header(0, 0), 0, 0), (header(5, 1) + LIST + b"\x00\x00", 1, 0), (header(4, 1) + padded, 0, -(1 << 15)))
    for code, place, value in codes:
        assert decode(np.frombuffer(code, np.uint8), old, new)
        assert new[place] == value and np.array_equal(np.delete(new, place), np.delete(old, place))
    plane = header(9, 20) + b"\xff\xff\x0f\x00\x00" + b"\x00" + bytes(3)
    assert decode(np.frombuffer(plane, np.uint8), old, new)
    assert np.array_equal(new[20:], old[20:]) and new[0] == -(1 << 15) and np.array_equal(new[1:20], old[1:20] - 1)
    code = header(80, 0) + old[::-1].tobytes()
    assert decode(np.frombuffer(code, np.uint8), old, new) and np.array_equal(new, old[::-1])


def test_damage_stays_within_the_arrays() -> None:
    """numba checks no index. Bytes around the arrays are not written to, and have no effect."""
    rng = np.random.default_rng(3)
    refused = read = 0
    for trial in range(4000):
        words = WORDS[["bfloat16", "float32"][trial % 2]]
        size = int(rng.choice([1, 31, 33, 200, 1000]))
        old = rng.integers(0, 60_000, size).astype(words)
        code = code_of(old, drift(old, rng.choice([0.02, 0.3, 1]), rng, 3)).copy()
        for _ in range(rng.integers(1, 4)):
            code[rng.integers(min(len(code), 1 << int(rng.integers(10))))] ^= 1 << rng.integers(8)
        code = code[: rng.integers(len(code))] if rng.random() < 0.2 else code
        outcomes = []
        for fill in (0x5A, 0xFF):
            signed = old.view(f"i{old.itemsize}")
            sizes = ((len(code), np.uint8), (size, signed.dtype), (size, signed.dtype))
            sizes += ((size + 32, np.uint16), (size + 32, words))
            arrays, rooms = zip(*(guarded(count, kind, fill) for count, kind in sizes), strict=True)
            arrays[0][:], arrays[1][:] = code, signed
            good = _read_tensor(_fixed(arrays[0]), _fixed(arrays[1]), *arrays[2:])
            outcomes.append((good, arrays[2].tobytes() if good else b""))
            assert intact(rooms, fill)
        assert outcomes[0] == outcomes[1]
        read, refused = read + outcomes[0][0], refused + (not outcomes[0][0])
    assert read > 200 and refused > 2000


@pytest.mark.parametrize("share", [0.004, 0.02, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_order_is_near_the_best(share: float, dtype: str) -> None:
    """The size of a block's lists, against the shortest that any order gives."""
    rng = np.random.default_rng(0)
    old = np.full(BLOCK, 0x3C00, WORDS[dtype])
    move = rng.choice([-1, 1], BLOCK) * np.minimum(np.ceil(2 / rng.random(BLOCK)), 900)
    new = (old + np.where(rng.random(BLOCK) < share, move, 0)).astype(WORDS[dtype])

    def bits(values: np.ndarray, order: int, unary: int) -> int:
        total, high = order * len(values), values >> order
        for level in range(40):
            going = high[high > 0] - 1
            total += len(high) + (len(going) if level >= unary else 0)
            high = going >> (level >= unary)
        return total

    places = np.flatnonzero(old != new)
    steps = new.astype(int)[places] - old[places]
    lists = ((np.diff(places, prepend=-1) - 1, 4), (np.where(steps > 0, 2 * steps - 1, -2 * steps - 2), 1))
    positions, moves = (min(bits(values, order, unary) for order in range(16)) for values, unary in lists)
    if share > 0.4:  # a plane for all
        assert 1.03 * positions > BLOCK
        positions = BLOCK
    assert positions + moves <= 8 * len(code_of(old, new)) < 1.02 * (positions + moves) + 8 * 60


@pytest.mark.parametrize("share", [0.001, 0.02, 0.12, 0.36, 0.6])
@pytest.mark.parametrize("spread", [0.3, 1, 10])
def test_size_is_near_the_entropy(share: float, spread: float) -> None:
    rng = np.random.default_rng(0)
    old = (0x3C00 + rng.integers(0, 64, BLOCK)).astype(np.uint16)
    move = rng.choice([-1, 1], len(old)) * np.minimum(np.ceil(spread / rng.random(len(old))), 200)
    new = (old + np.where(rng.random(len(old)) < share, move, 0)).astype(np.uint16)
    _, payload = round_trip(version(0, [old]), version(1, [new]))
    steps = new.astype(int) - old

    def entropy(symbols: np.ndarray) -> float:
        counts = np.unique(symbols, return_counts=True)[1]
        return float(-(counts * np.log2(counts / counts.sum())).sum())

    assert 8 * len(payload) < 1.25 * (entropy(steps != 0) + entropy(steps[steps != 0])) + 800


def test_absurd_manifests_are_refused(small: tuple[Version, Version, DeltaVersion, np.ndarray]) -> None:
    base, _, delta, payload = small
    first, tensor = delta.entries[0], delta.new.tensors[0]
    huge = replace(delta.new, bucket_bytes=tuple(10**15 for _ in delta.new.bucket_bytes))
    large = replace(delta.new, tensors=(replace(tensor, nbytes=10**15), *delta.new.tensors[1:]))
    wrong = replace(delta.new, tensors=(replace(tensor, checksum=tensor.checksum ^ 1), *delta.new.tensors[1:]))
    other = replace(delta.new, tensors=(replace(tensor, dtype="float16"), *delta.new.tensors[1:]))
    for broken in (
        replace(delta, base_version=5),
        *(replace(delta, new=new) for new in (huge, large, wrong, other)),
        replace(delta, entries=delta.entries[1:]),
        replace(delta, entries=(*delta.entries, first)),
        replace(delta, entries=(replace(first, base_checksum=first.base_checksum ^ 1), *delta.entries[1:])),
        replace(delta, entries=(replace(first, coding="dense"), *delta.entries[1:])),
        replace(delta, entries=(replace(first, coding="same"), *delta.entries[1:])),
        replace(delta, entries=(replace(first, coding="zip"), *delta.entries[1:])),
    ):
        with pytest.raises(WeightError, match="checksum"):
            apply_delta(broken, payload, *base)
        with pytest.raises(WeightError):
            apply_delta(seal(broken, payload), payload, *base)
    with pytest.raises(WeightError):
        apply_delta(replace(delta, new=replace(delta.new, version=9)), payload, *base)
    negative = replace(delta, entries=(replace(first, nbytes=-3), *delta.entries[1:]))
    with pytest.raises(WeightError, match="is damaged: -3 bytes"):
        apply_delta(seal(negative, payload), payload, *base)


def test_another_base_is_refused_and_left_alone(small: tuple[Version, Version, DeltaVersion, np.ndarray]) -> None:
    """The base's checksums are not computed again: a tensor that a bad base spoils lacks the new version's checksum."""
    (manifest, buckets), after, delta, payload = small
    with pytest.raises(WeightError):  # applied twice
        apply_delta(delta, payload, *after)
    with pytest.raises(WeightError):  # the version is right, its weights are not
        apply_delta(delta, payload, replace(after[0], version=manifest.version), after[1])
    for place, entry in zip(manifest.tensors, delta.entries, strict=True):  # memory has decayed
        for at in range(place.offset, place.offset + place.nbytes, 13):
            rotten = [bucket.copy() for bucket in buckets]
            rotten[place.bucket][at] ^= 16
            kept = [bucket.copy() for bucket in rotten]
            if entry.coding == "dense":  # does not use the base, so the result is right
                assert same(apply_delta(delta, payload, manifest, rotten)[1], after[1])
            else:  # even where the delta changes nothing
                with pytest.raises(WeightError, match="has checksum"):
                    apply_delta(delta, payload, manifest, rotten)
            assert same(rotten, kept)
    with pytest.raises(WeightError):
        apply_delta(delta, payload, manifest, [bucket[:-1] for bucket in buckets])


def test_versions_that_are_laid_out_differently_have_no_delta() -> None:
    words = np.zeros(8, np.uint16)
    with pytest.raises(WeightError, match="laid out differently"):
        encode_delta(*version(0, [words]), *version(1, [words, words]))


def test_read_only_buckets_serve() -> None:
    """Arrays from the object store are read-only."""
    rng = np.random.default_rng(0)
    old = weights(5000, rng)
    base, after = version(0, [old]), version(1, [drift(old, 0.1, rng)])
    delta, payload = encode_delta(*base, *after)
    for array in (*base[1], payload):
        array.setflags(write=False)
    assert same(apply_delta(delta, payload, *base)[1], after[1])


class Killed(BaseException):
    pass


def test_chained_deltas_end_in_old_or_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 versions over a wire that cuts, flips, reorders and repeats, to a reader that is killed while it decodes."""
    rng = np.random.default_rng(7)
    decoded = codec._decoded
    fuse = 0

    def fused(entry: DeltaEntry, code: np.ndarray, place: TensorEntry, old: np.ndarray, new: np.ndarray) -> bool:
        nonlocal fuse
        fuse -= 1
        if fuse == 0:
            new[: len(new) // 2] = 0
            raise Killed
        return decoded(entry, code, place, old, new)

    monkeypatch.setattr(codec, "_decoded", fused)
    truth: Version = version(0, [weights(300, rng), weights(40, rng)])
    held = truth
    history = {0: [bucket.copy() for bucket in truth[1]]}
    late: list[tuple[DeltaVersion, np.ndarray]] = []
    refused = applied = killed = 0
    for number in range(1, 1001):
        words = [truth[1][e.bucket][e.offset : e.offset + e.nbytes].view(np.uint16) for e in truth[0].tensors]
        after = version(number, [drift(row, rng.choice([0, 0.02, 0.3, 1]), rng) for row in words])
        sent = encode_delta(*truth, *after)
        truth, history[number] = after, [bucket.copy() for bucket in after[1]]
        wire = [sent]
        if rng.random() < 0.1:
            wire.append(sent)
        if late and rng.random() < 0.3:
            wire.insert(int(rng.integers(2)), late[rng.integers(len(late))])
        if rng.random() < 0.2:
            late.append(sent)
        if rng.random() < 0.1:  # the sender was killed half way
            wire.insert(0, (sent[0], sent[1][: len(sent[1]) // 2]))
        if rng.random() < 0.2 and len(sent[1]):
            flipped = sent[1].copy()
            flipped[rng.integers(len(flipped))] ^= 1 << rng.integers(8)
            wire.insert(0, (seal(sent[0], flipped) if rng.random() < 0.5 else sent[0], flipped))
        if rng.random() < 0.05:
            wire = wire[:-1]  # lost
        for delta, payload in wire:
            before, fuse = held, int(rng.integers(1, 20))
            try:
                held = apply_delta(delta, payload, *held)
                applied += 1
                assert held[0].version == before[0].version + 1
            except (WeightError, Killed) as error:
                refused += isinstance(error, WeightError)
                killed += isinstance(error, Killed)
                assert held is before
            assert same(held[1], history[held[0].version])
        if held[0].version != number:
            held = after  # a dense anchor
    assert applied > 700 and refused > 200 and killed > 50
