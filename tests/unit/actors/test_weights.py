"""Weight versions: packed, verified, unpacked."""

import numpy as np
import pytest
import torch

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
