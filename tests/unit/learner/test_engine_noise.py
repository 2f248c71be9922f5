"""Tokens of an engine that rounds to bfloat16: the clip acts on what the learner has moved, not on the rounding."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.errors import UserError
from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories
from learner.config import MismatchConfig, ObjectiveConfig, OptimizerConfig, TrustRegionConfig
from learner.validation import refuse_contradictions, starts_at_learner
from tests.tiny_updates import make_learner, sampled, teacher_config, weights_of


@pytest.fixture(scope="module")
def loud(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student of the size of a real one in its logits: with its head times 20, bfloat16 rounds by a tenth of a nat."""
    path = tmp_path_factory.mktemp("loud") / "student"
    model = AutoModelForCausalLM.from_pretrained(models["student"], dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(20)
    model.save_pretrained(path)
    for file in models["student"].iterdir():
        if not (path / file.name).exists():
            (path / file.name).write_bytes(file.read_bytes())
    return {"student": path, "other": models["other"]}


@pytest.fixture(scope="module")
def update(loud: dict[str, Path]) -> tuple[Trajectories, np.ndarray, TeacherScores]:
    """(what a bfloat16 engine wrote, the same tokens' log-probs in float32, their scores)."""
    exact, scores = sampled(loud, "other", "sampled")
    rounded = AutoModelForCausalLM.from_pretrained(loud["student"], dtype=torch.bfloat16).eval()
    recorded = []
    for prompt, response in zip(
        np.split(exact.prompt_tokens, exact.prompt_offsets[1:-1]),
        np.split(exact.response_tokens, exact.response_offsets[1:-1]),
        strict=True,
    ):
        text = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        with torch.no_grad():
            logits = rounded(text).logits[0, len(prompt) - 1 : -1].float()
        recorded.append(logits.log_softmax(-1).gather(-1, text[0, len(prompt) :, None])[:, 0].numpy())
    return replace(exact, behaviour_logprobs=np.concatenate(recorded)), exact.behaviour_logprobs, scores


def learn(models: dict[str, Path], written: Trajectories, scores: TeacherScores, **changes: Any) -> tuple[Any, Any]:
    learner = make_learner(models, publish_dtype="bfloat16", **changes)
    return learner.update(written.ids, written, scores), weights_of_model(learner)


def weights_of_model(learner: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in learner._model.parameters()])


def test_the_first_update_clips_no_rounding_by_default(loud: dict[str, Path], update: Any) -> None:
    written, exact, scores = update
    noise = exact - written.behaviour_logprobs
    assert np.exp(np.abs(noise).max()) > 1.2, "the example has to reach beyond clip_high"
    before, _ = learn(loud, written, scores, objective=ObjectiveConfig(mismatch=MismatchConfig(pi_old="engine")))
    assert before["clip_fraction"] > 0 and before["ratio_max"] > 1.2  # what rounding does when it is taken for a step
    found, _ = learn(loud, written, scores)
    assert found["clip_fraction"] == 0 and found["ratio_max"] == 1 and found["forward_kl_old"] == 0
    by_hand = np.minimum(np.exp(noise), 2) * (exact - scores.logprobs)  # E under the engine that sampled
    assert found["loss"] == pytest.approx(by_hand.mean(), rel=1e-3)
    for metrics in (before, found):  # measured also where nothing is corrected
        weights = np.exp(noise)
        expected = weights.sum() ** 2 / len(weights) / (weights**2).sum()
        assert metrics["mismatch_ess"] == pytest.approx(expected, rel=1e-4) and expected < 0.999
        assert metrics["engine_logprob_abs_diff"] == pytest.approx(np.abs(noise).mean(), rel=1e-3)


