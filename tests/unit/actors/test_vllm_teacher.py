"""What a vLLM teacher asks for and what it makes of the answers, without an engine."""

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.config import SamplingConfig, TeacherConfig
from actors.errors import UserError
from actors.processor_time import ProcessorTime
from actors.teacher.backends import FULL_BYTES, full_tokens, refuse_full, refuse_without_gpu
from actors.teacher.vllm_teacher import VllmTeacher, groups, named_requests, named_scores
from actors.trajectory import Requests, Trajectories
from cluster.config_file import load_config
from cluster.fleet.ray_cluster import role_resources
from tests.tiny_updates import random_trajectories

ROWS = 30


def written(support: int = 3) -> Trajectories:
    draw = np.random.default_rng(2)
    before, after = np.array([4, 1, 7]), np.array([3, 1, 5])
    found = random_trajectories(draw, [(0, i, 0) for i in range(3)], before, after, tokens=(3, 30))
    ids = draw.integers(0, 40, (9, support)).astype(np.int32)
    ids[:, :1] %= ROWS  # at least one of a token's support has a score
    return replace(found, support_ids=ids)


def test_each_request_names_the_token_itself_and_then_its_support() -> None:
    t = written()
    requests = list(named_requests(t, ROWS))
    assert [request["prompt_logprob_start"] for request in requests] == [3, 0, 6]
    for row, request in enumerate(requests):
        places = slice(*t.response_offsets[row : row + 2])
        ids = request["prompt_logprob_token_ids"]
        assert ids.dtype == np.int32 and ids[:, 0].tolist() == t.response_tokens[places].tolist()
        known = t.support_ids[places] < ROWS
        assert (ids[:, 1:][known] == t.support_ids[places][known]).all() and (ids[:, 1:][~known] == -1).all()
    assert (t.support_ids >= ROWS).any(), "the example has an id that the teacher has no row for"


def test_what_it_writes_is_drawn_at_its_own_temperature_with_a_seed_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    stub = types.SimpleNamespace(SamplingParams=lambda **options: asked.append(options) or options)
    monkeypatch.setitem(sys.modules, "vllm", stub)
    answers = [
        types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=own)]) for own in ([5, 2], [6, 31], [7, 8])
    ]
    teacher: Any = VllmTeacher.__new__(VllmTeacher)
    teacher.__dict__ |= {"config": TeacherConfig("m", temperature=0.5), "temperature": 0.5, "vocabulary": ROWS}
    teacher.__dict__ |= {"_busy_seconds": 0.0, "_processor": ProcessorTime()}
    teacher._llm = types.SimpleNamespace(generate=lambda texts, params, use_tqdm: answers)
    requests = Requests(
        ids=np.array([(0, i, 0) for i in range(3)]), seeds=np.array([7, 8, 9]),
        prompt_tokens=np.arange(3, dtype=np.int32), prompt_offsets=np.arange(4),
    )  # fmt: skip
    counts, text = teacher.sample(requests, 4, SamplingConfig(temperature=3.0, max_response_tokens=2, top_k=5), [2])
    assert [one["seed"] for one in asked] == [7, 8, 9]
    # The model's own logits are divided by 0.5 already.
    assert all((one["temperature"], one["top_k"], one["max_tokens"]) == (1, 5, 2) for one in asked)
    assert text.response_tokens.tolist() == [5, 2, 7, 8] and list(counts.refused) == [1]
    assert text.truncated.tolist() == [False, True] and text.ids[:, 1].tolist() == [0, 2]


def test_what_vllm_answers_for_named_tokens_becomes_scores() -> None:
    t = written()
    values = np.log(np.random.default_rng(0).uniform(0.01, 0.2, (9, 4))).astype(np.float32)
    values[:, 1:][t.support_ids >= ROWS] = -np.inf
    answers = [types.SimpleNamespace(prompt_token_id_logprobs=part) for part in np.split(values, [3, 4])]
    answers[1].prompt_token_id_logprobs = None
    teacher: Any = VllmTeacher.__new__(VllmTeacher)
    teacher.__dict__ |= {"config": TeacherConfig("m", signal="student_topk"), "key": "teachers.wise", "name": "wise"}
    teacher.__dict__ |= {"vocabulary": ROWS, "temperature": 1.0, "context": 100, "_busy_seconds": 0.0}
    teacher.__dict__ |= {"_processor": ProcessorTime()}
    teacher.score_tokens = lambda trajectories: named_scores(answers, trajectories)
    counts, scores = teacher.score(t.ids, t)
    assert counts.refused == {1: "vLLM scored nothing, expected [1, 4] named tokens"}
    answered = np.arange(9) != 3
    np.testing.assert_array_equal(scores.logprobs[answered], values[answered, 0])
    assert np.isnan(scores.logprobs[3])
    known = (t.support_ids < ROWS) & answered[:, None]
    np.testing.assert_array_equal(scores.support_logprobs[known], values[:, 1:][known])
    assert np.isnan(scores.support_logprobs[~known]).all() and (scores.support_ids[~known] == 0).all()


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([3, 3, 3], [(0, 2), (2, 3)]), ([9, 1, 9], [(0, 1), (1, 2), (2, 3)]), ([1, 1], [(0, 2)]), ([7], [(0, 1)])],
)
def test_texts_are_scored_in_groups_of_bounded_memory(lengths: list[int], expected: list[tuple[int, int]]) -> None:
    assert list(groups(lengths, 6)) == expected


