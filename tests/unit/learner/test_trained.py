"""Tokens that the student did not write are context: loss and gradient are those of sums that never see them.

The expected values are computed one trajectory and one token at a time, with Python's sums over the trained tokens alone.
"""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.config import SamplingConfig
from actors.rollout.engine import told_apart
from actors.teacher.local import LocalTeacher
from actors.trajectory import Trajectories, offsets_of, select_trajectories
from cluster.loop.exposure import FIRST_SAMPLE, Prefixes, by_position, parts_of
from learner import forward
from learner.config import MismatchConfig, ObjectiveConfig, OptimizerConfig, TrustRegionConfig
from learner.metrics import response_metrics
from tests.tiny_updates import make_learner, sampled, teacher_config

UNCLIPPED = {"clip_low": None, "clip_high": None}
CASES = {
    "immediate": ObjectiveConfig(**UNCLIPPED),
    "trajectory": ObjectiveConfig(estimator="trajectory", aggregation="sequence_sum", **UNCLIPPED),
    "to_go": ObjectiveConfig(estimator="to_go", aggregation="sequence_mean", **UNCLIPPED),
    "discounted": ObjectiveConfig(estimator="discounted", gamma=0.6, **UNCLIPPED),
    "to_go_expected": ObjectiveConfig(estimator="to_go_expected", gamma=0.7, **UNCLIPPED),
    "group mean": ObjectiveConfig(estimator="to_go", baseline="group_mean", **UNCLIPPED),
    "full": ObjectiveConfig(estimator="full", aggregation="constant", aggregation_constant=3.0),
    "weights of a prefix": ObjectiveConfig(mismatch=MismatchConfig("truncate", "prefix", high=9.0), **UNCLIPPED),
    "weights of a sequence": ObjectiveConfig(mismatch=MismatchConfig("truncate", "sequence", high=9.0), **UNCLIPPED),
    "weights before a token": ObjectiveConfig(
        estimator="full", mismatch=MismatchConfig("truncate", "prefix", high=9.0), **UNCLIPPED
    ),
    "trust region": ObjectiveConfig(trust_region=TrustRegionConfig(beta=0.5), **UNCLIPPED),
    "early tokens": ObjectiveConfig(position_weight=0.5, **UNCLIPPED),
}


def with_context(written: Trajectories) -> Trajectories:
    """About half of the tokens are an environment's: of no policy, so their log-probs are not numbers, and their versions are
    none, or those of the tokens beside them."""
    trained = np.random.default_rng(5).random(len(written.response_tokens)) < 0.5
    trained[written.response_offsets[:-1]] = [True, False, True, True, False, False]
    behaviour = written.behaviour_logprobs + np.random.default_rng(6).normal(0, 0.2, len(trained))
    behaviour[~trained] = np.nan
    versions = np.where(trained | (np.arange(len(trained)) % 2 == 0), written.policy_versions, -1)
    return replace(
        written,
        trained=trained,
        behaviour_logprobs=behaviour.astype(np.float32),
        policy_versions=versions.astype(np.int32),
    )


def with_conversations(written: Trajectories) -> Trajectories:
    """Some responses hold several conversations, each of which begins with an environment's token."""
    begins = np.zeros(len(written.trained), bool)
    begins[np.flatnonzero(~written.trained)[::3]] = True
    begins[written.response_offsets[:-1]] = False
    assert begins.sum() >= 3
    return replace(written, begins=begins)


