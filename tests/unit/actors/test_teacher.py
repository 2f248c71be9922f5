"""A teacher's scores against a plain forward pass of each sequence."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.config import SamplingConfig, TeacherConfig
from actors.errors import CampaignError, UserError
from actors.teacher.local import LocalTeacher
from actors.trajectory import FINISH_REASONS, Limits, Prompts, Requests, Trajectories, offsets_of
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import random_trajectories


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("teacher") / "m", hidden=32, layers=1)


def written(count: int = 9, first: int = 0) -> Trajectories:
    rng = np.random.default_rng(first)
    before, after = rng.integers(2, 9, count), rng.integers(1, 15, count)
    return random_trajectories(rng, [(0, first + i, 0) for i in range(count)], before, after)


def plain(path: Path, t: Trajectories, prompts: Prompts | None = None) -> torch.Tensor:
    """[N, V] log-probs at the response tokens, one sequence at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens, offsets = prompts or (t.prompt_tokens, t.prompt_offsets)
    rows = []
    for i in range(len(t)):
        prompt = tokens[offsets[i] : offsets[i + 1]]
        text = np.concatenate([prompt, t.response_tokens[slice(*t.response_offsets[i : i + 2])]]).astype(np.int64)
        with torch.no_grad():
            rows.append(torch.log_softmax(model(torch.from_numpy(text)[None]).logits[0, len(prompt) - 1 : -1], -1))
    return torch.cat(rows)


def make(path: Path, **changes: Any) -> LocalTeacher:
    return LocalTeacher(TeacherConfig(str(path), dtype="float32", **changes), "teachers.wise")


@pytest.mark.parametrize("budget", [20, 10_000])
def test_scores_are_those_of_a_plain_forward_pass(path: Path, budget: int) -> None:
    t = written()
    expected = plain(path, t)
    sampled = expected.gather(-1, torch.from_numpy(t.response_tokens.astype(np.int64))[:, None])[:, 0]
    settings = {"microbatch_tokens": budget, "head_chunk_tokens": 5}
    counts, scores = make(path, signal="full", **settings).score(t.ids, t)
    np.testing.assert_allclose(scores.logprobs, sampled, atol=1e-5)
    np.testing.assert_allclose(scores.support_logprobs, expected, atol=1e-5)
    assert counts.missing == 0 and scores.teacher == "wise"
    _, scores = make(path, signal="topk", top_k=4, **settings).score(t.ids, t)
    best = torch.topk(expected, 4)
    np.testing.assert_allclose(scores.support_logprobs, best.values, atol=1e-5)
    np.testing.assert_array_equal(scores.support_ids, best.indices)
    _, scores = make(path, **settings).score(t.ids, t)
    np.testing.assert_allclose(scores.logprobs, sampled, atol=1e-5)
    assert scores.support_logprobs.shape == (len(sampled), 0)


