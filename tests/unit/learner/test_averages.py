"""The learner keeps, publishes, saves and restores moving averages of the student's weights."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.errors import WeightError
from actors.teacher.local import LocalTeacher
from learner.learner import Learner
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import make_learner, received, sampled, teacher_config, weights_of

DECAY = 0.7


def follower(models: dict[str, Path], **changes: object) -> dict:
    return {"mean": teacher_config(models, "student", "full", ema_decay=DECAY, **changes)}


def average_of(learner: Learner) -> torch.Tensor:
    *buckets, _ = received(learner.publish_average("mean"))
    return torch.from_numpy(np.concatenate(buckets)).view(torch.float32)  # type: ignore[arg-type]


def test_the_average_is_the_sum_of_all_versions_with_falling_shares(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    learner = make_learner(models, teachers=follower(models))
    versions = [weights_of(learner)]
    torch.testing.assert_close(average_of(learner), versions[0], rtol=0, atol=0)
    for _ in range(3):
        learner.update(written.ids, written, scores)
        versions.append(weights_of(learner))
    shares = [DECAY**3, *((1 - DECAY) * DECAY**k for k in (2, 1, 0))]
    by_hand = sum(share * version.double() for share, version in zip(shares, versions, strict=True))
    assert (average_of(learner) - versions[-1]).abs().max() > 1e-4
    torch.testing.assert_close(average_of(learner), by_hand.float(), rtol=0, atol=1e-6)


def test_a_restored_learner_has_the_same_average_to_the_bit_and_goes_on_with_it(
    models: dict[str, Path], tmp_path: Path
) -> None:
    written, scores = sampled(models, "other")
    learner = make_learner(models, teachers=follower(models))
    learner.update(written.ids, written, scores)
    learner.save(str(tmp_path / "saved"))
    while not learner.saved():
        time.sleep(0.001)
    restored = make_learner(models, checkpoint=tmp_path / "saved", teachers=follower(models))
    assert torch.equal(average_of(restored), average_of(learner))
    for one in (learner, restored):
        one.update(written.ids, written, scores)
    assert torch.equal(average_of(restored), average_of(learner))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_that_was_given_an_average_scores_as_one_that_was_loaded_with_it(
    dtype: str, models: dict[str, Path], tmp_path: Path
) -> None:
    written, scores = sampled(models, "other")
    learner = make_learner(
        models, teachers={"mean": teacher_config(models, "student", "full", ema_decay=1e-9, dtype=dtype)}
    )
    learner.update(written.ids, written, scores)  # with this decay the average is the newest version
    learner.save(str(tmp_path / "saved"))
    while not learner.saved():
        time.sleep(0.001)
    following = LocalTeacher(teacher_config(models, "student", "full", dtype=dtype), vocabulary=90)
    before = following.score(written.ids, written)[1].logprobs
    *buckets, manifest = received(learner.publish_average("mean"))
    following.load_weights(*buckets, manifest)  # type: ignore[arg-type]
    now = {**models, "now": tmp_path / "saved"}
    loaded = LocalTeacher(teacher_config(now, "now", "full", dtype=dtype), vocabulary=90)
    found, expected = (actor.score(written.ids, written)[1] for actor in (following, loaded))
    assert np.nanmax(np.abs(found.logprobs - before)) > 1e-3
    tolerance = {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    np.testing.assert_allclose(found.support_logprobs, expected.support_logprobs, atol=tolerance)


def test_damaged_weights_and_those_of_another_model_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    *buckets, manifest = received(make_learner(models, teachers=follower(models)).publish_average("mean"))
    teacher = LocalTeacher(teacher_config(models, "student", "full"))
    damaged = [bucket.copy() for bucket in buckets]  # type: ignore[union-attr]
    damaged[0][100] ^= 1
    with pytest.raises(WeightError, match="checksum"):
        teacher.load_weights(*damaged, manifest)  # type: ignore[arg-type]
    wider = {"wider": make_tiny_model(tmp_path / "wider", hidden=64, layers=1)}
    with pytest.raises(WeightError, match="other tensors"):
        LocalTeacher(teacher_config(wider, "wider", "full")).load_weights(*buckets, manifest)  # type: ignore[arg-type]
