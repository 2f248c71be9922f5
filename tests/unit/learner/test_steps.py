"""Which optimiser steps are taken, and what is measured of several: minibatches, epochs, limits, nothing to learn from."""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.errors import CheckpointError, NonFiniteLossError
from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories
from cluster.records.metric_table import METRICS
from learner.config import MismatchConfig, ObjectiveConfig, OptimizerConfig, TrustRegionConfig
from learner.learner import Learner
from learner.objective.policy_gradient import surrogate
from learner.objective.trust_region import k3
from tests.tiny_updates import make_learner, sampled

STILL = OptimizerConfig(learning_rate=1e-12, warmup_updates=0)
"""No weight changes in float32: every pass computes the same."""
DECAYING = OptimizerConfig(learning_rate=1e-2, warmup_updates=0, weight_decay=0.1)
NOISE = 0.05
"""Nats a token between engine and learner."""


def state_of(learner: Learner) -> dict[str, torch.Tensor]:
    """Copies of the weights and of AdamW's state."""
    moments = {
        f"{place}.{name}": value.clone()
        for place, state in enumerate(learner._optimizer.state.values())
        for name, value in state.items()
    }
    return moments | {name: p.detach().clone() for name, p in learner._model.named_parameters()}


def moved(before: dict[str, torch.Tensor], learner: Learner) -> float:
    """The largest change of a weight or of the optimiser's state."""
    now = state_of(learner)
    return max(((now[name] - value).abs().max().item() for name, value in before.items()), default=0.0)


def without(scores: TeacherScores, written: Trajectories, rows: list[int]) -> TeacherScores:
    """The trajectories with these numbers have no score."""
    chosen = np.repeat(np.isin(np.arange(len(written)), rows), written.lengths)
    return replace(scores, logprobs=np.where(chosen, np.nan, scores.logprobs).astype(np.float32))


def noisy(written: Trajectories, noise: float = NOISE) -> Trajectories:
    added = np.random.default_rng(3).normal(0, noise, len(written.behaviour_logprobs)).astype(np.float32)
    return replace(written, behaviour_logprobs=written.behaviour_logprobs + added)