@pytest.mark.parametrize("signal", ["sampled", "topk", "full"])
def test_each_conversation_of_a_response_is_scored_by_itself(path: Path, signal: str) -> None:
    """Also where it is the only one of a trajectory whose other tokens are refused."""
    apart = written(6)
    firsts = apart.response_offsets[:-1]
    lead = 2 * (apart.lengths > 3)
    trained = np.arange(len(apart.response_tokens)) - np.repeat(firsts, apart.lengths) >= np.repeat(lead, apart.lengths)
    apart = replace(apart, trained=trained)
    # Trajectories of one, three and two conversations: the prompts of further ones are part of the response.
    texts = [
        (prompt, response)
        for prompt, response in zip(
            Prompts(apart.prompt_tokens, apart.prompt_offsets).rows(),
            np.split(apart.response_tokens, apart.response_offsets[1:-1]),
            strict=True,
        )
    ]
    tokens, own, begins, where = [], [], [], []
    for row, (prompt, response) in enumerate(texts):
        further = row not in (0, 1, 4)
        read = [*prompt] if further else []
        where.append(sum(map(len, tokens)) + len(read) + np.arange(len(response)))
        tokens.append([*read, *response])
        own.append(np.concatenate([np.zeros(len(read), bool), trained[firsts[row] : firsts[row] + len(response)]]))
        begins.append(np.arange(len(tokens[-1])) == (0 if further else -1))
    lengths = list(map(len, tokens))
    together = replace(
        apart,
        ids=apart.ids[[0, 1, 4]],
        prompt_tokens=np.concatenate([texts[row][0] for row in (0, 1, 4)]),
        prompt_offsets=offsets_of(len(texts[row][0]) for row in (0, 1, 4)),
        response_tokens=np.concatenate(tokens).astype(np.int32),
        response_offsets=offsets_of([lengths[0], sum(lengths[1:4]), sum(lengths[4:])]),
        behaviour_logprobs=np.zeros(sum(lengths), np.float32),
        policy_versions=np.zeros(sum(lengths), np.int32),
        finish_reasons=np.zeros(3, np.uint8),
        trained=np.concatenate(own),
        begins=np.concatenate(begins),
    )
    teacher = make(path, signal=signal)
    _, expected = teacher.score(apart.ids, apart)
    counts, found = teacher.score(together.ids, together)
    places = np.concatenate(where)[trained]
    assert counts.missing == 0 and together.trained[places].all() and together.trained.sum() == len(places)
    np.testing.assert_allclose(found.logprobs[places], expected.logprobs[trained], atol=1e-5)
    np.testing.assert_allclose(found.support_logprobs[places], expected.support_logprobs[trained], atol=1e-5)
    np.testing.assert_array_equal(found.support_ids[places], expected.support_ids[trained])
    teacher.context = int(np.diff(together.prompt_offsets)[1] + together.lengths[1] - 1)
    refused, found = teacher.score(together.ids, together)
    assert 1 in refused.refused and np.isnan(found.logprobs[slice(*together.response_offsets[1:3])]).all()


def test_scores_do_not_depend_on_how_trajectories_travelled(path: Path) -> None:
    teacher, one, two = make(path, signal="full"), written(5), written(4, first=50)
    ids = np.concatenate([two.ids, one.ids])[::-1]
    _, together = teacher.score(ids, one, two)
    _, reversed_order = teacher.score(ids, two, one)
    np.testing.assert_array_equal(together.support_logprobs, reversed_order.support_logprobs)


def test_a_privileged_teacher_reads_its_own_prompts(path: Path) -> None:
    t = written(4)
    prompts = Prompts(np.arange(6, 6 + 24, dtype=np.int32), offsets_of([6] * 4))
    _, scores = make(path, signal="full").score(t.ids, t, prompts=prompts)
    np.testing.assert_allclose(scores.support_logprobs, plain(path, t, prompts), atol=1e-5)


def test_a_teacher_is_cut_to_the_students_vocabulary(path: Path) -> None:
    t = written(3)
    teacher = LocalTeacher(TeacherConfig(str(path), dtype="float32", signal="full"), vocabulary=30)
    _, scores = teacher.score(t.ids, t)
    assert scores.support_logprobs.shape[1] == 30
    np.testing.assert_allclose(np.exp(scores.support_logprobs).sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(np.isnan(scores.logprobs), t.response_tokens >= 30)


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (float("nan"), r"^teachers\.wise\.model: found NaN in lm_head\.weight, expected weights that are finite"),
        (0.0, r"teachers\.wise fails its self-test: scores are uniform"),
    ],
)
def test_a_broken_teacher_is_refused_when_it_starts(tmp_path: Path, broken: float, fault: str) -> None:
    path = make_tiny_model(tmp_path / "m", hidden=32, layers=1, tie=False)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    torch.nn.init.constant_(model.lm_head.weight, broken)
    model.save_pretrained(path)
    with pytest.raises((UserError, CampaignError), match=fault):
        make(path)


