"""Weight versions: packed, verified, unpacked."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import WeightError
from actors.weights import WeightVersion, pack, unpack, verify


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
