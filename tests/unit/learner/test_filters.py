"""Samples of a filtered policy (top-p, top-k) and of a padded vocabulary: the ratio does not see what was left out."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from actors.config import SamplingConfig
from actors.errors import CampaignError
from actors.rollout.engine import told_apart
from actors.teacher.local import LocalTeacher
from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories, select_trajectories
from learner.config import MismatchConfig, ObjectiveConfig, TrustRegionConfig
from learner.objective.estimator_table import ESTIMATORS
from learner.objective.policy_gradient import filter_weights
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import make_learner, sampled, teacher_config

LEVELS = get_args(MismatchConfig.__annotations__["level"])
CORRECTIONS = get_args(MismatchConfig.__annotations__["correction"])
CHOICES = [
    (name, correction, level)
    for name, row in ESTIMATORS.items()
    for correction in CORRECTIONS
    for level in (LEVELS if correction != "none" else LEVELS[:1])
    if (row.text_by == "student" or correction == "none")
    and (row.samples_action or level != "token" or correction == "none")
]


@cache
def of_student(student: Path, other: Path) -> tuple[Trajectories, TeacherScores]:
    return sampled({"student": student, "other": other}, "other")


def filtered(written: Trajectories, *, recorded: bool = True) -> tuple[Trajectories, np.ndarray]:
    """The same tokens, as if a filter had kept only some of the probability at each: (with its records, what it kept)."""
    kept = np.random.default_rng(1).uniform(0.2, 1, len(written.response_tokens)).astype(np.float32)
    before = written.behaviour_logprobs
    after = replace(written, behaviour_logprobs=before - np.log(kept))
    if recorded:
        return replace(after, unfiltered_logprobs=before), kept
    return told_apart(after, SamplingConfig(top_p=0.7), greedy=False), kept


def with_rewards(written: Trajectories) -> Trajectories:
    return replace(written, rewards=np.arange(len(written), dtype=np.float32))


@pytest.mark.parametrize(("name", "correction", "level"), CHOICES)
def test_the_first_step_on_filtered_samples_is_on_policy(
    name: str, correction: str, level: str, models: dict[str, Path]
) -> None:
    written, scores = of_student(models["student"], models["other"])
    objective = ObjectiveConfig(estimator=name, mismatch=MismatchConfig(correction, level))  # type: ignore[arg-type]
    own, kept = filtered(with_rewards(written))
    metrics = make_learner(models, objective=objective).update(own.ids, own, scores)
    if ESTIMATORS[name].text_by == "student":
        assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5) and metrics["clip_fraction"] == 0
        assert metrics["forward_kl_old"] == pytest.approx(0, abs=1e-6)
        assert metrics["importance_ess"] == pytest.approx(1) and metrics["mismatch_ess"] == pytest.approx(1)
        assert metrics["engine_logprob_abs_diff"] < 1e-5
    assert metrics["filter_weight_mean"] == pytest.approx(kept.mean(), rel=1e-4)
    assert metrics["grad_norm"] > 1e-3


def test_what_the_trust_region_limits_is_not_the_filter(models: dict[str, Path]) -> None:
    written, scores = of_student(models["student"], models["other"])
    own, _ = filtered(written)
    region = TrustRegionConfig(beta=0.5, target_kl=1e-3, max_kl=1.0)
    objective = ObjectiveConfig(estimator="full", trust_region=region)
    found = [
        make_learner(models, objective=objective, epochs_per_update=2).update(one.ids, one, scores)
        for one in (written, own)
    ]
    # The divergence samples no action: everything is as without a filter but the weight that nothing has used.
    for name in ("loss", "grad_norm", "forward_kl_old", "step_scale", "beta", "ratio_max", "clip_fraction"):
        assert found[0][name] == found[1][name]


def test_the_weight_makes_the_kept_tokens_part_of_the_policy_gradient() -> None:
    """By enumeration: E_mu[(pi / mu) A grad log pi] is the sum over the kept tokens of pi A grad log pi."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=draw, dtype=torch.double).requires_grad_()
    costs = torch.randn(7, generator=draw, dtype=torch.double)
    logprobs = logits.log_softmax(-1)
    kept = logprobs.detach().topk(4).indices
    mu = logprobs.detach()[kept].log_softmax(-1)
    weights = filter_weights(logprobs.detach()[kept], mu)
    assert torch.allclose(weights, logprobs.detach()[kept].exp().sum())
    estimate = (mu.exp() * weights * costs[kept] * logprobs[kept]).sum()
    exact = (logprobs[kept].exp() * costs[kept]).sum()
    for one, other in zip(*(torch.autograd.grad(x, logits, retain_graph=True) for x in (estimate, exact)), strict=True):
        torch.testing.assert_close(one, other)
    assert filter_weights(torch.tensor([0.1]), torch.tensor([0.0])).item() == 1