def test_its_own_answers_are_those_of_greedy_decoding(path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = [[6, 7, 8, 9], [10, 11], [12, 13, 14]]
    stop = [2, 20]
    asked = Prompts(np.concatenate(prompts), offsets_of(map(len, prompts)))
    response, offsets = make(path).generate(asked, Limits(12, stop))
    for i, prompt in enumerate(prompts):
        text = list(prompt)
        while len(text) < len(prompt) + 12 and text[-1] not in stop:
            with torch.no_grad():
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        assert response[offsets[i] : offsets[i + 1]].tolist() == text[len(prompt) :]


def test_what_it_writes_for_the_student_to_copy_is_sampled_from_its_own_distribution(path: Path) -> None:
    prompt, count, stop = np.array([7, 8, 9], np.int32), 3000, [11, 12]
    asked = Requests(
        ids=np.array([(0, 0, i) for i in range(count)]),
        seeds=np.arange(count) + 5,
        prompt_tokens=np.tile(prompt, count),
        prompt_offsets=np.arange(count + 1) * 3,
    )
    teacher = make(path)
    sampling = SamplingConfig(max_response_tokens=2, temperature=0.5)
    counts, texts = teacher.sample(asked, 7, sampling, stop)
    first = texts.response_tokens[texts.response_offsets[:-1]]
    [logprobs] = plain(path, replace_response(texts, 0, first[:1])).unbind(0)
    expected = torch.softmax(logprobs.double() / 0.5, -1).numpy()
    found = np.bincount(first, minlength=len(expected)) / count
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / count)
    ended = np.isin(first, stop)
    assert ended.any() and np.array_equal(texts.lengths, np.where(ended, 1, 2))
    assert np.array_equal(counts.truncated, texts.finish_reasons == FINISH_REASONS.index("length"))
    assert not counts.truncated[ended].any() and set(texts.policy_versions.tolist()) == {7}
    again = teacher.sample(asked, 7, sampling, stop)[1]
    assert np.array_equal(again.response_tokens, texts.response_tokens)
    greedy = teacher.sample(asked, 7, SamplingConfig(max_response_tokens=2, temperature=1e-4), stop)[1]
    assert set(greedy.response_tokens[greedy.response_offsets[:-1]].tolist()) == {int(logprobs.argmax())}


def replace_response(t: Trajectories, row: int, tokens: np.ndarray) -> Trajectories:
    """One trajectory of them, with this response."""
    return replace(
        t,
        ids=t.ids[row : row + 1],
        prompt_tokens=t.prompt_tokens[slice(*t.prompt_offsets[row : row + 2])],
        prompt_offsets=np.array([0, t.prompt_offsets[row + 1] - t.prompt_offsets[row]]),
        response_tokens=tokens,
        response_offsets=np.array([0, len(tokens)]),
        trained=np.ones(len(tokens), bool),
    )


def test_a_score_that_is_no_number_is_missing_and_counted(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m", hidden=32, layers=1, tie=False)
    t = written()
    texts = [
        np.concatenate([t.prompt_tokens[slice(*t.prompt_offsets[i : i + 2])], response])
        for i, response in enumerate(np.split(t.response_tokens, t.response_offsets[1:-1]))
    ]
    healthy = np.repeat([39 not in text for text in texts], t.lengths)
    lost = np.concatenate([np.cumsum(text == 39)[-n - 1 : -1] > 0 for text, n in zip(texts, t.lengths, strict=True)])
    assert healthy.any() and lost.any()
    for budget in (20, 10_000):
        teacher = make(path, microbatch_tokens=budget)
        with torch.no_grad():  # as where a pass overflows; files with such a weight are refused
            teacher._model.model.embed_tokens.weight[39] = np.nan  # whoever has read it knows nothing any more
        counts, scores = teacher.score(t.ids, t)
        missing = np.isnan(scores.logprobs)
        assert missing[lost].all() and not missing[healthy].any()  # whatever else was in the same forward pass
        assert counts.missing == missing.sum()
