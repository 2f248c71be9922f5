"""Weight versions: packed, verified, unpacked."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import WeightError
from actors.weights import buckets as buckets_module
from actors.weights.buckets import SMALL_BYTES, WeightVersion, in_threads, join, pack, pack_all, shapes, unpack, verify
from actors.weights.delta import Receiver, encode_delta


def tensors() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [("a", torch.randn(3, 5)), ("big", torch.randn(40, 10)), ("b", torch.randn(7)), ("c", torch.randn(2, 2, 2))]


def packed(dtype: str, bucket_bytes: int = 256) -> tuple[WeightVersion, list[np.ndarray]]:
    *buckets, manifest = pack(3, tensors(), dtype, bucket_bytes)
    assert isinstance(manifest, WeightVersion)
    return manifest, buckets  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_unpacked_is_what_was_packed_in_the_rollout_dtype(dtype: str) -> None:
    manifest, buckets = packed(dtype)
    verify(manifest, buckets)
    for bucket in buckets:
        bucket.flags.writeable = False  # as the object store gives them
    found = dict(unpack(manifest, buckets))
    assert list(found) == ["a", "big", "b", "c"]
    for name, tensor in tensors():
        assert torch.equal(found[name], tensor.to(getattr(torch, dtype)))


def test_buckets_are_bounded_and_a_larger_tensor_has_its_own() -> None:
    manifest, buckets = packed("float32")
    for index, bucket in enumerate(buckets):
        inside = [entry.name for entry in manifest.tensors if entry.bucket == index]
        assert bucket.nbytes <= 256 or inside == ["big"]
    assert all(entry.offset % 64 == 0 for entry in manifest.tensors)
    assert manifest.nbytes == sum(bucket.nbytes for bucket in buckets)


def test_unpacking_copies_nothing() -> None:
    manifest, buckets = packed("float32")
    for entry, (_, tensor) in zip(manifest.tensors, unpack(manifest, buckets), strict=True):
        assert tensor.data_ptr() == buckets[entry.bucket].ctypes.data + entry.offset


Version = tuple[WeightVersion, list[np.ndarray]]


def of_ranks(ranks: int, version: int = 3, step: float = 0.0) -> list[Version]:
    """What each of so many ranks publishes, with rows as torch.chunk cuts them: some have none."""
    cut = [[(name, (t + step).chunk(ranks)) for name, t in tensors()] for _ in range(ranks)]
    rows = [
        [(name, parts[rank] if rank < len(parts) else parts[0][:0]) for name, parts in cut[rank]]
        for rank in range(ranks)
    ]
    return [pack_all(version, own, "float32", 256) for own in rows]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 11])
def test_rows_of_several_ranks_are_one_version(ranks: int) -> None:
    manifest, buckets = join(of_ranks(ranks))
    verify(manifest, buckets)
    assert shapes(manifest) == {name: tuple(tensor.shape) for name, tensor in tensors()}
    found = dict(unpack(manifest, buckets))
    assert list(found) == [name for name, _ in tensors()]
    for name, tensor in tensors():
        assert torch.equal(found[name], tensor)


def test_rows_that_do_not_fit_together_have_another_shape_than_the_tensor() -> None:
    (first, buckets), (second, others) = of_ranks(2)
    narrow = pack_all(3, [("a", torch.zeros(1, 4))], "float32", 256)
    assert shapes(join([(first, buckets), (second, others)])[0])["a"] == (3, 5)
    assert shapes(join([(first, buckets), narrow])[0])["a"] == (1, 4)
    assert shapes(first)["a"] == (2, 5)


def test_ranks_that_have_published_different_versions_are_refused() -> None:
    with pytest.raises(WeightError, match=r"different versions: \[3, 4\]"):
        join([of_ranks(2)[0], of_ranks(2, version=4)[1]])


def test_a_bit_that_is_flipped_in_one_ranks_rows_is_found() -> None:
    ranks = of_ranks(2)
    entry = ranks[1][0].tensors[1]
    ranks[1][1][entry.bucket][entry.offset] ^= 1
    with pytest.raises(WeightError, match="version 3: big has checksum"):
        verify(*join(ranks))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_version_whose_bytes_are_damaged_is_not_received(ranks: int) -> None:
    parts = of_ranks(ranks)
    received = Receiver(False).receive(*(part for manifest, buckets in parts for part in (*buckets, manifest)))
    assert received == parts
    entry = parts[-1][0].tensors[1]
    parts[-1][1][entry.bucket][entry.offset] ^= 1
    with pytest.raises(WeightError, match="version 3: big has checksum"):
        Receiver(False).receive(*(part for manifest, buckets in parts for part in (*buckets, manifest)))


def test_each_side_computes_the_checksum_of_each_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    checksum = buckets_module._checksum
    monkeypatch.setattr(buckets_module, "_checksum", lambda data: counted.append(data.nbytes) or checksum(data))
    [(manifest, buckets)] = of_ranks(1)
    [after] = of_ranks(1, version=4, step=1e-6)
    change, payload = encode_delta(manifest, buckets, *after)
    every = [entry.nbytes for entry in manifest.tensors]
    assert counted == 2 * every, "two versions are published, the second as a delta"
    counted.clear()
    receiver = Receiver(True)
    receiver.hold(receiver.receive(*buckets, manifest))
    assert counted == every
    counted.clear()
    receiver.receive(payload, change)
    assert counted == every


def test_tensors_are_worked_on_side_by_side_and_the_first_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not torch.set_num_threads: it does nothing in a process in which vLLM has been used.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    together = threading.Barrier(2)  # breaks unless two threads meet

    def meet(number: int, fails: bool) -> int:
        together.wait(timeout=600)
        if fails:
            raise WeightError(f"tensor {number}")
        return number

    assert in_threads(meet, range(4), [False] * 4, nbytes=SMALL_BYTES) == [0, 1, 2, 3]
    with pytest.raises(WeightError, match="tensor 2"):
        in_threads(meet, range(4), [False, False, True, True], nbytes=SMALL_BYTES)
    assert in_threads(lambda a: a + threading.active_count(), [1], nbytes=10) == [1 + threading.active_count()]


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_has_changed_is_told_by_each_rank_of_its_own_rows(ranks: int) -> None:
    before, after = of_ranks(ranks), of_ranks(ranks, version=4, step=1e-6)
    changes = [encode_delta(*old, *new) for old, new in zip(before, after, strict=True)]
    receiver = Receiver(True)
    receiver.hold(receiver.receive(*(part for manifest, buckets in before for part in (*buckets, manifest))))
    manifest, buckets = join(receiver.receive(*(part for change, payload in changes for part in (payload, change))))
    verify(manifest, buckets)
    for name, tensor in unpack(manifest, buckets):
        assert torch.equal(tensor, dict(tensors())[name] + 1e-6)


def test_a_change_to_rows_that_are_not_held_is_refused() -> None:
    before, after = of_ranks(2), of_ranks(2, version=4, step=1e-6)
    changes = [encode_delta(*old, *new) for old, new in zip(before, after, strict=True)]
    receiver = Receiver(True)
    with pytest.raises(WeightError, match="from version 3, and no version is held"):
        receiver.receive(changes[0][1], changes[0][0])
    receiver.hold(before)
    with pytest.raises(WeightError, match="does not fit version 3"):  # the other rank's
        receiver.receive(changes[1][1], changes[1][0], changes[0][1], changes[0][0])


def test_one_flipped_bit_names_the_tensor() -> None:
    manifest, buckets = packed("bfloat16")
    entry = next(entry for entry in manifest.tensors if entry.name == "b")
    buckets[entry.bucket][entry.offset + 3] ^= 4
    with pytest.raises(WeightError, match="version 3: b has checksum"):
        verify(manifest, buckets)


def test_a_missing_or_shortened_bucket_is_refused() -> None:
    manifest, buckets = packed("float32")
    with pytest.raises(WeightError, match="expected"):
        verify(manifest, buckets[:-1])
    with pytest.raises(WeightError, match="expected"):
        verify(manifest, [*buckets[:-1], buckets[-1][:-1]])


@given(
    st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=20),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(1, 600),
)
def test_any_tensors_in_any_buckets_come_back_to_the_bit(shapes: list[list[int]], dtype: str, size: int) -> None:
    rng = np.random.default_rng(len(shapes))
    named = [  # any bit pattern is a float: not-a-numbers, infinities, subnormals; transposed, so not contiguous
        (str(i), torch.from_numpy(rng.integers(0, 256, (*shape, 4), np.uint8).view(np.float32)[..., 0].T))
        for i, shape in enumerate(shapes)
    ]
    *buckets, manifest = pack(0, named, dtype, size)
    assert isinstance(manifest, WeightVersion)
    verify(manifest, buckets)  # type: ignore[arg-type]
    assert [entry.name for entry in manifest.tensors] == [name for name, _ in named]
    ends = [0] * len(buckets)
    for entry in manifest.tensors:  # in order, none over another, and none in a bucket that is too full for it
        assert entry.offset >= ends[entry.bucket]
        ends[entry.bucket] = entry.offset + entry.nbytes
        assert ends[entry.bucket] <= size or entry.offset == 0
    assert ends == list(manifest.bucket_bytes)
    for (_, tensor), (_, found) in zip(named, unpack(manifest, buckets), strict=True):  # type: ignore[arg-type]
        wanted = tensor.to(getattr(torch, dtype)).contiguous()
        assert found.shape == wanted.shape
        bits, wanted_bits = (t.reshape(-1).view(torch.uint8).reshape(-1, t.itemsize) for t in (found, wanted))
        # What is no number stays so, but a cast may give it another of its bit patterns.
        same = (bits == wanted_bits).all(1) | ((found.isnan() & wanted.isnan()).reshape(-1) & (dtype != "float32"))
        assert same.all()
