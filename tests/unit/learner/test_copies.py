"""Ranks on several nodes keep a copy of the student for each node, and take the updates of one rank."""

import os
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from learner import learner as module
from learner.student import build
from learner.student.optimizer import build_optimizer
from learner.student.sharding import Ranks, own_rows
from tests.unit.learner.test_sharding import (
    SETTINGS,
    Material,
    Published,
    assert_equal,
    assert_same_bits,
    changes,
    received,
    run_ranks,
    save,
    state_of,
    tensors,
)
from tests.unit.learner.test_sharding import material as material
from tests.unit.learner.test_sharding import together as together

NODES = {4: "aabb", 2: "ab"}
"""Number of ranks -> the node of each."""
NAMES = [name for name in ("plain", "many passes", "taken back", "experts", "adapters") if name in SETTINGS]
"""Settings of test_sharding.py that differ in what copies do: a tied head, several passes and steps, copies of the weights
and offloaded moments, files written by the first rank, and merged weights."""


def names(size: int) -> list[str]:
    """The settings for so many ranks; one rank on each node differs from two in the mesh alone."""
    return NAMES if size == 4 else NAMES[:2]


CASES = [(size, name) for size in NODES for name in names(size)]


def run_rank(rank: int, size: int, material: Material) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(material.folder / f"nodes-{size}"), size)
    ranks = Ranks.join(store, rank, size, "cpu", NODES[size])
    build.device_bytes = lambda device: 1 << 40  # type: ignore[assignment]
    found: dict[str, Any] = {}
    for name in names(size):
        learner = material.learner(name, ranks, publish_dtype="bfloat16")
        found[name] = {"fresh": Published(received(learner.publish()))}
        learner = material.learner(name, ranks)
        metrics = [material.update(learner, name) for _ in range(2)]
        found[name] |= {"metrics": metrics, **state_of(learner)}
        save(learner, material.folder / f"{name}-of-{size}-on-nodes")
        found[name]["after"] = {"metrics": [material.update(learner, name)], **state_of(learner)}
    found["fused"] = fused(material, ranks)
    rows = [own_rows(p.detach())[0].numel() for p in learner._model.parameters()]
    found["shares"] = (ranks.copy, ranks.copies, sum(rows), sum(p.numel() for p in learner._model.parameters()))
    found["delta"] = changes(material, ranks)
    dist.barrier()
    (material.folder / f"nodes-{size}-{rank}").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def fused(material: Material, ranks: Ranks) -> dict[str, Any]:
    """Two updates with the kernel that GPUs use, and a third that goes on from their checkpoint."""
    module.build_optimizer = partial(build_optimizer, fused=True)
    learner = material.learner("plain", ranks)
    found = {"metrics": [material.update(learner, "plain") for _ in range(2)], **state_of(learner)}
    folder = material.folder / f"fused-of-{ranks.size}"
    save(learner, folder)
    dist.barrier()
    learner = material.learner("plain", ranks, checkpoint=folder)
    return {**found, "after": {"metrics": [material.update(learner, "plain")], **state_of(learner)}}


@pytest.fixture(scope="module")
def of_ranks(material: Material) -> dict[int, list[dict[str, Any]]]:
    """Number of ranks -> what each of them has found."""
    for size in NODES:
        run_ranks(size, material, body=run_rank, folder=material.folder)
    return {
        size: [pickle.loads((material.folder / f"nodes-{size}-{rank}").read_bytes()) for rank in range(size)]
        for size in NODES
    }


@pytest.fixture(scope="module")
def one(material: Material) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in NAMES:
        fresh = together([Published(received(material.learner(name, None, publish_dtype="bfloat16").publish()))])
        learner = material.learner(name, None)
        found[name] = {"fresh": fresh, "metrics": [material.update(learner, name) for _ in range(2)]}
        found[name] |= together([state_of(learner)])
        save(learner, material.folder / f"{name}-of-one")
        found[name]["after"] = {"metrics": [material.update(learner, name)], **together([state_of(learner)])}
    return found


