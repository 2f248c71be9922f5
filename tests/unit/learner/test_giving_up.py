"""An update that is given up leaves no trace: before the first step it is as if it had never begun, after it it is finished."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.errors import GivenUpError
from learner.config import MismatchConfig, ObjectiveConfig
from learner.learner import Learner
from tests.tiny_updates import make_learner, sampled, weights_of

SEVERAL: dict[str, Any] = {"microbatch_tokens": 1, "minibatches_per_update": 3, "epochs_per_update": 2}
CORRECTED = ObjectiveConfig(mismatch=MismatchConfig(correction="truncate"))
"""It takes a pass over the update before the first step."""


def give_up_at(learner: Learner, method: str, number: int) -> list[int]:
    """Gives up in this call of a method of its `Forward`; returns a list that grows with each call."""
    wrapped, calls = getattr(learner._forward, method), []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) == number:
            learner.give_up()
        return wrapped(*arguments, **keywords)

    setattr(learner._forward, method, counted)
    return calls


def saved(learner: Learner, folder: Path) -> dict[str, torch.Tensor]:
    learner.save(str(folder))
    while not learner.saved():
        pass
    return load_file(folder / "model.safetensors") | load_file(folder / "training" / "optimizer.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("method", "objective"), [("loss", ObjectiveConfig()), ("columns", CORRECTED)], ids=["gradient", "look ahead"]
)
def test_before_the_first_step_weights_and_moments_are_those_of_the_update_before(
    models: dict[str, Path], tmp_path: Path, method: str, objective: ObjectiveConfig
) -> None:
    written, scores = sampled(models, "other")
    learner = make_learner(models, microbatch_tokens=1, objective=objective)
    learner.update(written.ids, written, scores)
    before = saved(learner, tmp_path / "before")
    passes = give_up_at(learner, method, 2)
    with pytest.raises(GivenUpError, match="update 2 was given up"):
        learner.update(written.ids, written, scores)
    assert passes == [1, 2]  # of six
    assert learner.policy_version == 1 and same(saved(learner, tmp_path / "after"), before)
    # A campaign that goes on from there takes the update as one that was never interrupted.
    again, calm = make_learner(models, checkpoint=tmp_path / "after", microbatch_tokens=1, objective=objective), learner
    calm._gives_up = False
    for one in (again, calm):
        one.update(written.ids, written, scores)
    assert torch.equal(weights_of(again), weights_of(calm))


def test_no_update_begins_after_it(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    learner = make_learner(models)
    learner.give_up()
    passes = give_up_at(learner, "loss", 0)
    with pytest.raises(GivenUpError):
        learner.update(written.ids, written, scores)
    assert passes == []


def test_after_the_first_step_the_update_is_finished(models: dict[str, Path], tmp_path: Path) -> None:
    written, scores = sampled(models, "other")
    learner, calm = make_learner(models, **SEVERAL), make_learner(models, **SEVERAL)
    passes = give_up_at(learner, "loss", 4)  # two passes are a step
    metrics = learner.update(written.ids, written, scores)
    calm.update(written.ids, written, scores)
    assert len(passes) == 12 and metrics["steps_taken"] == 6
    assert same(saved(learner, tmp_path / "ours"), saved(calm, tmp_path / "theirs"))


def test_the_kl_that_is_measured_after_the_last_step_is_no_place_to_give_up(models: dict[str, Path]) -> None:
    from learner.config import TrustRegionConfig

    objective = ObjectiveConfig(trust_region=TrustRegionConfig(beta=0.1, target_kl=1e-6))
    written, scores = sampled(models, "other")
    learner = make_learner(models, microbatch_tokens=1, objective=objective)
    measure = learner._old_policy.forward_kl

    def measured(*arguments: Any) -> float:
        learner.give_up()
        return measure(*arguments)

    learner._old_policy.forward_kl = measured  # type: ignore[method-assign]
    learner.update(written.ids, written, scores)
    assert learner._gives_up and learner.policy_version == 1 and learner._beta != 0.1