@pytest.mark.parametrize("stale", [0, 1])
@pytest.mark.parametrize("steps", [{}, {"minibatches_per_update": 3}, {"epochs_per_update": 2}])
def test_no_step_of_an_update_clips_rounding(
    loud: dict[str, Path], update: Any, stale: int, steps: dict[str, int]
) -> None:
    written, exact, scores = update
    written = replace(written, policy_versions=written.policy_versions - 2 * stale)
    slow = OptimizerConfig(learning_rate=1e-9, warmup_updates=0)
    found, _ = learn(loud, written, scores, optimizer=slow, **steps)
    assert found["clip_fraction"] == 0
    # Of an older version the ratio to the policy that sampled is still measured: staleness is in it.
    moved = np.exp(exact - written.behaviour_logprobs).max() if stale else 1
    assert found["ratio_max"] == pytest.approx(moved, rel=1e-3)


def test_the_pass_before_the_first_step_and_the_step_itself_find_the_same(loud: dict[str, Path], update: Any) -> None:
    written, _, scores = update
    stale = replace(written, policy_versions=written.policy_versions - 2)
    for own in (written, stale):
        objective = ObjectiveConfig(trust_region=TrustRegionConfig(max_kl=1e9, beta=0.1))
        looked, after = learn(loud, own, scores, objective=objective)
        plain, same = learn(loud, own, scores, objective=ObjectiveConfig(trust_region=TrustRegionConfig(beta=0.1)))
        torch.testing.assert_close(after, same, rtol=0, atol=1e-6)
        assert looked["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_what_the_learner_moves_is_still_clipped(loud: dict[str, Path], update: Any) -> None:
    written, _, scores = update
    fast = OptimizerConfig(learning_rate=0.05, warmup_updates=0)
    found, _ = learn(loud, written, scores, optimizer=fast, epochs_per_update=3)
    assert found["clip_fraction"] > 0.1 and found["ratio_max"] > 1.2


def test_without_a_clip_it_is_the_ratio_to_the_engine_as_before(loud: dict[str, Path], update: Any) -> None:
    written, _, scores = update
    free = {"clip_low": None, "clip_high": None}
    old = ObjectiveConfig(**free, mismatch=MismatchConfig(pi_old="engine"))  # type: ignore[arg-type]
    _, before = learn(loud, written, scores, objective=old)
    _, after = learn(loud, written, scores, objective=ObjectiveConfig(**free))  # type: ignore[arg-type]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_rewards_beside_a_full_divergence_are_not_clipped_for_rounding(loud: dict[str, Path], update: Any) -> None:
    written, _, _ = update
    _, full = sampled(loud, "other", "full")
    written = replace(written, rewards=np.array([1, 0, 1, 0, 0, 1], np.float32))
    objective = ObjectiveConfig(estimator="full", reward_weight=1.0)
    found, _ = learn(loud, written, full, objective=objective)
    assert found["clip_fraction"] == 0


def test_engines_and_learners_of_32_bits_stay_as_they_were(loud: dict[str, Path], update: Any) -> None:
    written, _, scores = update
    for dtypes, own in (
        (("float32", "float32"), False),
        (("bfloat16", "float32"), True),
        (("float32", "bfloat16"), True),
    ):
        assert starts_at_learner(ObjectiveConfig(), *dtypes) == own
    assert not starts_at_learner(ObjectiveConfig(estimator="sft"), "bfloat16")
    assert not starts_at_learner(ObjectiveConfig(mismatch=MismatchConfig("truncate")), "bfloat16")
    exact = make_learner(loud)
    exact.update(written.ids, written, scores)
    named = make_learner(loud, objective=ObjectiveConfig(mismatch=MismatchConfig(pi_old="engine")))
    named.update(written.ids, written, scores)
    assert torch.equal(weights_of(exact), weights_of(named))


def test_a_correction_relative_to_the_engine_is_refused(loud: dict[str, Path]) -> None:
    objective = ObjectiveConfig(mismatch=MismatchConfig("truncate", pi_old="engine"))
    teachers = {"default": teacher_config(loud, "other", "sampled")}
    with pytest.raises(UserError, match=r"mismatch\.pi_old: found engine, expected auto or learner"):
        refuse_contradictions(objective, teachers, str(loud["student"]), 1)
