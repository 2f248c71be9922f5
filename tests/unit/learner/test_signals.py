"""What a teacher may send: the forms that say the same train the same, and a teacher that is the student trains nothing."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.config import StudentConfig
from actors.data.models import load_head, load_model
from actors.teacher.local import LocalTeacher
from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories
from learner.config import LearnerConfig, MismatchConfig, ObjectiveConfig, OptimizerConfig, TrustRegionConfig
from learner.learner import Learner
from learner.objective.divergences import extrapolated_teacher, renormalised, reverse_kl, with_tail
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import make_learner, sampled, teacher_config

SIGNALS = ("sampled", "topk", "student_topk", "full", "hidden")
DISTRIBUTION = {
    "full": ObjectiveConfig(estimator="full"),
    "full, forward KL": ObjectiveConfig(estimator="full", divergence="forward_kl"),
    "to_go_expected": ObjectiveConfig(estimator="to_go_expected", aggregation="sequence_sum"),
    "immediate, exact KL": ObjectiveConfig(baseline="exact_kl"),
}
ALONE = {
    "trajectory": ObjectiveConfig(estimator="trajectory"),
    "to_go, group mean": ObjectiveConfig(estimator="to_go", baseline="group_mean"),
    "to_go, batch mean": ObjectiveConfig(estimator="to_go", baseline="batch_mean"),
    "discounted": ObjectiveConfig(estimator="discounted", gamma=0.5),
    "immediate": ObjectiveConfig(),
    "immediate, early tokens": ObjectiveConfig(position_weight=0.5),
    "immediate, power": ObjectiveConfig(log_ratio_power=0.5),
    "immediate, proximal": ObjectiveConfig(proximal_weight=0.2),
}


def gradients(learner: Learner) -> torch.Tensor:
    """Of the last step, as one vector."""
    return torch.cat([p.grad.reshape(-1) for p in learner._model.parameters() if p.grad is not None])


def save(learner: Learner, path: Path) -> None:
    learner.save(str(path))
    while not learner.saved():
        time.sleep(0.001)


def learn(
    models: dict[str, Path], signal: str, objective: ObjectiveConfig, teacher: str = "other", **changes: object
) -> tuple[dict[str, float], torch.Tensor]:
    """Metrics and gradient of one update."""
    written, scores = sampled(models, teacher, signal, **{k: v for k, v in changes.items() if k in ("dtype", "top_k")})
    learner = make_learner(
        models,
        objective=objective,
        teachers={"teacher": teacher_config(models, teacher, signal, **changes)},
        head_chunk_tokens=5,
        microbatch_tokens=40,
    )
    return learner.update(written.ids, written, scores), gradients(learner)


@pytest.mark.parametrize(
    ("name", "signal"),
    [(name, signal) for name in [*ALONE, *DISTRIBUTION] for signal in SIGNALS if name in ALONE or signal != "sampled"],
)
def test_a_teacher_that_is_the_student_gives_no_loss_and_no_gradient(name: str, signal: str, models: dict) -> None:
    metrics, gradient = learn(models, signal, {**ALONE, **DISTRIBUTION}[name], "student")
    assert abs(metrics["loss"]) < 2e-5
    assert gradient.abs().max() < 1e-4
    assert abs(metrics["reverse_kl"]) < 1e-5
    assert metrics["tokens_trained"] > 0


@pytest.mark.parametrize("name", DISTRIBUTION)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_states_say_what_the_whole_vocabulary_says(name: str, dtype: str, models: dict) -> None:
    full, hidden = (learn(models, signal, DISTRIBUTION[name], dtype=dtype) for signal in ("full", "hidden"))
    assert full[1].norm() > 1e-3
    torch.testing.assert_close(hidden[1], full[1], rtol=1e-5, atol=1e-6)
    assert hidden[0]["loss"] == pytest.approx(full[0]["loss"], rel=1e-5)
    assert hidden[0]["reverse_kl"] == pytest.approx(full[0]["reverse_kl"], rel=1e-5)


def test_a_student_that_computes_in_bfloat16_does_not_round_the_teachers_head(models: dict) -> None:
    written, scores = sampled(models, "other", "hidden")
    _, full = sampled(models, "other", "full")
    found = []
    for signal, sent in (("hidden", scores), ("full", full)):
        learner = make_learner(
            models,
            compute_dtype="bfloat16",
            objective=DISTRIBUTION["full"],
            teachers={"teacher": teacher_config(models, "other", signal)},
        )
        found.append(learner.update(written.ids, written, sent)["reverse_kl"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_hidden_teacher_scores_the_sampled_tokens_too_and_in_two_bytes_a_number(models: dict) -> None:
    _, sampled_only = sampled(models, "other", "sampled", dtype="bfloat16")
    written, scores = sampled(models, "other", "hidden", dtype="bfloat16")
    np.testing.assert_array_equal(scores.logprobs, sampled_only.logprobs)
    assert scores.hidden.shape == (len(written.response_tokens), 32)
    assert scores.hidden.nbytes == 2 * scores.hidden.size


def mixture(models: dict, signal: str) -> tuple[Trajectories, list[TeacherScores]]:
    """Two teachers: a mixture on the first four trajectories, one of them alone on the last two."""
    written, _ = sampled(models, "other", signal)
    shares = {"other": [0.25] * 4, "student": [0.75] * 4 + [1.0] * 2}
    scores = []
    for name, share in shares.items():
        actor = LocalTeacher(teacher_config(models, name, signal), f"teachers.{name}")
        ids = written.ids[: len(share)]
        scores.append(actor.score(ids, written, log_weights=np.log(np.array(share, np.float32)))[1])
    return written, scores


@pytest.mark.parametrize("name", DISTRIBUTION)
def test_a_mixture_of_hidden_teachers_is_that_of_their_distributions(name: str, models: dict) -> None:
    found = []
    for signal in ("full", "hidden"):
        written, scores = mixture(models, signal)
        teachers = {name: teacher_config(models, name, signal) for name in ("student", "other")}
        learner = make_learner(models, objective=DISTRIBUTION[name], teachers=teachers, microbatch_tokens=40)
        metrics = learner.update(written.ids, written, *scores)
        found.append((metrics["reverse_kl"], gradients(learner)))
    assert found[0][0] > 0.01
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("signal", ["full", "hidden"])
def test_a_student_gains_nothing_from_rows_that_only_it_has(signal: str, models: dict) -> None:
    path = models["other"].parent / f"wide-{signal}"
    wide = {**models, "student": make_tiny_model(path, hidden=32, layers=1, vocab_extra=6)}
    written, scores = sampled(wide, "other", signal)
    configs = {"teacher": teacher_config(wide, "other", signal)}
    metrics = make_learner(wide, objective=DISTRIBUTION["full"], teachers=configs).update(written.ids, written, scores)
    own, teacher = (torch.from_numpy(sampled(wide, who, "full")[1].support_logprobs) for who in ("student", "other"))
    assert own.shape[1] == teacher.shape[1] + 6
    by_hand = reverse_kl(own[:, :-6].log_softmax(-1), teacher).mean()
    assert metrics["loss"] == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize("signal", ["full", "hidden"])
def test_teachers_whose_vocabularies_are_padded_differently_are_mixed_where_both_have_rows(
    signal: str, models: dict
) -> None:
    padded = {**models, "padded": models["other"].parent / "padded"}
    if not padded["padded"].exists():
        make_tiny_model(padded["padded"], hidden=32, layers=1, seed=7, vocab_extra=6)
    found = []
    for second in ("other", "padded"):
        written, _ = sampled(padded, "other", "sampled")
        configs = {name: teacher_config(padded, name, signal) for name in ("student", second)}
        half = np.full(len(written), np.log(0.5), np.float32)
        scores = [
            LocalTeacher(config, f"teachers.{name}").score(written.ids, written, log_weights=half)[1]
            for name, config in configs.items()
        ]
        learner = make_learner(padded, objective=DISTRIBUTION["full"], teachers=configs)
        found.append(learner.update(written.ids, written, *scores)["loss"])
    assert found[0] > 0 and np.isfinite(found).all()


def test_a_hidden_state_that_is_no_number_masks_its_token(models: dict) -> None:
    written, scores = sampled(models, "other", "hidden")
    hidden, logprobs = scores.hidden.copy(), scores.logprobs.copy()
    hidden[3], logprobs[3] = np.nan, np.nan
    learner = make_learner(
        models, objective=DISTRIBUTION["full"], teachers={"teacher": teacher_config(models, "other", "hidden")}
    )
    metrics = learner.update(written.ids, written, replace(scores, hidden=hidden, logprobs=logprobs))
    assert metrics["tokens_trained"] == len(hidden) - 1
    assert np.isfinite(metrics["grad_norm"])


@pytest.mark.parametrize("tie", [True, False])
def test_the_head_alone_is_what_the_whole_model_has(tie: bool, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m", hidden=32, layers=1, tie=tie)
    weight, bias = load_head(str(path), "bfloat16", "cpu", False, "teachers.x.model")
    model = load_model(str(path), "bfloat16", "cpu", False, "teachers.x.model")
    assert torch.equal(weight, model.get_output_embeddings().weight)
    assert bias is None


@pytest.mark.parametrize("support", ["tail", "renormalised"])
def test_the_students_own_support_is_scored_and_learnt_from(support: str, models: dict) -> None:
    written, scores = sampled(models, "other", "student_topk")
    _, full = sampled(models, "other", "full")
    np.testing.assert_array_equal(scores.support_ids, written.support_ids)
    expected = np.take_along_axis(full.support_logprobs, written.support_ids.astype(np.int64), 1)
    np.testing.assert_allclose(scores.support_logprobs, expected, atol=1e-6)
    learner = make_learner(models, objective=ObjectiveConfig(estimator="full", support=support))  # type: ignore[arg-type]
    metrics = [learner.update(written.ids, written, scores) for _ in range(4)]
    close = {"tail": with_tail, "renormalised": renormalised}[support]
    _, own = sampled(models, "student", "student_topk")
    by_hand = reverse_kl(*(close(torch.from_numpy(x.support_logprobs)) for x in (own, scores))).mean()
    assert metrics[0]["loss"] == pytest.approx(by_hand.item(), rel=1e-4)
    assert metrics[-1]["reverse_kl"] < metrics[0]["reverse_kl"]


def test_a_student_support_of_the_whole_vocabulary_is_the_full_signal(models: dict) -> None:
    written, _ = sampled(models, "other", "sampled")
    vocabulary = len(sampled(models, "other", "full")[1].support_logprobs[0])
    everything = np.tile(np.arange(vocabulary, dtype=np.int32)[::-1], (len(written.response_tokens), 1))
    written = replace(written, support_ids=everything)
    found = []
    for signal in ("student_topk", "full"):
        scores = LocalTeacher(teacher_config(models, "other", signal)).score(written.ids, written)[1]
        learner = make_learner(models, objective=DISTRIBUTION["full"])
        learner.update(written.ids, written, scores)
        found.append(gradients(learner))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_a_token_that_only_the_student_has_a_row_for_is_left_out_of_the_support(models: dict) -> None:
    written, _ = sampled(models, "other", "sampled")
    teacher = LocalTeacher(teacher_config(models, "other", "student_topk"), vocabulary=90)
    scores = teacher.score(written.ids, written)[1]
    beyond = written.support_ids >= 90
    assert 0 < beyond.any(1).sum() < len(beyond) and not beyond.all(1).any()
    assert np.array_equal(np.isnan(scores.support_logprobs), beyond)
    assert np.array_equal(np.isnan(scores.logprobs), written.response_tokens >= 90)  # and counted
    metrics = make_learner(models, objective=DISTRIBUTION["full"]).update(written.ids, written, scores)
    assert metrics["tokens_trained"] == (written.response_tokens < 90).sum()


# ------------------------------------------------------------------------------------------------------ extrapolation


@pytest.mark.parametrize(
    ("name", "signal"),
    [("immediate", "sampled"), *((name, s) for name in ("full", "to_go_expected") for s in ("full", "hidden"))],
)
def test_an_extrapolated_teacher_is_a_teacher_with_these_log_probs(name: str, signal: str, models: dict) -> None:
    """Against an update whose teacher was extrapolated by hand, here, before it was sent."""
    objective = ObjectiveConfig(estimator=name, extrapolation=1.5, reference_teacher="base")  # type: ignore[arg-type]
    third = {**models, "third": make_third(models)}
    written, scores = sampled(third, "other", signal)
    base = LocalTeacher(teacher_config(third, "third", signal), "teachers.base").score(written.ids, written)[1]
    teachers = {"teacher": teacher_config(third, "other", signal), "base": teacher_config(third, "third", signal)}
    learner = make_learner(third, objective=objective, teachers=teachers)
    learner.update(written.ids, written, scores, base)

    kind = "full" if signal == "hidden" else signal
    sent = [sampled(third, who, kind)[1] for who in ("other", "third")]
    logprobs = extrapolated_teacher(*(torch.from_numpy(s.logprobs) for s in sent), 1.5).numpy()
    supports = [torch.from_numpy(s.support_logprobs) for s in sent]
    support = extrapolated_teacher(*supports, 1.5) if supports[0].numel() else supports[0]
    support = renormalised(support) if name == "full" else support
    plain = make_learner(third, objective=ObjectiveConfig(estimator=name))  # type: ignore[arg-type]
    plain.update(written.ids, written, replace(sent[0], logprobs=logprobs, support_logprobs=support.numpy()))
    assert gradients(plain).norm() > 1e-3
    torch.testing.assert_close(gradients(learner), gradients(plain), rtol=1e-4, atol=1e-6)


def make_third(models: dict) -> Path:
    path = models["other"].parent / "third"
    return path if path.exists() else make_tiny_model(path, hidden=32, layers=1, seed=11)


def test_the_bucket_of_an_extrapolated_teacher_is_extrapolated_too(models: dict) -> None:
    third = {**models, "third": make_third(models)}
    written, scores = sampled(third, "other", "student_topk")
    base = LocalTeacher(teacher_config(third, "third", "student_topk"), "teachers.base").score(written.ids, written)[1]
    objective = ObjectiveConfig(estimator="full", extrapolation=1.5, reference_teacher="base")
    loss = make_learner(third, objective=objective).update(written.ids, written, scores, base)["loss"]
    student, teacher, reference = (
        with_tail(torch.from_numpy(s.support_logprobs))
        for s in (sampled(third, "student", "student_topk")[1], scores, base)
    )
    by_hand = reverse_kl(student, renormalised(teacher + 0.5 * (teacher - reference))).mean()
    assert loss == pytest.approx(by_hand.item(), rel=1e-4)


def test_a_reference_that_is_the_student_and_the_teacher_gives_nothing(models: dict) -> None:
    written, scores = sampled(models, "student", "full")
    base = replace(scores, teacher="base")
    for estimator in ("immediate", "full"):
        objective = ObjectiveConfig(estimator=estimator, extrapolation=2.0, reference_teacher="base")  # type: ignore[arg-type]
        learner = make_learner(models, objective=objective)
        metrics = learner.update(written.ids, written, scores, base)
        assert abs(metrics["loss"]) < 1e-5 and gradients(learner).abs().max() < 1e-4


# --------------------------------------------------------------------------- trust region, staleness, mismatch, masks


def test_the_exact_trust_region_measures_the_kl_over_the_whole_vocabulary(models: dict, tmp_path: Path) -> None:
    """Against plain forward passes of the student before and after."""
    written, scores = sampled(models, "other", "full")
    fast = OptimizerConfig(learning_rate=0.01, warmup_updates=0)
    region = TrustRegionConfig(estimator="exact", max_kl=1e9)
    learner = make_learner(
        models,
        optimizer=fast,
        objective=ObjectiveConfig(trust_region=region),
        microbatch_tokens=40,
        epochs_per_update=2,
    )
    metrics = learner.update(written.ids, written, scores)
    once = make_learner(models, optimizer=fast)
    once.update(written.ids, written, scores)
    save(once, tmp_path / "after")
    before, after = (
        torch.from_numpy(sampled({**models, "now": path}, "now", "full")[1].support_logprobs)
        for path in (models["student"], tmp_path / "after")
    )
    by_hand = (before.exp() * (before - after)).sum(-1).mean()
    assert by_hand > 1e-3
    assert metrics["forward_kl_old"] == pytest.approx(by_hand.item() / 2, rel=1e-3)  # the first of two epochs has none


def test_the_exact_trust_region_limits_the_step_by_the_exact_kl(models: dict, tmp_path: Path) -> None:
    written, scores = sampled(models, "other", "full")
    region = TrustRegionConfig(estimator="exact", max_kl=1e-3)
    learner = make_learner(
        models,
        optimizer=OptimizerConfig(learning_rate=0.02, warmup_updates=0),
        objective=ObjectiveConfig(trust_region=region),
    )
    assert learner.update(written.ids, written, scores)["step_scale"] < 1
    save(learner, tmp_path / "after")
    before, after = (
        torch.from_numpy(sampled({**models, "now": path}, "now", "full")[1].support_logprobs)
        for path in (models["student"], tmp_path / "after")
    )
    kl = (before.exp() * (before - after)).sum(-1).mean().item()
    assert 1e-3 / 5 < kl <= 1.001e-3


@pytest.mark.parametrize(("compute_dtype", "temperature"), [("float32", 1.0), ("bfloat16", 1.0), ("float32", 0.7)])
def test_the_exact_kl_of_weights_that_have_not_moved_is_zero(
    compute_dtype: str, temperature: float, models: dict
) -> None:
    written, scores = sampled(models, "other", "full")
    region = TrustRegionConfig(estimator="exact", beta=1.0)
    objective = ObjectiveConfig(trust_region=region)
    learner = make_learner(models, objective=objective, compute_dtype=compute_dtype, temperature=temperature)
    assert learner.update(written.ids, written, scores)["forward_kl_old"] == pytest.approx(0, abs=1e-7)


def test_under_staleness_the_switch_chooses_whose_log_ratio_it_is(models: dict) -> None:
    """Tokens sampled by other weights: A_t by hand, from the current student or from the one that sampled."""
    written, scores = sampled(models, "other", "sampled")
    stale = written.behaviour_logprobs + np.linspace(-0.5, 0.5, len(written.response_tokens), dtype=np.float32)
    old = replace(written, behaviour_logprobs=stale, policy_versions=written.policy_versions - 2)
    for recompute, student in ((True, written.behaviour_logprobs), (False, stale)):
        objective = ObjectiveConfig(recompute_log_ratio=recompute, clip_low=None, clip_high=None)
        loss = make_learner(models, objective=objective).update(written.ids, old, scores)["loss"]
        by_hand = np.exp(written.behaviour_logprobs - stale) * (student - scores.logprobs)
        assert loss == pytest.approx(by_hand.mean(), rel=1e-4)


def test_masked_tokens_count_in_the_weights_of_those_after_them(models: dict) -> None:
    """pi_old / pi_behaviour of a token that is not trained on is part of how its successors came about."""
    written, scores = sampled(models, "other", "sampled")
    strange = written.behaviour_logprobs.copy()
    strange[0] -= np.log(2)
    token = int(written.response_tokens[0])
    later = slice(1, int(written.response_offsets[1]))
    assert token not in written.response_tokens[later]
    mismatch = MismatchConfig(correction="truncate", level="prefix", high=10.0)
    objective = ObjectiveConfig(mismatch=mismatch, masked_token_ids=[token])
    loss = make_learner(models, objective=objective).update(
        written.ids, replace(written, behaviour_logprobs=strange), scores
    )["loss"]
    cost = written.behaviour_logprobs - scores.logprobs
    cost[later] *= 2
    assert loss == pytest.approx(cost[written.response_tokens != token].mean(), rel=1e-4)


def test_the_weight_of_a_full_divergence_stops_before_its_token(models: dict) -> None:
    written, scores = sampled(models, "other", "full")
    strange = written.behaviour_logprobs.copy()
    first = written.response_offsets[:-1]
    strange[first] -= np.log(2)
    mismatch = MismatchConfig(correction="truncate", level="prefix", high=10.0)
    objective = ObjectiveConfig(estimator="full", mismatch=mismatch)
    metrics = make_learner(models, objective=objective).update(
        written.ids, replace(written, behaviour_logprobs=strange), scores
    )
    own = torch.from_numpy(sampled(models, "student", "full")[1].support_logprobs)
    cost = reverse_kl(own, torch.from_numpy(scores.support_logprobs)).numpy()
    weights = np.full(len(cost), 2.0)
    weights[first] = 1.0
    assert metrics["loss"] == pytest.approx((weights * cost).mean(), rel=1e-4)
    assert metrics["mismatch_ess"] == pytest.approx(weights.sum() ** 2 / len(cost) / (weights**2).sum(), rel=1e-4)
    assert metrics["importance_ess"] == pytest.approx(1.0)  # that of pi / pi_old, which has not moved


def test_early_tokens_are_weighed_by_the_share_of_the_cost_that_is_to_come(models: dict) -> None:
    written, scores = sampled(models, "other", "sampled")
    by_hand = []
    for span in (slice(*written.response_offsets[i : i + 2]) for i in range(len(written))):
        cost = written.behaviour_logprobs[span] - scores.logprobs[span]
        before = np.cumsum(np.abs(cost)) - np.abs(cost)
        by_hand.append(cost * (1 + 0.5 * (1 - before / np.abs(cost).sum())))
    for microbatch_tokens in (20, 10_000):
        learner = make_learner(
            models, objective=ObjectiveConfig(position_weight=0.5), microbatch_tokens=microbatch_tokens
        )
        loss = learner.update(written.ids, written, scores)["loss"]
        assert loss == pytest.approx(np.concatenate(by_hand).mean(), rel=1e-4)


def test_tokens_masked_by_role_are_those_masked_by_id(models: dict) -> None:
    written, scores = sampled(models, "other", "sampled")
    token = int(written.response_tokens[4])
    learner = Learner(
        StudentConfig(str(models["student"])),
        LearnerConfig(compute_dtype="float32"),
        total_updates=10,
        temperature=1.0,
        publish_dtype="float32",
        bucket_bytes=1 << 20,
        masked_role_token_ids=[token],
    )
    assert learner.update(written.ids, written, scores)["tokens_trained"] == (written.response_tokens != token).sum()