@pytest.mark.parametrize(("size", "name"), CASES)
def test_copies_take_the_update_that_one_rank_takes(
    name: str, size: int, one: dict[str, Any], of_ranks: dict[int, list[dict[str, Any]]]
) -> None:
    found = together([own[name] for own in of_ranks[size]])
    assert_equal(found, one[name])
    assert_equal(found["after"], one[name]["after"])
    ours, theirs = tensors(found["fresh"]), tensors(one[name]["fresh"])
    assert_same_bits(dict(sorted(ours.items())), dict(sorted(theirs.items())))


@pytest.mark.parametrize("size", NODES)
def test_the_fused_step_of_sharded_weights_is_the_plain_one(
    size: int, one: dict[str, Any], of_ranks: dict[int, list[dict[str, Any]]]
) -> None:
    found = together([own["fused"] for own in of_ranks[size]])
    assert_equal(found, one["plain"])
    assert_equal(found["after"], one["plain"]["after"])


@pytest.mark.parametrize("size", NODES)
def test_every_node_has_all_rows_and_publishes_its_share(size: int, of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    each = size // len(set(NODES[size]))
    for rank, own in enumerate(of_ranks[size]):
        copy, copies, rows, whole = own["shares"]
        assert (copy, copies) == ("ab".index(NODES[size][rank]), 2)
        assert rows <= 1.1 * whole / each
    for name in names(size):
        published = [sum(entry.nbytes for entry in own[name]["fresh"][-1].tensors) for own in of_ranks[size]]
        assert max(published) < 0.75 * sum(published)


@pytest.mark.parametrize("size", NODES)
def test_deltas_of_copies_make_the_next_version(size: int, of_ranks: dict[int, list[dict[str, Any]]]) -> None:
    from actors.weights.delta import Receiver

    found = together([own["delta"] for own in of_ranks[size]])
    receiver = Receiver(True)
    tensors(found["first"], receiver)
    assert_same_bits(tensors(found["change"], receiver), tensors(found["second"]))


@pytest.mark.parametrize(("size", "name"), CASES)
def test_copies_write_the_files_that_one_rank_writes(
    name: str, size: int, material: Material, one: dict[str, Any], of_ranks: dict[int, list[dict[str, Any]]]
) -> None:
    for file in ("model.safetensors", "training/optimizer.safetensors", "training/averages.safetensors"):
        if (material.folder / f"{name}-of-one" / file).is_file():
            ours, theirs = (
                load_file(material.folder / f"{name}-of-{kind}" / file) for kind in (f"{size}-on-nodes", "one")
            )
            assert ours.keys() == theirs.keys()
            for tensor in ours:
                torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("nodes", "room", "copies"),
    [("aabb", True, 2), ("aabb", False, 1), ("aaab", True, 1), ("aaaa", True, 1), ("", True, 1)],
)
def test_a_copy_for_each_node_needs_room_and_as_many_ranks_on_each(
    nodes: str, room: bool, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from learner.student import sharding

    asked: list[int] = []

    class Mesh:
        def __init__(self, device: str, of_node: list[list[int]], mesh_dim_names: tuple[str, str]):
            assert of_node == [[0, 1], [2, 3]]

        def get_local_rank(self, name: str) -> int:
            return 1

        def get_group(self, name: str) -> None:
            return None

        def __getitem__(self, name: str) -> str:
            return name

    monkeypatch.setattr(sharding, "DeviceMesh", Mesh)
    monkeypatch.setattr(sharding.dist, "init_device_mesh", lambda device, shape: shape)
    ranks = Ranks(3, 4, nodes)
    monkeypatch.setattr(ranks, "max", lambda value: value)
    mesh = ranks._mesh("cpu", lambda each: asked.append(each) or room)
    assert (mesh, ranks.copies) == ("rows" if copies == 2 else (4,), copies)
    assert asked == ([2] if nodes == "aabb" else [])
    assert [ranks.writes(number) for number in range(3)] == ([False, True, False] if copies == 2 else [True] * 3)
