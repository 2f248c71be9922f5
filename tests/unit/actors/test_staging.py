"""Weights are brought to kept memory while the engine goes on; during the load it reads from there."""

import itertools
import tempfile
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors.weights import buckets as buckets_module
from actors.weights.buckets import Buffer, WeightVersion, join, unpack, window
from actors.weights.delta import Receiver, encode_delta
from actors.weights.node_staging import NodeStaging
from actors.weights.staging import Staging, staging_for
from tests.unit.actors.test_vllm_engine_thread import engine, request  # noqa: F401
from tests.unit.actors.test_weights import of_ranks, tensors

NONE: Any = None
"""The manifest, which only the node's copy needs."""


def read_only(*values: list[int]) -> list[np.ndarray]:
    """As the object store gives them."""
    arrays = [np.array(value, np.uint8) for value in values]
    for array in arrays:
        array.flags.writeable = False
    return arrays


def test_each_version_is_copied_into_the_same_memory() -> None:
    staging = Staging()
    first = staging.stage(NONE, read_only([1, 2, 3, 4], [], [5]))
    assert [bucket.tolist() for bucket in first] == [[1, 2, 3, 4], [], [5]]
    staging.release()
    second = staging.stage(NONE, read_only([6, 7], [8], [9]))
    assert [bucket.tolist() for bucket in second] == [[6, 7], [8], [9]]
    assert second[0].ctypes.data == first[0].ctypes.data and second[2].ctypes.data == first[2].ctypes.data


def test_a_version_that_is_being_loaded_is_not_overwritten() -> None:
    staging, seen = Staging(), []
    loading: Future = Future()
    loading.add_done_callback(staging.release)
    [first] = staging.stage(NONE, read_only([1]))
    thread = threading.Thread(target=lambda: seen.append(staging.stage(NONE, read_only([2]))))
    thread.start()
    thread.join(0.05)
    assert not seen and first.tolist() == [1]
    loading.set_result(None)
    thread.join(60)
    assert first.tolist() == [2]


def test_memory_that_is_pinned_already_is_read_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)
    buckets = read_only([1], [2])
    assert all(staged is bucket for staged, bucket in zip(Staging().stage(NONE, buckets), buckets, strict=True))


def test_memory_that_deltas_do_without_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    staging = Staging()
    first = staging.stage(NONE, read_only([1, 2, 3], [4]))
    kept = [weakref.ref(block._bytes) for block in staging._blocks]
    del first
    staging.release()
    assert all(block() is not None for block in kept)
    monkeypatch.setattr(Staging, "_in_place", lambda _, bucket: len(bucket) == 3)
    staging.stage(NONE, read_only([5, 6, 7], [8]))
    assert kept[0]() is None and kept[1]() is not None


def test_an_engine_on_a_cpu_reads_buckets_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert staging_for("cpu", "") is None
    assert type(staging_for("cuda", "")) is Staging
    assert type(staging_for("cuda", "a")) is type(staging_for("cpu", "a")) is NodeStaging


def test_a_version_is_staged_while_the_engine_steps_and_loaded_from_there(engine: Any) -> None:  # noqa: F811
    staged: list[np.ndarray] = []
    engine._staging, engine._wait_for_running = Staging(), False
    engine._replace_weights = lambda _, buckets: staged.extend(bucket.copy() for bucket in buckets)
    running = engine.generate(request(0), None)
    engine._submit(lambda: None).result(60)  # the request has entered: the thread is in a step, which waits
    loading = engine.load_weights(SimpleNamespace(version=1), read_only([1, 2]))
    [block] = engine._staging._blocks
    assert block.of(2).tolist() == [1, 2] and not staged and not loading.done(), "copied before the step has ended"
    engine._engine.allow.release(2)
    loading.result(60)
    running.result(60)
    assert [bucket.tolist() for bucket in staged] == [[1, 2]] and engine.version == 1
    engine.load_weights(SimpleNamespace(version=2), read_only([3])).result(60)  # the memory is free again


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("largest", [0, 1 << 20])
def test_rows_of_several_ranks_are_joined_on_the_device(
    monkeypatch: pytest.MonkeyPatch, ranks: int, largest: int
) -> None:
    monkeypatch.setattr(buckets_module, "DEVICE_BYTES", largest)
    manifest, buckets = join(of_ranks(ranks))
    concatenated: list[Any] = []
    monkeypatch.setattr(torch, "cat", concatenated.append)
    found = dict(unpack(manifest, buckets, torch.device("cpu")))
    assert not concatenated, "no concatenation in host memory"
    starts = {bucket.ctypes.data for bucket in buckets}
    for name, tensor in tensors():
        assert torch.equal(found[name], tensor)
    views = [name for name, tensor in found.items() if tensor.data_ptr() in starts]
    assert bool(views) == (ranks == 1 and largest == 0), "only a large tensor of one rank stays where it is"
    assert all(t.is_meta for t in dict(unpack(manifest, buckets, torch.device("meta"))).values()) == (not views)


def test_deltas_are_decoded_into_two_kept_versions_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    of = Buffer.of
    monkeypatch.setattr(Buffer, "of", lambda self, size: taken.append(id(self)) or of(self, size))
    steps = [of_ranks(2, version=3 + i, step=1e-6 * i) for i in range(5)]
    receiver = Receiver(True)
    receiver.hold(receiver.receive(*(part for manifest, buckets in steps[0] for part in (*buckets, manifest))))
    for before, after in itertools.pairwise(steps):
        changes = [encode_delta(*old, *new) for old, new in zip(before, after, strict=True)]
        parts = [part for change, payload in changes for part in (payload, change)]
        for _ in range(2):  # a call that is repeated before the engine has loaded it
            ranks = receiver.receive(*parts)
        receiver.hold(ranks)
        receiver.hold(receiver.receive(*parts))  # and after
        for (manifest, found), (_, expected) in zip(ranks, after, strict=True):
            assert all(np.array_equal(window(e, found), window(e, expected)) for e in manifest.tensors)
    buckets = sum(len(own) for _, own in steps[0])
    assert len(set(taken)) == 2 * buckets, "two versions, whatever the number of deltas"


def test_the_tensors_of_a_version_are_verified_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(buckets_module, "SMALL_BYTES", 0)
    threads: set[int] = set()
    together = threading.Barrier(2)

    def checked(*_: Any) -> None:
        if len(threads) < 2 and threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            together.wait(60)

    monkeypatch.setattr(buckets_module, "verify_tensor", checked)
    [(manifest, buckets)] = of_ranks(1)
    assert isinstance(manifest, WeightVersion)
    buckets_module.verify(manifest, buckets)
    assert len(threads) == 2