def rows_of(path: Path, written: Trajectories) -> list[torch.Tensor]:
    """Of each trajectory [n, V] log-probs at the trained tokens, with gradient."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = []
    for row in range(len(written)):
        one = select_trajectories(written.ids[row : row + 1], [written])
        tokens = torch.from_numpy(np.concatenate([one.prompt_tokens, one.response_tokens]).astype(np.int64))
        edges = [0, *(len(one.prompt_tokens) + np.flatnonzero(one.begins)), len(tokens)]
        logits = torch.cat([model(tokens[None, a:b]).logits[0] for a, b in itertools.pairwise(edges)])
        # What is predicted after the end of a conversation is of a token that the student did not write.
        logits = logits[len(one.prompt_tokens) - 1 : -1]
        found.append(torch.log_softmax(logits, -1)[torch.from_numpy(one.trained)])
    return found, model


def enumerated(models: dict[str, Path], written: Trajectories, o: ObjectiveConfig) -> tuple[float, dict, int]:
    """(loss, gradients by name, trained tokens) of the objective, written out."""
    students, model = rows_of(models["student"], written)
    teachers, _ = rows_of(models["other"], written)
    costs, coefficients = [], []
    logs = []
    for row, (pi, q) in enumerate(zip(students, teachers, strict=True)):
        one = select_trajectories(written.ids[row : row + 1], [written])
        chosen = one.response_tokens[one.trained].tolist()
        t = range(len(chosen))
        logpi = [pi[i, token] for i, token in enumerate(chosen)]
        logq = [q[i, token].item() for i, token in enumerate(chosen)]
        old = one.behaviour_logprobs[one.trained].tolist()
        now = [value.item() for value in logpi]
        r = [now[i] - logq[i] for i in t]
        kl = [(pi[i].exp() * (pi[i] - q[i].detach())).sum() for i in t]
        a = {
            "immediate": lambda i, r=r: r[i],
            "trajectory": lambda i, r=r: sum(r),
            "to_go": lambda i, r=r: sum(r[i:]),
            "discounted": lambda i, r=r, o=o: sum(o.gamma**k * x for k, x in enumerate(r[i:])),
            "to_go_expected": lambda i, r=r, kl=kl, o=o: (
                r[i] + sum(o.gamma**k * x.item() for k, x in enumerate(kl[i + 1 :], 1))
            ),
            "full": lambda i: 0.0,
        }[o.estimator]
        coefficients.append([a(i) for i in t])
        logs.append((logpi, old, kl, now))
    for row, (logpi, old, kl, now) in enumerate(logs):
        own, others = coefficients[row], coefficients[row ^ 1]
        for i in range(len(logpi)):
            weight = 1.0
            if o.mismatch.correction == "truncate":
                last = {"prefix": i + (o.estimator != "full"), "sequence": len(now)}[o.mismatch.level]
                weight = min(math.exp(sum(now[:last]) - sum(old[:last])), o.mismatch.high)
                reference = now[i]
            else:
                reference = old[i]
            coefficient = own[i]
            if o.baseline == "group_mean":
                coefficient -= others[i] if i < len(others) else 0.0
            if o.position_weight:
                total = sum(map(abs, own))
                coefficient *= 1 + o.position_weight * (1 - sum(map(abs, own[:i])) / total)
            ratio = (logpi[i] - reference).exp()
            cost = kl[i] if o.estimator == "full" else ratio * coefficient
            k3 = ratio - 1 - (logpi[i] - reference)
            costs.append((row, weight * cost + o.trust_region.beta * k3))
    n = [len(logpi) for logpi, *_ in logs]
    sequences = sum(map(bool, n))
    share = {
        "token_mean": lambda row: 1 / sum(n),
        "sequence_mean": lambda row: 1 / (sequences * n[row]),
        "sequence_sum": lambda row: 1 / sequences,
        "constant": lambda row: 1 / (sequences * o.aggregation_constant),
    }[o.aggregation]
    loss = sum(share(row) * cost for row, cost in costs)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, sum(n)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("conversations", [False, True])
@pytest.mark.parametrize("microbatch_tokens", [1, 4096])
def test_loss_and_gradient_are_those_of_sums_over_trained_tokens(
    case: str, microbatch_tokens: int, conversations: bool, models: dict[str, Path]
) -> None:
    objective = CASES[case]
    written = with_context(sampled(models, "other", "full")[0])
    written = with_conversations(written) if conversations else written
    teacher = LocalTeacher(teacher_config(models, "other", "full"), "teachers.teacher")
    counts, scores = teacher.score(written.ids, written)
    spoiled = scores.logprobs.copy()
    spoiled[np.flatnonzero(~written.trained)[::2]] = (
        np.nan
    )  # a teacher need not know what to make of what an environment says
    learner = make_learner(
        models,
        objective=objective,
        microbatch_tokens=microbatch_tokens,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_updates=0, max_grad_norm=1e9),
    )
    metrics = learner.update(written.ids, written, replace(scores, logprobs=spoiled))
    loss, gradients, tokens = enumerated(models, written, objective)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert metrics["tokens_trained"] == tokens and counts.missing == 0
    for name, parameter in learner._model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=2e-3, atol=2e-6)


def test_what_is_measured_is_measured_of_trained_tokens(models: dict[str, Path]) -> None:
    written = with_context(sampled(models, "other", "full")[0])
    scores = LocalTeacher(teacher_config(models, "other", "full"), "teachers.teacher").score(written.ids, written)[1]
    metrics = make_learner(models).update(written.ids, written, scores)
    students, _ = rows_of(models["student"], written)
    teachers, _ = rows_of(models["other"], written)
    pi, q = torch.cat(students).detach(), torch.cat(teachers).detach()
    tokens = torch.from_numpy(written.response_tokens[written.trained].astype(np.int64))[:, None]
    own, theirs = pi.gather(1, tokens)[:, 0], q.gather(1, tokens)[:, 0]
    recorded = torch.from_numpy(written.behaviour_logprobs[written.trained])
    expected = {
        "entropy": -(pi.exp() * pi).sum(-1).mean(),
        "reverse_kl": (own - theirs).mean(),
        "engine_logprob_abs_diff": (own - recorded).abs().mean(),
        "ratio_mean": (own - recorded).exp().mean(),
        "response_length_max": max(map(len, students)),
        "top1_agreement": (pi.argmax(-1) == q.argmax(-1)).float().mean(),
    }
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(float(value), rel=1e-4), key


@pytest.mark.parametrize("budget", [1, 4096])
def test_the_head_is_applied_to_the_students_tokens_alone(
    budget: int, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    head = forward.chunked_head

    def counted(hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        seen.append(len(hidden))
        return head(hidden, *arguments, **keywords)

    monkeypatch.setattr(forward, "chunked_head", counted)
    whole, scores = sampled(models, "other", "full")
    for written in (with_context(whole), whole):
        seen.clear()
        make_learner(models, microbatch_tokens=budget).update(written.ids, written, scores)
        assert sum(seen) == written.trained.sum()


def test_responses_are_measured_without_what_others_wrote() -> None:
    trained = np.array([True, True, False, True, True, True, True, False, True, True])
    one = Trajectories(
        ids=np.zeros((1, 3), np.int64),
        prompt_tokens=np.ones(1, np.int32),
        prompt_offsets=offsets_of([1]),
        response_tokens=np.array(
            [1, 2, 8, 3, 4, 1, 2, 9, 3, 4], np.int32
        ),  # 12 34 12 34: one 4-gram of five comes twice
        response_offsets=offsets_of([10]),
        behaviour_logprobs=np.zeros(10, np.float32),
        policy_versions=np.zeros(10, np.int32),
        finish_reasons=np.zeros(1, np.uint8),
        trained=trained,
    )
    found = response_metrics(one)
    assert found["repetition"] == pytest.approx(0.2) and found["response_length_max"] == 8
    assert found["turns_mean"] == 3 and found["context_share"] == pytest.approx(0.2)


def test_nothing_is_filtered_of_what_others_wrote(models: dict[str, Path]) -> None:
    """top-k and top-p: an engine that records both log-probs of its own tokens, and one that records those after the filter."""
    told, scores = sampled(models, "other", "full")
    written = with_context(told)
    kept = np.random.default_rng(1).uniform(0.2, 1, len(written.response_tokens)).astype(np.float32)
    after = replace(written, behaviour_logprobs=written.behaviour_logprobs - np.log(kept))
    correct = ObjectiveConfig(mismatch=MismatchConfig("truncate", "prefix", high=9.0), **UNCLIPPED)
    recorded = replace(after, unfiltered_logprobs=written.behaviour_logprobs)  # NaN where the engine did not write
    plain, found = (make_learner(models, objective=correct).update(one.ids, one, scores) for one in (written, recorded))
    assert found["ratio_max"] == plain["ratio_max"] and math.isfinite(found["grad_norm"])
    assert found["filter_weight_mean"] == pytest.approx(kept[written.trained].mean(), rel=1e-4)
    unrecorded = told_apart(after, SamplingConfig(top_p=0.7), greedy=False)
    metrics = make_learner(models).update(unrecorded.ids, unrecorded, scores)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5) and math.isfinite(metrics["grad_norm"])


def test_a_position_of_exposure_counts_what_the_student_wrote(models: dict[str, Path]) -> None:
    own, scores = sampled(models, "other")
    ids = own.ids.copy()
    ids[:, 1] = np.arange(len(own))  # one response to each prompt
    own = replace(own, ids=ids)
    edges, positions = parts_of(int(own.lengths.max()))
    asked = np.array([(-1, prompt, FIRST_SAMPLE + at) for prompt in range(len(own)) for at in positions], np.int64)
    at_teachers = np.zeros(len(asked), np.float32)

    def curves(written: Trajectories, logprobs: np.ndarray) -> dict:
        return by_position(
            Prefixes(own, edges, asked), at_teachers, written, replace(scores, ids=ids, logprobs=logprobs)
        )[0]

    # Two tokens of others after the first of each response.
    at = np.repeat(own.response_offsets[:-1] + 1, 2)
    spread = {
        name: np.insert(getattr(own, name), at, 7)
        for name in ("response_tokens", "behaviour_logprobs", "policy_versions")
    }
    lengths = own.lengths + 2
    with_others = replace(
        own, response_offsets=offsets_of(lengths), trained=np.insert(own.trained, at, False), **spread
    )
    found, expected = curves(with_others, np.insert(scores.logprobs, at, 3)), curves(own, scores.logprobs)
    for name in ("exposure_position", "exposure_own"):  # the bounds differ by rounding
        assert found[name] == expected[name]
