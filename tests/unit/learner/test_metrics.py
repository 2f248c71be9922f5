"""What is measured of an update, against the same computed another way: transformers, plain loops, and sets."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from actors.teacher_scores import select_scores
from actors.trajectory import Trajectories
from cluster.records.metric_table import METRIC_KEYS, METRICS, guardable
from cluster.report.figures import HISTOGRAMS
from learner.config import ObjectiveConfig
from learner.metrics import LOG_RATIO_BINS, groups_of, repetition, response_metrics
from tests.tiny_updates import make_learner, sampled, teacher_config


def distributions(model: Path, written: Trajectories) -> np.ndarray:
    """[N, V] float64 log-probs at every response token, one trajectory at a time."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = []
    for i in range(len(written)):
        prompt = written.prompt_tokens[written.prompt_offsets[i] : written.prompt_offsets[i + 1]]
        response = written.response_tokens[written.response_offsets[i] : written.response_offsets[i + 1]]
        with torch.no_grad():
            logits = network(torch.tensor([[*prompt.tolist(), *response.tolist()]])).logits[0].double()
        rows.append(torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].numpy())
    return np.concatenate(rows)


def updated(models: dict, signal: str, **changes: object) -> tuple[dict[str, float], Trajectories, np.ndarray]:
    """Metrics of one update; the trajectories; which tokens have a score (two have none)."""
    written, scores = sampled(models, "other", signal)
    scores.logprobs[[1, 7]] = np.nan
    learner = make_learner(models, teachers={"teacher": teacher_config(models, "other", signal)}, **changes)
    return learner.update(written.ids, written, scores), written, np.isfinite(scores.logprobs)


@pytest.mark.parametrize("chunk", [1024, 3])
@pytest.mark.parametrize("signal", ["sampled", "topk", "student_topk", "full", "hidden"])
def test_the_agreement_of_the_most_likely_tokens_is_that_of_the_whole_distributions(
    signal: str, chunk: int, models: dict
) -> None:
    objective = ObjectiveConfig() if signal == "sampled" else ObjectiveConfig(estimator="full")
    metrics, written, known = updated(models, signal, objective=objective, head_chunk_tokens=chunk)
    student, teacher = (distributions(models[name], written)[known] for name in ("student", "other"))
    ours, theirs = np.argsort(-student, -1)[:, :8], np.argsort(-teacher, -1)[:, :8]
    expected = {}
    if signal in ("topk", "full", "hidden"):
        expected["top1_agreement"] = np.mean(ours[:, 0] == theirs[:, 0])
        expected["top8_overlap"] = np.mean(
            [len({*a} & {*b}) / 8 for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]
        )
    if "topk" in signal:
        support = theirs if signal == "topk" else ours  # the tiny teachers send 8, and so does the student
        expected["student_support_mass"] = np.exp(np.take_along_axis(student, support, -1)).sum(-1).mean()
        expected["teacher_support_mass"] = np.exp(np.take_along_axis(teacher, support, -1)).sum(-1).mean()
    found = {name: metrics[name] for name in ("top1_agreement", "top8_overlap", "student_support_mass", "teacher_support_mass") if name in metrics}  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-5)


def test_of_a_long_chunk_some_tokens_are_compared_and_none_that_is_masked() -> None:
    from learner.metrics import agreement

    class Part:
        def __init__(self, count: int):
            self.mask = torch.arange(count) % 3 != 0
            self.hidden, self.support_ids = [], torch.zeros(count, 0, dtype=torch.int64)
            self.support_logprobs = torch.log_softmax(torch.randn(count, 20), -1)

    part = Part(1000)
    sums = agreement(part.support_logprobs[100:900], part, slice(100, 900))  # type: ignore[arg-type]
    places = [i for i in range(100, 900, 12) if i % 3]
    assert sums[0, :2].tolist() == [len(places)] * 2 and sums[0, 4] == len(places) and 64 / 2 < len(places) < 128


def test_an_update_has_the_same_metrics_in_one_pass_and_token_by_token(models: dict) -> None:
    objective = ObjectiveConfig(estimator="full")
    one, many = (
        updated(models, "full", objective=objective, microbatch_tokens=tokens, head_chunk_tokens=chunk)[0]
        for tokens, chunk in ((4096, 1024), (1, 1))
    )
    for timed in ("busy_seconds", "processor_seconds"):
        one.pop(timed), many.pop(timed)
    assert np.abs(np.subtract(one.pop("log_ratio_histogram"), many.pop("log_ratio_histogram"))).sum() <= 2
    assert many == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_what_is_measured_of_every_token_agrees_with_the_whole_distributions(models: dict) -> None:
    metrics, written, known = updated(models, "full")
    student, teacher = (distributions(models[name], written) for name in ("student", "other"))
    own = np.take_along_axis(student - teacher, written.response_tokens[:, None].astype(int), -1)[:, 0][known]
    probabilities = np.exp(student)
    assert metrics["tokens_trained"] == known.sum()
    assert metrics["reverse_kl"] == pytest.approx(own.mean(), abs=1e-5)
    assert metrics["entropy"] == pytest.approx(-(probabilities * student).sum(-1)[known].mean(), abs=1e-5)
    tails = np.quantile(own, [0.01, 0.99])
    bars = [HISTOGRAMS["log_ratio_histogram"].at(place) for place in range(LOG_RATIO_BINS)]
    nearest = np.abs(own[:, None] - bars).argmin(-1)
    assert metrics["log_ratio_histogram"] == np.bincount(nearest, minlength=LOG_RATIO_BINS).tolist()
    assert [metrics["log_ratio_p01"], metrics["log_ratio_p99"]] == pytest.approx(tails.tolist(), abs=1e-4)
    assert (metrics["ratio_mean"], metrics["ratio_max"], metrics["importance_ess"]) == pytest.approx(
        (1, 1, 1), abs=1e-4
    )
    assert metrics["response_length_max"] == written.lengths.max() and metrics["stopped_fraction"] == 1


