"""One copy of a version for all engines of a node: who copies, who waits, and what remains when an engine ends."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors import heartbeat
from actors.weights.buckets import WeightVersion, pack_all, verify
from actors.weights.node_staging import NodeStaging, Place, mapped
from tests.waiting import until

Version = tuple[WeightVersion, list[np.ndarray]]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def engines() -> Iterator[list[NodeStaging]]:
    made = [NodeStaging("a") for _ in range(3)]
    yield made
    for one in made:
        one.close()


def version(number: int, size: int = 3000) -> Version:
    torch.manual_seed(number)
    tensors = [("a", torch.randn(size)), ("b", torch.randn(7)), ("c", torch.randn(size // 2))]
    manifest, buckets = pack_all(number, tensors, "float32", 8000)
    return replace(manifest, bucket_bytes=(*manifest.bucket_bytes, 0)), [*buckets, np.empty(0, np.uint8)]


def inode(places: list[Place]) -> int:
    return os.stat(places[0].path).st_ino


def check(places: list[Place], expected: Version) -> None:
    verify(expected[0], [mapped(place) for place in places])  # what is between the tensors is any bytes


def test_the_engines_of_a_node_share_one_copy_of_each_version(engines: list[NodeStaging]) -> None:
    seen = set()
    for number in range(3):
        # The second time around another engine is first, and the last version is larger.
        order = engines[number:] + engines[:number]
        now = version(number, 3000 * (1 + number // 2))
        for engine in order:
            places = engine.stage(*now)
            check(places, now)
            seen.add(inode(places))
        for engine in engines:
            engine.release()
    assert len(seen) == 1 and [engine.copies for engine in engines] == [1, 1, 1]


def test_what_is_being_read_is_not_overwritten(engines: list[NodeStaging]) -> None:
    first, second, third = engines
    old, new = version(0), version(1)
    for engine in (first, third):
        check(engine.stage(*old), old)
    staged: list[list[Place]] = []
    waiting = threading.Thread(target=lambda: staged.append(second.stage(*new)))
    waiting.start()
    first.release()
    before = heartbeat.count()
    until(lambda: staged or heartbeat.count() > before + 5, "the second engine waits, or copies")
    check(third_places := third_read(third, old), old)
    assert not staged and third_places
    third.release()
    waiting.join(60)
    check(staged[0], new)
    second.release()


def third_read(engine: NodeStaging, expected: Version) -> list[Place]:
    """The places of a version that this engine still holds."""
    path = f"/proc/{os.getpid()}/fd/{engine._segment}"
    sizes = expected[0].bucket_bytes
    step = 4096
    offsets = [sum(-(-size // step) * step for size in sizes[:row]) for row in range(len(sizes))]
    return [Place(path, offset, size) for offset, size in zip(offsets, sizes, strict=True)]


def test_a_number_that_comes_again_with_other_bytes_is_copied_again(engines: list[NodeStaging]) -> None:
    first, second, _ = engines
    before = version(4)
    first.stage(*before)
    first.release()
    after = pack_all(4, [("a", torch.ones(3000)), ("b", torch.ones(7)), ("c", torch.ones(1500))], "float32", 8000)
    check(second.stage(*after), after)
    second.release()
    assert (first.copies, second.copies) == (1, 1)


def test_the_copy_of_a_process_that_was_killed_is_found_by_those_that_have_it_open_and_else_made_again(
    tmp_path: Path, engines: list[NodeStaging]
) -> None:
    program = (
        "import os, sys, tempfile\n"
        "tempfile.tempdir = sys.argv[1]\n"
        "from tests.unit.actors.test_node_staging import NodeStaging, version\n"
        "made = NodeStaging('a')\n"
        "made.stage(*version(0))\n"
        "print('staged', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "staged\n"
        first, second, _ = engines
        places = first.stage(*version(0))
        assert first.copies == 0
        other.kill()
    check(places, version(0))
    first.release()
    again = second.stage(*version(0))  # its path has gone with the process
    check(again, version(0))
    second.release()
    assert second.copies == 1
    check(first.stage(*version(0)), version(0))
    first.release()


@pytest.mark.parametrize(
    "left", [b"", b"\0" * 90, b'{"version": "aba27c6c', b'{"version": "a", "path": "/proc/0/fd/1", "identity": []}']
)
def test_what_a_machine_that_went_down_has_left_is_no_version(left: bytes, engines: list[NodeStaging]) -> None:
    engines[0]._path.write_bytes(left)
    for engine in engines:
        check(engine.stage(*version(0)), version(0))
        engine.release()
    assert [engine.copies for engine in engines] == [1, 0, 0]


def test_a_copy_that_was_broken_off_is_no_version(engines: list[NodeStaging]) -> None:
    first, second, _ = engines
    whole = version(0)
    before = version(1)
    check(first.stage(*before), before)
    first.release()
    broken: Any = [*whole[1][:-2], None, whole[1][-1]]
    with pytest.raises(AttributeError, match="nbytes"):
        first.stage(whole[0], broken)
    check(second.stage(*before), before)  # half of its memory had been written over
    second.release()
    check(first.stage(*whole), whole)
    first.release()
    assert (first.copies, second.copies) == (2, 1)