@pytest.mark.parametrize("why", ["no scores", "all masked", "no weight"])
def test_an_update_without_a_token_changes_neither_weights_nor_moments(why: str, models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other", "sampled")
    mismatch = MismatchConfig("mask", low=1.0, high=1.0 + 1e-9) if why == "no weight" else MismatchConfig()
    objective = ObjectiveConfig(mismatch=mismatch, masked_token_ids=list(range(6, 40)) if why == "all masked" else [])
    learner = make_learner(models, optimizer=DECAYING)
    learner.update(written.ids, written, scores)  # from here on there are moments to go on with
    learner._config.objective = learner._forward._objective = objective
    learner._masked_token_ids = objective.masked_token_ids
    before = state_of(learner)
    if why == "no scores":
        scores = without(scores, written, list(range(6)))
    for version in range(2, 5):
        metrics = learner.update(written.ids, noisy(written), scores)
        assert (metrics["steps_taken"], metrics["steps_skipped"]) == (0, 1)
        assert (metrics["loss"], metrics["grad_norm"]) == (0, 0) and math.isnan(metrics["reverse_kl"])
        assert learner.policy_version == version
    assert moved(before, learner) == 0


def test_a_minibatch_without_a_token_is_left_out(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other", "sampled")
    some, one = (make_learner(models, optimizer=DECAYING, minibatches_per_update=n) for n in (3, 1))
    found = some.update(written.ids, written, without(scores, written, [0, 3, 2, 5]))  # of 0 3, 1 4, 2 5
    expected = one.update(written.ids[[1, 4]], written, scores)
    assert (found["steps_taken"], found["steps_skipped"]) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(state_of(some).values(), state_of(one).values(), strict=True))
    for name in ("loss", "grad_norm", "tokens_trained", "entropy"):
        assert found[name] == expected[name], name


@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_the_limit_of_a_step_does_not_see_the_noise_of_the_engine(estimator: str, models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other", "full")
    region = TrustRegionConfig(estimator=estimator, max_kl=1e-3)  # type: ignore[arg-type]
    rate = OptimizerConfig(learning_rate=3e-3, warmup_updates=0)
    learner = make_learner(
        models, objective=ObjectiveConfig(trust_region=region), optimizer=rate, minibatches_per_update=2
    )
    wild = noisy(written, 1.0)
    scales = []
    for _ in range(6):
        before = state_of(learner)
        scales.append(learner.update(wild.ids, wild, scores)["step_scale"])
        assert moved(before, learner) > 0
    assert min(scales) > 0 and min(scales) < 1, "the limit acts, and takes nothing back entirely"
    if estimator == "k3":
        quiet = make_learner(
            models, objective=ObjectiveConfig(trust_region=TrustRegionConfig(target_kl=0.01, beta=1.0)), optimizer=STILL
        )
        assert quiet.update(wild.ids, wild, scores)["beta"] == 1.0
        assert quiet._beta == 0.5, "no step was made, so the KL is 0, whatever the engine recorded"


def test_a_step_that_is_taken_back_leaves_the_weights_to_the_bit_and_keeps_its_gradient(
    models: dict[str, Path],
) -> None:
    written, scores = sampled(models, "other", "full")
    region = TrustRegionConfig(max_kl=1e-12)
    rate = OptimizerConfig(learning_rate=1e4, warmup_updates=0)
    learner = make_learner(models, objective=ObjectiveConfig(trust_region=region), optimizer=rate)
    before = state_of(learner)
    metrics = learner.update(written.ids, written, scores)
    assert (metrics["step_scale"], metrics["steps_taken"], metrics["steps_skipped"]) == (0, 0, 0)
    assert moved(before, learner) == 0 and learner.policy_version == 1
    assert any(state["exp_avg"].abs().max() > 0 for state in learner._optimizer.state.values())


def test_a_step_to_infinity_is_taken_back(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    written, scores = sampled(models, "other", "full")
    learner = make_learner(models, objective=ObjectiveConfig(trust_region=TrustRegionConfig(max_kl=1e-3)))
    before = state_of(learner)
    plain = learner._optimizer.step

    def broken() -> None:
        plain()
        with torch.no_grad():
            next(learner._model.parameters()).fill_(torch.inf)

    monkeypatch.setattr(learner._optimizer, "step", broken)
    assert learner.update(written.ids, written, scores)["step_scale"] == 0
    assert moved(before, learner) == 0


def test_what_was_broken_off_after_some_steps_is_not_saved(models: dict[str, Path], tmp_path: Path) -> None:
    written, scores = sampled(models, "other")
    logprobs = written.behaviour_logprobs.copy()
    logprobs[written.response_offsets[1] : written.response_offsets[2]] = np.nan  # of the second minibatch
    learner = make_learner(models, minibatches_per_update=2, microbatch_tokens=1)
    with pytest.raises(NonFiniteLossError, match=r"trajectories 0/0/1.*the weights belong to no version"):
        learner.update(written.ids, replace(written, behaviour_logprobs=logprobs), scores)
    with pytest.raises(CheckpointError, match="broken off between its steps"):
        learner.save(str(tmp_path / "torn"))
    assert not (tmp_path / "torn").exists()
    whole = make_learner(models, minibatches_per_update=2)
    whole.update(written.ids, written, scores)
    whole.save(str(tmp_path / "whole"))
    while not whole.saved():
        time.sleep(0.001)


@pytest.mark.parametrize("far", [19.0, 21.0, 60.0, 500.0])
def test_a_token_that_has_gone_far_is_pushed_back_by_a_finite_gradient(far: float) -> None:
    logprobs, old = torch.tensor([-1.0, -1.0], requires_grad=True), torch.tensor([-1.0 - far, -1.0])
    for low, high in ((None, None), (0.2, 0.2)):
        cost, clipped = surrogate(logprobs, old, torch.tensor([3.0, 3.0]), low, high)
        (gradient,) = torch.autograd.grad(cost.sum(), logprobs)
        assert gradient.isfinite().all() and gradient[0] >= 1e8 * gradient[1] > 0 and not clipped.any()
    (gradient,) = torch.autograd.grad(k3(logprobs, old).sum(), logprobs)
    assert gradient.isfinite().all() and gradient[0] > 1e8 and gradient[1] == 0
    # What the teacher likes is not pushed further: the clip takes it.
    cost, clipped = surrogate(logprobs, old, torch.tensor([-3.0, -3.0]), 0.2, 0.2)
    assert clipped.tolist() == [True, False] and cost[0].item() == pytest.approx(-3.6)


def test_a_far_token_in_an_update_makes_finite_metrics_and_a_step_against_it(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other", "full")
    logprobs = written.behaviour_logprobs.copy()
    logprobs[0] -= 200
    learner = make_learner(models, objective=ObjectiveConfig(clip_low=None, clip_high=None))
    cost = replace(scores, logprobs=np.minimum(scores.logprobs, written.behaviour_logprobs - 1))
    metrics = learner.update(written.ids, replace(written, behaviour_logprobs=logprobs), cost)
    assert metrics["ratio_max"] == pytest.approx(math.exp(20), rel=1e-3) and metrics["grad_norm"] > 1e6
    assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float))


# ------------------------------------------------------------------------------------------- what is measured of steps

OF_ONE_STEP = {"grad_norm", "engine_logprob_abs_diff"}
"""Metrics of the last step's trajectories alone, or of the first's."""
SPLITS: dict[str, dict[str, Any]] = {
    "minibatches": {"minibatches_per_update": 3},
    "epochs": {"epochs_per_update": 3},
    "both": {"minibatches_per_update": 2, "epochs_per_update": 2},
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_every_metric_means_the_same_however_an_update_is_split_into_steps(
    aggregation: str, split: str, models: dict[str, Path]
) -> None:
    written, scores = sampled(models, "other", "topk")
    scores = without(scores, written, [2])
    written = noisy(written)
    objective = ObjectiveConfig(
        estimator="to_go",
        aggregation=aggregation,  # type: ignore[arg-type]
        aggregation_constant=7.0 if aggregation == "constant" else None,
        trust_region=TrustRegionConfig(beta=0.5),
    )
    whole, parts = (
        make_learner(models, objective=objective, optimizer=STILL, **changes).update(
            written.ids, written, scores, domains=["x", "y"] * 3
        )
        for changes in ({}, SPLITS[split])
    )
    assert whole.keys() == parts.keys()
    steps = SPLITS[split].get("minibatches_per_update", 1) * SPLITS[split].get("epochs_per_update", 1)
    assert (whole.pop("steps_taken"), parts.pop("steps_taken")) == (1, steps)
    for name in whole.keys() - {
        "busy_seconds",
        "processor_seconds",
        *(OF_ONE_STEP if "mini" in str(SPLITS[split]) else ()),
    }:
        assert parts[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name
    assert whole.keys() <= {*METRICS, "busy_seconds", "processor_seconds"} | {
        name for name in whole if name.startswith("domain/")
    }


def test_what_the_engine_and_the_learner_differ_by_does_not_contain_training(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other", "sampled")
    fast = OptimizerConfig(learning_rate=0.05, warmup_updates=0)
    learner = make_learner(models, optimizer=fast, minibatches_per_update=3, epochs_per_update=2)
    metrics = learner.update(written.ids, written, scores)
    assert metrics["ratio_max"] > 1.1 and metrics["engine_logprob_abs_diff"] < 1e-5


def test_the_support_of_a_token_is_missed_only_by_what_reads_it(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other", "topk")
    scores.support_logprobs[[1, 5, 6]] = np.nan
    for objective, masked in (
        (ObjectiveConfig(), 0),
        (ObjectiveConfig(estimator="to_go", baseline="batch_mean"), 0),
        (ObjectiveConfig(estimator="sft"), 0),
        (ObjectiveConfig(baseline="exact_kl"), 3),
        (ObjectiveConfig(estimator="to_go_expected"), 3),
        (ObjectiveConfig(estimator="full"), 3),
    ):
        metrics = make_learner(models, objective=objective).update(written.ids, written, scores)
        assert metrics["tokens_trained"] == len(written.response_tokens) - masked, objective.estimator
        assert 0 < metrics["top8_overlap"] < 1 and math.isfinite(metrics["loss"])
