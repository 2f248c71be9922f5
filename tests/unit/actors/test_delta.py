from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import delta as codec
from actors.delta import DeltaVersion, apply_delta, encode_delta
from actors.errors import WeightError
from actors.weights import TensorEntry, WeightVersion

WORDS: dict[str, Any] = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
SPECIAL = {
    "bfloat16": [0, 0x8000, 1, 0x8001, 0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F7F, 0x0080],
    "float16": [0, 0x8000, 1, 0x8001, 0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0x7BFF, 0x0400],
    "float32": [0, 1 << 31, 1, (1 << 31) + 1, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x00800000],
}
Version = tuple[WeightVersion, list[np.ndarray]]


def version(number: int, tensors: list[np.ndarray], dtype: str = "bfloat16") -> Version:
    """Bit patterns, three tensors to a bucket, with gaps between them."""
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
    """Some elements moved by a few steps, rarely by many."""
    sizes = np.minimum(np.ceil(spread / rng.random(len(words))), 30000) * rng.choice([-1, 1], len(words))
    return (words + np.where(rng.random(len(words)) < share, sizes, 0).astype(np.int64)).astype(words.dtype)


def weights(count: int, rng: np.random.Generator) -> np.ndarray:
    return torch.from_numpy(rng.normal(0, 0.02, count)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def seal(delta: DeltaVersion, payload: np.ndarray) -> DeltaVersion:
    """As a sender would sign it that means harm, so that the checks behind the checksum are reached."""
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


@pytest.mark.parametrize("size", [codec.BLOCK - 1, codec.BLOCK, codec.BLOCK + 1, 2 * codec.BLOCK + 5])
@pytest.mark.parametrize("share", [0.0001, 0.02, 0.3, 0.9])
def test_several_blocks(size: int, share: float) -> None:
    rng = np.random.default_rng(size)
    old = weights(size, rng)
    new = drift(old, share, rng, spread=1 + 20 * share)
    new[codec.BLOCK // 3 :: 2 * codec.BLOCK] ^= 1
    delta, payload = round_trip(version(0, [old]), version(1, [new]))
    assert delta.entries[0].coding == "steps" and len(payload) < 0.7 * new.nbytes


def test_a_block_that_does_not_compress_travels_as_it_is() -> None:
    rng = np.random.default_rng(0)
    old = weights(3 * codec.BLOCK, rng)
    new = drift(old, 0.01, rng)
    new[: codec.BLOCK] = rng.integers(0, 1 << 16, codec.BLOCK)
    delta, payload = round_trip(version(0, [old]), version(1, [new]))
    assert delta.entries[0].coding == "steps" and 2 * codec.BLOCK < len(payload) < 2.2 * codec.BLOCK


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
    """Steps across zero are tens of thousands long: they may cost about two words, not thousands of bits."""
    rng = np.random.default_rng(0)
    old = weights(100_000, rng)
    new = np.where(rng.random(len(old)) < 0.02, old ^ np.uint16(0x8000), old)
    _, payload = round_trip(version(0, [old]), version(1, [new]))
    assert 8 * len(payload) < np.count_nonzero(old != new) * (32 + 9)


def decode_slowly(data: bytes, old: list[int], bits: int) -> list[int]:
    """One block, element by element, from the description of the format alone."""
    k, order, nbytes = data[0], data[1], int.from_bytes(data[2:6], "little")
    stream = iter(data[6:])
    if k == 255:
        raw = bytes(stream)
        return [int.from_bytes(raw[i : i + bits // 8], "little") for i in range(0, len(raw), bits // 8)]

    def plane(count: int) -> list[int]:
        row = [int(digit) for _ in range((count + 7) // 8) for digit in f"{next(stream):08b}"]
        return row[:count]

    quotients, run = [], 0
    for bit in plane(8 * nbytes):
        if bit:
            quotients.append(run)
        run = 0 if bit else run + 1
    count = len(quotients)
    remainders = [plane(count) for _ in range(k)]
    negative = plane(count)
    low = [plane(count) for _ in range(order)]
    values: list[list[int]] = [[] for _ in range(count)]
    open_ = list(range(count))
    while open_:
        more = plane(len(open_))
        open_ = [i for i, goes_on in zip(open_, more, strict=True) if goes_on]
        for i, bit in zip(open_, plane(len(open_)), strict=True):
            values[i].append(bit)
    assert next(stream, None) is None
    out, position, half = list(old), -1, 1 << (bits - 1)

    def number(word: int) -> int:
        return word if word < half else half - 1 - word

    for i in range(count):
        position += 1 + (quotients[i] << k) + sum(plane_[i] << bit for bit, plane_ in enumerate(remainders))
        top = (1 << len(values[i])) + sum(bit << level for level, bit in enumerate(values[i]))
        magnitude = ((top - 1) << order) + sum(plane_[i] << bit for bit, plane_ in enumerate(low)) + 1
        target = number(old[position]) + (-magnitude if negative[i] else magnitude)
        target = (target + half) % (2 * half) - half  # the order is a ring
        out[position] = target if target >= 0 else half - 1 - target
    return out


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(WORDS)), st.integers(1, 300), st.floats(0.001, 1), st.floats(0.1, 50), st.integers(0, 99))
def test_agrees_with_an_independent_decoder(dtype: str, count: int, share: float, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    old = rng.integers(0, np.iinfo(WORDS[dtype]).max, count, WORDS[dtype], endpoint=True)
    old[: len(SPECIAL[dtype])] = SPECIAL[dtype][:count]
    new = drift(old, share, rng, spread)
    signed = np.dtype(f"i{old.itemsize}")
    streams = codec._encode_block(old.view(signed), new.view(signed))
    decoded = decode_slowly(np.concatenate(streams).tobytes(), old.tolist(), 8 * old.itemsize)
    assert decoded == new.tolist()


@pytest.fixture(scope="module")
def small() -> tuple[Version, Version, DeltaVersion, np.ndarray]:
    """Tensors of every coding."""
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
    """Padding bits may flip; nothing else may, and nothing but WeightError comes out."""
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
    assert harmless < len(payload)


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
        row = data.draw(st.binary(min_size=6, max_size=6))
        broken[:6] = np.frombuffer(row, np.uint8)
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


@pytest.mark.parametrize(
    ("header", "rest", "message"),
    [
        ((62, 0, 1), b"\xe0" + b"\xff" * 500, "a header of"),  # gaps that overflow to positions before the block
        ((0, 0, 1 << 20), b"\xff" * (1 << 20), "a header of"),
        ((0, 0, 1 << 31), b"", "a header of"),
        ((0, 0, 1), b"\x00", "positions beyond"),
        ((3, 0, 1), b"\x01" + b"\xff" * 9, "positions beyond"),
        ((0, 0, 1), b"\xff\x00" + b"\xff" * 40, "a stream of"),  # magnitudes without an end
        ((0, 254, 1), b"\xff" * 40, "a stream of"),
        ((255, 0, 0), b"\x00", "a stream of"),
    ],
)
def test_absurd_blocks_are_refused(header: tuple[int, int, int], rest: bytes, message: str) -> None:
    reader = codec._Reader(np.frombuffer(codec._HEADER.pack(*header) + rest, np.uint8))
    with pytest.raises(WeightError, match=message):
        codec._decode_block(reader, np.zeros(40, np.int16))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 200), st.sampled_from([1000, 5000])), min_size=1))
def test_rice_parameter_has_the_smallest_size(gaps: list[int]) -> None:
    positions = np.cumsum(np.array(gaps) + 1) - 1
    changed = np.zeros(positions[-1] + 9, bool)
    changed[positions] = True
    assert np.array_equal(codec._positions(changed), positions)
    k, quotients, remainders = codec._encode_gaps(changed, positions)

    def bits(k: int) -> int:
        return sum((gap >> k) + 1 + k for gap in gaps)

    assert bits(k) == min(map(bits, range(20)))
    assert len(quotients) == -(-(bits(k) - k * len(gaps)) // 8) and len(remainders) == k


@pytest.mark.parametrize("share", [0.001, 0.02, 0.12, 0.36, 0.6])
@pytest.mark.parametrize("spread", [0.3, 1, 10])
def test_size_is_near_the_entropy(share: float, spread: float) -> None:
    rng = np.random.default_rng(0)
    old = (0x3C00 + rng.integers(0, 64, codec.BLOCK)).astype(np.uint16)
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
    with pytest.raises(WeightError, match="a stream of -3"):
        apply_delta(seal(negative, payload), payload, *base)


def test_another_base_is_refused_and_left_alone(small: tuple[Version, Version, DeltaVersion, np.ndarray]) -> None:
    (manifest, buckets), after, delta, payload = small
    with pytest.raises(WeightError):  # applied twice
        apply_delta(delta, payload, *after)
    with pytest.raises(WeightError):  # the version is right, its weights are not
        apply_delta(delta, payload, replace(after[0], version=manifest.version), after[1])
    for place in manifest.tensors:  # memory has decayed, even where the delta changes nothing
        for at in range(place.offset, place.offset + place.nbytes, 13):
            rotten = [bucket.copy() for bucket in buckets]
            rotten[place.bucket][at] ^= 16
            kept = [bucket.copy() for bucket in rotten]
            with pytest.raises(WeightError):
                apply_delta(delta, payload, manifest, rotten)
            assert same(rotten, kept)
    with pytest.raises(WeightError):
        apply_delta(delta, payload, manifest, [bucket[:-1] for bucket in buckets])


def test_versions_that_are_laid_out_differently_have_no_delta() -> None:
    words = np.zeros(8, np.uint16)
    with pytest.raises(WeightError, match="laid out differently"):
        encode_delta(*version(0, [words]), *version(1, [words, words]))


def test_read_only_buckets_serve() -> None:
    """What the object store hands out cannot be written to."""
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
    """1,000 versions over a wire that cuts, flips, reorders and repeats, to a reader that is killed at work."""
    rng = np.random.default_rng(7)
    decode_block = codec._decode_block
    fuse = 0

    def fused(reader: codec._Reader, block: np.ndarray) -> None:
        nonlocal fuse
        fuse -= 1
        if fuse == 0:
            block[: len(block) // 2] = 0
            raise Killed
        decode_block(reader, block)

    monkeypatch.setattr(codec, "_decode_block", fused)
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
