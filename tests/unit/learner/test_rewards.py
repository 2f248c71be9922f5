"""What the learner makes of rewards, and of responses that the teacher has written: gradients by an independent loop."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.trajectory import Trajectories
from learner.config import ObjectiveConfig, OptimizerConfig
from tests.tiny_updates import make_learner, sampled

OPEN = OptimizerConfig(learning_rate=1e-3, warmup_updates=0, max_grad_norm=1e9)
REWARDS = np.array([1.0, 0.0, 0.5, 0.5, -1.0, 2.0], np.float32)
ADVANTAGES = torch.tensor([1.0, -1.0, 0.0, 0.0, -3.0, 3.0])
"""Each reward less that of the prompt's other sample."""


def gradients(models: dict[str, Path], objective: ObjectiveConfig, written: Trajectories, signal: str) -> dict:
    learner = make_learner(models, objective=objective, optimizer=OPEN)
    scores = sampled(models, "other", signal)[1]
    metrics = learner.update(written.ids, written, scores)
    found = {n: p.grad.clone() for n, p in learner._model.named_parameters() if p.grad is not None}
    return {"metrics": metrics, **found}


def by_hand(models: dict[str, Path], written: Trajectories, cost_B: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of sum_i cost_i sum_t log pi(y_it) / N, sequence by sequence."""
    model = AutoModelForCausalLM.from_pretrained(models["student"], dtype=torch.float32)
    loss = torch.zeros(())
    for i in range(len(written)):
        prompt = written.prompt_tokens[slice(*written.prompt_offsets[i : i + 2])]
        response = written.response_tokens[slice(*written.response_offsets[i : i + 2])]
        tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        logprobs = model(tokens[None]).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        loss = loss + cost_B[i] * logprobs.gather(-1, tokens[len(prompt) :, None]).sum()
    (loss / len(written.response_tokens)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict, expected: dict[str, torch.Tensor]) -> None:
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=2e-6), name


def test_the_reward_alone_is_the_policy_gradient_of_its_advantage(models: dict[str, Path]) -> None:
    written = replace(sampled(models, "other")[0], rewards=REWARDS)
    found = gradients(models, ObjectiveConfig(estimator="reward"), written, "sampled")
    assert found["metrics"]["reward_mean"] == pytest.approx(0.5)
    assert_close(found, by_hand(models, written, -ADVANTAGES))


@pytest.mark.parametrize(
    "objective",
    [ObjectiveConfig(), ObjectiveConfig(estimator="to_go", baseline="group_mean"), ObjectiveConfig(estimator="full")],
    ids=["immediate", "whole update", "full"],
)
def test_a_weighted_reward_is_added_to_what_the_teacher_says(
    models: dict[str, Path], objective: ObjectiveConfig
) -> None:
    written = replace(sampled(models, "other")[0], rewards=REWARDS)
    plain = gradients(models, objective, written, "full")
    tilted = gradients(models, replace(objective, reward_weight=0.7), written, "full")
    reward = by_hand(models, written, -0.7 * ADVANTAGES)
    assert_close(tilted, {name: plain[name] + reward[name] for name in reward})
    assert max(gradient.abs().max() for gradient in reward.values()) > 1e-3


def test_masked_tokens_are_no_part_of_a_rewards_cost(models: dict[str, Path]) -> None:
    written = replace(sampled(models, "other")[0], rewards=REWARDS)
    masked = ObjectiveConfig(estimator="reward", masked_token_ids=sorted(set(written.response_tokens.tolist())))
    found = gradients(models, masked, written, "sampled")
    assert all(not gradient.any() for name, gradient in found.items() if name != "metrics")


def test_sft_is_the_cross_entropy_of_what_was_written(models: dict[str, Path]) -> None:
    written = replace(sampled(models, "other")[0], behaviour_logprobs=np.zeros(0, np.float32))
    written = replace(written, behaviour_logprobs=np.zeros(len(written.response_tokens), np.float32))
    found = gradients(models, ObjectiveConfig(estimator="sft"), written, "sampled")
    assert_close(found, by_hand(models, written, -torch.ones(6)))
    assert found["metrics"]["clip_fraction"] == 0