@pytest.mark.parametrize("at_once", [1, 12, 10_000])
def test_a_whole_vocabulary_is_scored_piece_by_piece_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    vllm = types.ModuleType("vllm")
    vllm.SamplingParams = lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "vllm", vllm)
    t, draw = written(0), np.random.default_rng(5)
    logits = draw.normal(size=(ROWS, ROWS)).astype(np.float32)
    table = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    asked: list[int] = []

    class Kept:
        def __init__(self, values: np.ndarray):
            self.values = values

        def numpy(self) -> np.ndarray:
            return self.values

    def generate(prompts: list[dict], params: dict, use_tqdm: bool) -> list[Any]:
        assert params["prompt_logprobs"] == ROWS
        asked.append(sum(len(prompt["prompt_token_ids"]) for prompt in prompts))
        answers = []
        for prompt in prompts:
            text = np.array(prompt["prompt_token_ids"])
            rows = table[text[:-1]]
            order = np.argsort(-rows, axis=1)
            ids = np.concatenate([text[1:, None], order], axis=1)
            kept = [None, (Kept(ids), Kept(np.take_along_axis(rows, ids, axis=1)))]
            answers.append(types.SimpleNamespace(prompt_logprobs=kept))
        return answers

    teacher: Any = VllmTeacher.__new__(VllmTeacher)
    teacher.__dict__ |= {"config": TeacherConfig("m", signal="full"), "_rows": ROWS, "vocabulary": ROWS}
    teacher.__dict__ |= {"_asked": ROWS, "_at_once": at_once, "_llm": types.SimpleNamespace(generate=generate)}
    found = teacher.score_tokens(t)
    contexts = np.concatenate([
        np.concatenate([p, r])[len(p) - 1 : -1]
        for p, r in zip(
            np.split(t.prompt_tokens, t.prompt_offsets[1:-1]),
            np.split(t.response_tokens, t.response_offsets[1:-1]),
            strict=True,
        )
    ])  # fmt: skip
    np.testing.assert_allclose(found["support_logprobs"], table[contexts], atol=1e-6)
    np.testing.assert_array_equal(found["logprobs"], table[contexts, t.response_tokens])
    assert all(tokens <= at_once for tokens in asked) or at_once == 1
    assert len(asked) == {1: 3, 12: 2, 10_000: 1}[at_once]


def test_a_vocabulary_too_large_for_one_text_is_refused_with_the_arithmetic() -> None:
    assert full_tokens(151_936) == FULL_BYTES // (151_936 * 24) == 1177
    wise = TeacherConfig("m", backend="vllm", signal="full")
    with pytest.raises(UserError) as caught:
        refuse_full(wise, "teachers.wise", 151_936, 8191)
    assert str(caught.value).startswith(
        "teachers.wise.signal: found full: 8,192 tokens x 151,936 log-probs x 24 bytes = 29.9 GB, "
        "expected at most 4.3 GB in one piece, 1,177 tokens; or topk, or backend: transformers"
    )
    refuse_full(wise, "teachers.wise", 151_936, 1000)
    refuse_full(replace(wise, backend="transformers"), "teachers.wise", 151_936, 8191)
    refuse_full(replace(wise, signal="topk"), "teachers.wise", 151_936, 8191)


def test_named_tokens_need_a_gpu_and_are_refused_before_the_start_where_there_is_none(tmp_path: Path) -> None:
    path = tmp_path / "campaign.yaml"
    path.write_text(
        "name: x\nstudent: {model: m}\nprompts: {path: p}\n"
        "teachers: {wise: {model: t, backend: vllm, signal: student_topk}}\n"
    )
    config = load_config(path, [])
    with pytest.raises(UserError, match=r"^teachers\.wise\.signal: found student_topk without a GPU, expected sampled"):
        role_resources(config, 0.0, private=True)
    assert role_resources(config, 8.0, private=False)["teacher.wise"][1].gpus == 1
    refuse_without_gpu(TeacherConfig("t", signal="student_topk"), "teachers.wise", 0.0)
