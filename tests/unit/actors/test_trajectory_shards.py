"""Recorded trajectories come back as they were, in parts and with several teachers."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from actors.data.trajectory_shards import Row, counts_of, fault_in, opened, shards_in, write_shard
from actors.errors import CampaignError
from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories, offsets_of, select_trajectories

LENGTHS = (3, 1, 4)
DRAW = np.random.default_rng(0)


def logprobs(*shape: int) -> np.ndarray:
    return -DRAW.random(shape, np.float32)


def trajectories() -> Trajectories:
    """Three, with a filter, rewards, the student's support, and tokens of others."""
    n = sum(LENGTHS)
    return Trajectories(
        ids=np.array([[0, 7, 0], [0, 7, 1], [1, 2, 0]]),
        prompt_tokens=np.arange(6, dtype=np.int32),
        prompt_offsets=offsets_of([1, 3, 2]),
        response_tokens=np.arange(10, 10 + n, dtype=np.int32),
        response_offsets=offsets_of(LENGTHS),
        behaviour_logprobs=logprobs(n),
        policy_versions=np.array([4, 4, 5, 3, 6, -1, -1, 5], np.int32),
        finish_reasons=np.array([0, 1, 0], np.uint8),
        support_ids=DRAW.integers(0, 9, (n, 2)).astype(np.int32),
        rewards=np.array([1.0, 0.0, 0.5], np.float32),
        unfiltered_logprobs=logprobs(n),
        trained=np.array([1, 1, 1, 1, 1, 0, 0, 1], bool),
        begins=np.array([0, 0, 0, 0, 0, 0, 1, 0], bool),
    )


def scores(name: str, ids: np.ndarray, lengths: list[int], share: float, hidden: int = 0) -> TeacherScores:
    n = sum(lengths)
    own = {"hidden": DRAW.integers(0, 65535, (n, hidden)).astype(np.uint16)} if hidden else {}
    return TeacherScores(
        ids=ids,
        response_offsets=offsets_of(lengths),
        logprobs=logprobs(n),
        teacher=name,
        log_weights=np.full(len(ids), np.log(share), np.float32),
        support_ids=np.zeros((n, 0), np.int32) if hidden else DRAW.integers(0, 9, (n, 3)).astype(np.int32),
        support_logprobs=np.zeros((n, 0), np.float32) if hidden else logprobs(n, 3),
        **own,
    )


def same(a: object, b: object) -> None:
    for field in fields(a):  # type: ignore[arg-type]
        x, y = getattr(a, field.name), getattr(b, field.name)
        if not isinstance(x, np.ndarray):
            assert x == y
        elif x.size or y.size:
            assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), field.name


def test_what_is_written_in_two_parts_is_read_bit_for_bit(tmp_path: Path) -> None:
    written = trajectories()
    one = scores("wise.b", written.ids[[0, 2]], [3, 4], 0.5)
    one.logprobs[4] = np.nan  # of a token that others wrote: not counted
    one.logprobs[6], one.support_logprobs[6, 1] = np.nan, np.nan
    earlier = scores("wise.b", written.ids[[2]], [4], 0.25)  # scored again later: the last counts
    two = scores("other", written.ids, list(LENGTHS), 0.5, hidden=5)
    parts: list[dict[str, float]] = [{"form": 0.5}, {}, {"form": 1.0, "length": -2.0}]
    rows = [Row(40 + i, i, domain, parts[i]) for i, domain in enumerate(("a", None, "b"))]
    for part, own in enumerate(([0, 2], [1])):
        mine = select_trajectories(written.ids[own], [written])
        write_shard(tmp_path, 9, part, 2, mine, [earlier, one, two], [rows[i] for i in own])
    shards = shards_in(tmp_path)[9]
    assert [(shard.part, shard.parts) for shard in shards] == [(0, 2), (1, 2)] and not fault_in(shards)
    found = opened(shards)
    read = select_trajectories(written.ids, [batch for batch in found if isinstance(batch, Trajectories)])
    same(read, written)
    [first] = [
        batch for batch in found if isinstance(batch, TeacherScores) and batch.teacher == "wise.b" and len(batch)
    ]
    same(first, one)
    counts = counts_of(shards)
    assert counts["number"] == [40, 41, 42] and counts["domain"] == ["a", None, "b"] and counts["missing"] == [0, 0, 1]
    assert counts["parts"] == parts
    assert counts["length"] == [3, 1, 4] and counts["context"] == [0, 0, 2] and counts["oldest_version"] == [4, 3, 5]


def test_a_part_is_replaced_and_damage_is_told(tmp_path: Path) -> None:
    written = trajectories()
    two = scores("other", written.ids, list(LENGTHS), 1.0)
    rows = [Row(i, i, None, {}) for i in range(3)]
    before = write_shard(tmp_path, 1, 0, 1, written, [two], rows)
    two.logprobs[0] = -1
    shard = write_shard(tmp_path, 1, 0, 1, written, [two], rows)
    assert shards_in(tmp_path) == {1: [shard]} and not Path(before.path).exists()
    assert write_shard(tmp_path, 1, 0, 1, written, [two], rows) == shard, "the same content has the same name"
    content = bytearray(Path(shard.path).read_bytes())
    content[100] ^= 1
    Path(shard.path).write_bytes(content)
    assert "is damaged" in fault_in([shard])
    with pytest.raises(CampaignError, match="is damaged"):
        opened([shard])
    assert "parts are missing" in fault_in([shard._replace(parts=2)])