def test_each_tokens_term_has_its_weight(models: dict[str, Path]) -> None:
    written, scores = of_student(models["student"], models["other"])
    own, kept = filtered(written)
    plain, weighed = (make_learner(models, minibatches_per_update=1) for _ in range(2))
    loss = weighed.update(own.ids, own, scores)["loss"]
    cost = written.behaviour_logprobs - scores.logprobs
    assert loss == pytest.approx((kept * cost).mean(), rel=1e-4)
    assert plain.update(written.ids, written, scores)["loss"] == pytest.approx(cost.mean(), rel=1e-4)


def test_stale_filtered_samples_have_the_ratio_of_unfiltered_ones(models: dict[str, Path]) -> None:
    written, scores = of_student(models["student"], models["other"])
    stale = written.behaviour_logprobs + np.linspace(-0.5, 0.5, len(written.response_tokens), dtype=np.float32)
    old = replace(written, behaviour_logprobs=stale, policy_versions=written.policy_versions - 2)
    own, _ = filtered(old)
    for changes in ({}, {"mismatch": MismatchConfig("truncate", "prefix")}, {"recompute_log_ratio": False}):
        found = [
            make_learner(models, objective=ObjectiveConfig(**changes)).update(one.ids, one, scores)  # type: ignore[arg-type]
            for one in (old, own)
        ]
        for name in ("ratio_mean", "ratio_max", "clip_fraction", "forward_kl_old", "importance_ess", "mismatch_ess"):
            assert found[0][name] == pytest.approx(found[1][name], rel=1e-5)


@pytest.mark.parametrize("objective", [ObjectiveConfig(), ObjectiveConfig(estimator="to_go", baseline="group_mean")])
def test_an_engine_that_records_only_what_the_filter_left_is_made_good_by_the_learner(
    objective: ObjectiveConfig, models: dict[str, Path]
) -> None:
    written, scores = of_student(models["student"], models["other"])
    own, _ = filtered(written, recorded=False)
    metrics = make_learner(models, objective=objective).update(own.ids, own, scores)
    recorded, _ = filtered(written)
    expected = make_learner(models, objective=objective).update(own.ids, recorded, scores)
    for name in ("ratio_mean", "clip_fraction", "forward_kl_old", "loss", "grad_norm", "filter_weight_mean"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)
    assert "engine_logprob_abs_diff" not in metrics or np.isnan(metrics["engine_logprob_abs_diff"])
    corrected = ObjectiveConfig(mismatch=MismatchConfig("truncate"))
    with pytest.raises(CampaignError, match=r"mismatch.correction: the engine of rollout.backend records no log-probs"):
        make_learner(models, objective=corrected).update(own.ids, own, scores)


def test_what_was_recorded_before_the_filter_travels_with_its_token(models: dict[str, Path]) -> None:
    written, _ = of_student(models["student"], models["other"])
    own, _ = filtered(written)
    chosen = select_trajectories(own.ids[[3, 1]], [own])
    spans = [slice(*own.response_offsets[row : row + 2]) for row in (3, 1)]
    expected = np.concatenate([written.behaviour_logprobs[span] for span in spans])
    np.testing.assert_array_equal(chosen.policy_logprobs, expected)
    assert told_apart(written, SamplingConfig(), greedy=False) is written
    assert told_apart(written, SamplingConfig(top_k=3), greedy=True) is written
    assert told_apart(own, SamplingConfig(top_k=3), greedy=False) is own


@pytest.mark.parametrize("signal", ["sampled", "topk", "student_topk", "full", "hidden"])
def test_padding_rows_of_the_student_are_no_part_of_its_policy(signal: str, tmp_path: Path) -> None:
    """A padded student trains as the one without padding, and an id of the padding that was sampled is left out."""
    models = {name: make_tiny_model(tmp_path / name, hidden=32, layers=1, tie=False) for name in ("student", "other")}
    tokens = len(make_learner(models)._forward._weight)
    padded = {"student": make_tiny_model(tmp_path / "padded", hidden=32, layers=1, tie=False, vocab_extra=30)}
    written, _ = sampled(models, "student")
    config = teacher_config(models, "other", signal, temperature=0.7)
    scores = LocalTeacher(config, vocabulary=tokens).score(written.ids, written)[1]
    estimator = "immediate" if signal == "sampled" else "full"
    own = [
        make_learner(
            one, objective=ObjectiveConfig(estimator=estimator), teachers={"teacher": config}, vocabulary=tokens
        )
        for one in (models, padded)
    ]
    with torch.no_grad():
        for name, parameter in own[1]._model.named_parameters():
            same = dict(own[0]._model.named_parameters())[name]
            parameter[: len(same)].copy_(same) if parameter.ndim > 1 else parameter.copy_(same)
    expected, found = (learner.update(written.ids, written, scores) for learner in own)
    for name in ("loss", "grad_norm", "reverse_kl", "ratio_mean", "entropy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)
    strange = written.response_tokens.copy()
    strange[2] = tokens + 5
    metrics = own[1].update(written.ids, replace(written, response_tokens=strange), scores)
    assert metrics["tokens_trained"] == len(strange) - 1
