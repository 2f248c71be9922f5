"""A teacher equal to the student trains nothing: at every temperature, for every estimator, divergence and signal.

The cases come from the tables, so a new row is tested, or fails here.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from actors.config import Signal
from actors.teacher.local import LocalTeacher
from actors.teacher_scores import TeacherScores
from actors.trajectory import Limits, Prompts, Trajectories
from learner.config import ObjectiveConfig
from learner.objective.estimator_table import DIVERGENCES, ESTIMATORS
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import make_learner, sampled, teacher_config

TEMPERATURES = (0.6, 1.0, 1.5)
DISTILLING = [name for name, row in ESTIMATORS.items() if row.is_coefficient or not row.samples_action]
"""Estimators whose cost is zero where teacher and student agree: all that compare the two."""
OBJECTIVES = {
    name: ObjectiveConfig(estimator=name, gamma=0.9 if ESTIMATORS[name].discounts else 1) for name in DISTILLING
}
OBJECTIVES |= {f"full, {name}": ObjectiveConfig(estimator="full", divergence=name) for name in DIVERGENCES}
CASES = [
    (name, signal, temperature)
    for name, objective in OBJECTIVES.items()
    for signal in get_args(Signal)
    for temperature in TEMPERATURES
    if signal != "sampled" or not ESTIMATORS[objective.estimator].needs_distribution
]


@cache
def at(student: Path, other: Path, teacher: str, signal: str, temperature: float) -> tuple[Trajectories, TeacherScores]:
    """Samples of the student at a temperature, and their scores by a teacher at the same one; kept for all cases."""
    return sampled({"student": student, "other": other}, teacher, signal, temperature=temperature)


def update(models: dict, signal: str, objective: ObjectiveConfig, temperature: float, of_teacher: float) -> dict:
    """The metrics of one update whose teacher has the student's weights."""
    directories = models["student"], models["other"]
    written, _ = at(*directories, "student", signal, temperature)
    _, scores = at(*directories, "student", signal, of_teacher)
    teachers = {"teacher": teacher_config(models, "student", signal, temperature=of_teacher)}
    learner = make_learner(
        models, objective=objective, teachers=teachers, temperature=temperature, microbatch_tokens=40
    )
    return learner.update(written.ids, written, scores)


@pytest.mark.parametrize(("name", "signal", "temperature"), CASES)
def test_a_teacher_equal_to_the_student_is_a_fixed_point(
    name: str, signal: str, temperature: float, models: dict[str, Path]
) -> None:
    metrics = update(models, signal, OBJECTIVES[name], temperature, temperature)
    assert metrics["tokens_trained"] > 0
    assert abs(metrics["loss"]) < 2e-5 and abs(metrics["reverse_kl"]) < 1e-5
    assert metrics["grad_norm"] < 1e-4
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5) and metrics["clip_fraction"] == 0


def test_the_estimators_that_compare_nothing_are_those_without_a_teachers_cost() -> None:
    others = {name: row for name, row in ESTIMATORS.items() if name not in DISTILLING}
    assert all(row.needs_reward or row.text_by == "teacher" for row in others.values())


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_equal_rewards_train_nothing_and_copied_text_has_the_teachers_log_probs(
    temperature: float, models: dict[str, Path]
) -> None:
    written, scores = sampled(models, "student", "sampled", temperature=temperature)
    rewarded = replace(written, rewards=np.ones(len(written), np.float32))
    reward = make_learner(models, objective=ObjectiveConfig(estimator="reward"), temperature=temperature)
    assert reward.update(written.ids, rewarded, scores)["grad_norm"] < 1e-6
    sft = make_learner(models, objective=ObjectiveConfig(estimator="sft"), temperature=temperature)
    assert abs(sft.update(written.ids, written, scores)["reverse_kl"]) < 1e-5


@pytest.mark.parametrize("signal", get_args(Signal))
def test_a_teacher_at_a_temperature_of_its_own_is_another_policy(signal: str, models: dict[str, Path]) -> None:
    same = update(models, signal, ObjectiveConfig(), 0.6, 0.6)
    other = update(models, signal, ObjectiveConfig(), 0.6, 1.0)
    assert same["grad_norm"] < 1e-4 < 1e-2 < other["grad_norm"]
    assert other["reverse_kl"] != 0


@pytest.mark.parametrize("signal", ["sampled", "topk", "student_topk", "full"])
def test_scores_are_those_of_the_tempered_logits(signal: str, models: dict[str, Path]) -> None:
    written, _ = sampled(models, "other", signal)
    plain = LocalTeacher(teacher_config(models, "other", "full")).score(written.ids, written)[1]
    found = LocalTeacher(teacher_config(models, "other", signal, temperature=0.6)).score(written.ids, written)[1]
    expected = torch.log_softmax(torch.from_numpy(plain.support_logprobs) / 0.6, -1)
    tokens = torch.from_numpy(written.response_tokens.astype(np.int64))[:, None]
    torch.testing.assert_close(torch.from_numpy(found.logprobs), expected.gather(1, tokens)[:, 0], rtol=0, atol=1e-5)
    if signal != "sampled":
        at = (
            torch.from_numpy(found.support_ids.astype(np.int64))
            if signal != "full"
            else torch.arange(expected.shape[1])
        )
        torch.testing.assert_close(
            torch.from_numpy(found.support_logprobs),
            expected.gather(1, at.expand(len(expected), -1)),
            rtol=0,
            atol=1e-5,
        )


def test_what_a_teacher_writes_is_its_own_distribution_whatever_its_files_ask_for(tmp_path: Path) -> None:
    written = []
    for name, settings in (("plain", {}), ("strange", {"repetition_penalty": 5.0, "min_p": 0.9, "min_new_tokens": 9})):
        model = make_tiny_model(tmp_path / name, hidden=32, layers=1)
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "do_sample": True, **settings}))
        teacher = LocalTeacher(teacher_config({"it": model}, "it", "sampled"))
        prompts = Prompts(np.array([20, 21, 30], np.int32), np.array([0, 2, 3]))
        options = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        torch.manual_seed(0)
        written.append(
            [*teacher.generate(prompts, Limits(12, [1])), *teacher.generate(prompts, Limits(12, [1]), **options)]
        )
    for one, other in zip(*written, strict=True):
        np.testing.assert_array_equal(one, other)
