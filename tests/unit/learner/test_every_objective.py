"""Every setting of the objective, through the learner: what all of them must have in common."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from learner.config import MismatchConfig, ObjectiveConfig, OptimizerConfig, TrustRegionConfig
from tests.tiny_updates import make_learner, sampled, weights_of

OBJECTIVES = {
    "trajectory": ObjectiveConfig(estimator="trajectory"),
    "to_go": ObjectiveConfig(estimator="to_go"),
    "to_go, batch mean": ObjectiveConfig(estimator="to_go", baseline="batch_mean"),
    "to_go, group mean": ObjectiveConfig(estimator="to_go", baseline="group_mean"),
    "to_go_expected": ObjectiveConfig(estimator="to_go_expected"),
    "to_go_expected, group mean": ObjectiveConfig(estimator="to_go_expected", baseline="group_mean", gamma=0.9),
    "to_go_expected, exact KL": ObjectiveConfig(estimator="to_go_expected", baseline="exact_kl"),
    "immediate": ObjectiveConfig(),
    "immediate, exact KL": ObjectiveConfig(baseline="exact_kl"),
    "immediate, power": ObjectiveConfig(log_ratio_power=0.5),
    "immediate, proximal": ObjectiveConfig(proximal_weight=0.2),
    "immediate, sampled-time signal": ObjectiveConfig(recompute_log_ratio=False),
    "immediate, dual clip": ObjectiveConfig(dual_clip=3.0),
    "immediate, masked mismatch": ObjectiveConfig(mismatch=MismatchConfig(correction="mask")),
    "discounted": ObjectiveConfig(estimator="discounted", gamma=0.5, aggregation="sequence_sum"),
    "full": ObjectiveConfig(estimator="full"),
    "full, forward KL": ObjectiveConfig(estimator="full", divergence="forward_kl"),
    "full, JSD": ObjectiveConfig(estimator="full", divergence="jsd"),
    "full, skewed": ObjectiveConfig(estimator="full", divergence="skewed_reverse_kl", mixture=0.1),
    "full, bounded": ObjectiveConfig(estimator="full", log_ratio_clip=1.0),
    "full, trust region": ObjectiveConfig(estimator="full", trust_region=TrustRegionConfig(beta=0.1, target_kl=0.01)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(name: str, models: dict[str, Path]) -> None:
    written, scores = sampled(models, "student")
    metrics = make_learner(models, objective=OBJECTIVES[name]).update(written.ids, written, scores)
    assert abs(metrics["loss"]) < 1e-5
    assert metrics["grad_norm"] < 1e-4
    assert abs(metrics["reverse_kl"]) < 1e-5


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_does_not_depend_on_the_micro_batches(name: str, models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    norms, losses = [], []
    for microbatch_tokens in (12, 10_000):
        learner = make_learner(models, objective=OBJECTIVES[name], microbatch_tokens=microbatch_tokens)
        metrics = learner.update(written.ids, written, scores)
        norms.append(metrics["grad_norm"])
        losses.append(metrics["loss"])
    assert norms[0] > 1e-3
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("support", ["tail", "renormalised"])
def test_a_top_k_teacher_is_learnt_from(support: str, models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other", "topk")
    learner = make_learner(models, objective=ObjectiveConfig(estimator="full", support=support))  # type: ignore[arg-type]
    kl = [learner.update(written.ids, written, scores)["reverse_kl"] for _ in range(4)]
    assert kl[-1] < kl[0]


def test_several_steps_are_taken_with_minibatches_and_epochs(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    one, many = make_learner(models), make_learner(models, minibatches_per_update=3, epochs_per_update=2)
    assert one.update(written.ids, written, scores)["forward_kl_old"] == pytest.approx(0, abs=1e-6)
    assert many.update(written.ids, written, scores)["forward_kl_old"] > 1e-7  # later steps are away from pi_old
    assert one.policy_version == many.policy_version == 1


def test_a_step_beyond_the_hard_limit_is_taken_back_until_it_holds(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    fast = OptimizerConfig(learning_rate=0.02, warmup_updates=0)
    free = make_learner(models, optimizer=fast)
    before = weights_of(free)
    assert free.update(written.ids, written, scores)["step_scale"] == 1.0
    limit = ObjectiveConfig(trust_region=TrustRegionConfig(max_kl=1e-3))
    bound = make_learner(models, optimizer=fast, objective=limit)
    scale = bound.update(written.ids, written, scores)["step_scale"]
    assert 0 < scale < 1
    moved, free_move = weights_of(bound) - before, weights_of(free) - before
    torch.testing.assert_close(moved, scale * free_move, rtol=1e-3, atol=1e-6)
    # The next update's pass over the same tokens measures the KL of where this one ended.
    assert bound.update(written.ids, written, scores)["forward_kl_old"] <= 1.05e-3


def test_beta_follows_the_target(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    region = TrustRegionConfig(beta=0.5, target_kl=1.0)
    learner = make_learner(models, objective=ObjectiveConfig(trust_region=region))
    betas = [learner.update(written.ids, written, scores)["beta"] for _ in range(3)]
    assert betas[:2] == [0.5, 0.25]  # the first step's KL is far below the target
    far = make_learner(
        models,
        optimizer=OptimizerConfig(learning_rate=0.05, warmup_updates=0),
        objective=ObjectiveConfig(trust_region=TrustRegionConfig(beta=0.5, target_kl=1e-6)),
    )
    assert [far.update(written.ids, written, scores)["beta"] for _ in range(2)] == [0.5, 1.0]


def test_engine_mismatch_is_masked_out(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    strange = written.behaviour_logprobs.copy()
    strange[3] -= 5.0  # the engine thought the token e^5 times less likely than the learner does
    written = replace(written, behaviour_logprobs=strange)
    plain = make_learner(models).update(written.ids, written, scores)
    masked = ObjectiveConfig(mismatch=MismatchConfig(correction="mask"))
    corrected = make_learner(models, objective=masked).update(written.ids, written, scores)
    assert plain["ratio_max"] > 100
    assert corrected["ratio_max"] == pytest.approx(1.0, abs=1e-4)