def test_teachers_and_domains_have_their_share_of_the_tokens_and_their_own_reverse_kl(models: dict) -> None:
    written, scores = sampled(models, "other", "sampled")
    _, second = sampled(models, "student", "sampled")
    first_half, rest = written.ids[:4], written.ids[4:]
    mine, yours = (
        replace(select_scores(ids, [one]), teacher=name)
        for ids, one, name in ((first_half, scores, "a"), (rest, second, "b"))
    )
    domains = ["x", "x", None, "y", "y", "y"]
    learner = make_learner(models)
    metrics = learner.update(written.ids, written, mine, yours, domains=domains, of_each=True)
    lengths = written.lengths
    assert metrics["teacher/a/token_share"] == pytest.approx(lengths[:4].sum() / lengths.sum())
    assert metrics["teacher/b/token_share"] == pytest.approx(lengths[4:].sum() / lengths.sum())
    assert metrics["domain/x/token_share"] == pytest.approx(lengths[:2].sum() / lengths.sum())
    assert metrics["domain/y/token_share"] == pytest.approx(lengths[3:].sum() / lengths.sum())
    student, teacher = (distributions(models[name], written) for name in ("student", "other"))
    own = np.take_along_axis(student - teacher, written.response_tokens[:, None].astype(int), -1)[:, 0]
    assert metrics["teacher/a/reverse_kl"] == pytest.approx(own[: lengths[:4].sum()].mean(), abs=1e-5)
    assert metrics["teacher/b/reverse_kl"] == pytest.approx(0, abs=1e-5)
    assert metrics["domain/x/reverse_kl"] == pytest.approx(own[: lengths[:2].sum()].mean(), abs=1e-5)
    of_each = [part.mean() for part in np.split(own, np.cumsum(lengths)[:-1])]
    assert metrics["reverse_kl_of_each"] == pytest.approx([*of_each[:4], 0, 0], abs=1e-5)
    assert not any(key.startswith(("teacher/", "domain/")) for key in updated(models, "full")[0])


def test_a_teacher_that_shares_trajectories_with_another_is_measured_on_all_that_it_scored() -> None:
    ids = np.array([(0, 0, 0), (0, 1, 0), (0, 2, 0)])

    class Scores:
        def __init__(self, teacher: str, rows: list[int]):
            self.teacher, self.ids = teacher, ids[rows]

    scores = [Scores("a", [1]), Scores("b", [0, 1]), Scores("a", [2])]
    groups = groups_of(ids, scores, None)  # type: ignore[arg-type]
    assert {name: rows.tolist() for name, rows in groups.items()} == {
        "teacher/a": [False, True, True], "teacher/b": [True, True, False],
    }  # fmt: skip


def test_a_loop_repeats_itself_and_a_text_that_does_not_has_none() -> None:
    assert repetition(np.arange(20), np.array([20])) == 0
    assert repetition(np.array([5] * 13), np.array([13])) == pytest.approx(1 - 1 / 10)
    assert repetition(np.array([1, 2] * 6), np.array([12])) == pytest.approx(1 - 2 / 9)
    assert repetition(np.array([1, 1, 1]), np.array([3])) == 0  # too short for an n-gram
    assert repetition(np.array([1, 1, 1, 1] * 2), np.array([4, 4])) == 0  # the same in two responses is no repetition
    assert repetition(np.array([3] * 8 + [9]), np.array([8, 1])) == pytest.approx(1 - 1 / 5)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=5), st.integers(1, 5))
def test_repetition_is_what_sets_of_tuples_say(responses: list[list[int]], n: int) -> None:
    shares = []
    for tokens in responses:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    flat = np.array([token for tokens in responses for token in tokens], np.int32)
    found = repetition(flat, np.array([len(tokens) for tokens in responses]), n)
    assert found == pytest.approx(np.mean(shares) if shares else 0)


def test_responses_that_were_cut_or_given_up_did_not_stop_by_themselves(models: dict) -> None:
    written, _ = sampled(models, "other", "sampled")
    mixed = replace(written, finish_reasons=np.array([0, 1, 2, 0, 1, 1], np.uint8))
    assert response_metrics(mixed)["stopped_fraction"] == pytest.approx(2 / 6)


def test_what_can_be_guarded_is_what_an_update_measures(models: dict) -> None:
    metrics = updated(models, "topk", objective=ObjectiveConfig(estimator="full"))[0]
    of_the_loop = {"truncated_fraction", "response_length_mean", "staleness_mean", "staleness_max"}
    not_guarded = {"busy_seconds", "processor_seconds", "learning_rate", "log_ratio_histogram"}
    assert of_the_loop <= set(METRIC_KEYS)
    assert set(guardable("topk", [], [])) == set(metrics) - not_guarded | of_the_loop | {
        "truncated_masked",
        "context_share",
    }
    assert set(metrics) <= {*METRICS, "busy_seconds", "processor_seconds"}, (
        "a metric without a row in cluster/records/metric_table.py"
    )
