"""vLLM teachers, in this process and behind a real server, against the same model in transformers."""

import os
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.config import TeacherConfig
from actors.errors import UserError
from actors.teacher.base import probe, texts_of
from actors.teacher.http import HttpTeacher
from actors.teacher.local import LocalTeacher
from actors.teacher.vllm_teacher import OF_A_TEXT, VllmTeacher, named_requests, named_scores
from actors.trajectory import Limits, Prompts, Trajectories, offsets_of
from tests.tiny_updates import random_trajectories
from tests.vllm_server import serving

pytestmark = pytest.mark.integration
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # read when torch is first used; actors have it from the start
MODEL = str(Path(__file__).resolve().parents[2] / "examples" / "addition" / "teacher")
TOP_K = 5
VOCABULARY = 74


def written(count: int = 12) -> Trajectories:
    draw = np.random.default_rng(3)
    before, after = draw.integers(1, 9, count), draw.integers(1, 20, count)
    found = random_trajectories(draw, [(0, i, 0) for i in range(count)], before, after, tokens=(3, 30))
    return replace(found, support_ids=np.empty((int(after.sum()), 0), np.int32))


def config(signal: str, **changes: Any) -> TeacherConfig:
    return TeacherConfig(MODEL, dtype="float32", signal=signal, top_k=TOP_K, **changes)  # type: ignore[arg-type]


def compare(teacher: Any, signal: str, temperature: float = 1.0) -> None:
    """Compares every field of its scores, and its greedy responses, with those of LocalTeacher."""
    t = written()
    ours = LocalTeacher(config(signal, temperature=temperature), "teachers.wise", VOCABULARY)
    expected, found = ours.score(t.ids, t)[1], teacher.score(t.ids, t)[1]
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    np.testing.assert_array_equal(found.support_ids, expected.support_ids)
    np.testing.assert_allclose(found.support_logprobs, expected.support_logprobs, atol=2e-4)
    np.testing.assert_array_equal(found.response_offsets, expected.response_offsets)
    asked = (Prompts(t.prompt_tokens, t.prompt_offsets), Limits(12, [2]))
    for one, other in zip(teacher.generate(*asked), ours.generate(*asked), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("signal", "temperature"), [("sampled", 1), ("topk", 1), ("full", 1), ("topk", 0.6)])
def test_a_vllm_teacher_says_what_the_model_in_transformers_says(signal: str, temperature: float) -> None:
    wanted = config(signal, backend="vllm", temperature=temperature)
    compare(VllmTeacher(wanted, "teachers.wise", VOCABULARY), signal, temperature)


def test_a_token_beyond_its_rows_and_a_trajectory_beyond_its_context(tmp_path: Path) -> None:
    short = VllmTeacher(
        config("sampled", backend="vllm", engine={"max_model_len": 64}), "teachers.wise", VOCABULARY + 9
    )
    t = written()
    t.response_tokens[4] = VOCABULARY + 3
    scores = short.score(t.ids, t)[1].logprobs
    assert np.isnan(scores[4]) and np.isfinite(np.delete(scores, 4)).all()
    long = probe(VOCABULARY)
    long = Trajectories(**{name: getattr(long, name) for name in Trajectories.__slots__} | {
        "prompt_tokens": np.full(60, 5, np.int32), "prompt_offsets": offsets_of([60])})  # fmt: skip
    counts, scores = short.score(long.ids, long)
    assert counts.refused == {0: "91 tokens, and teachers.wise reads 63"} and np.isnan(scores.logprobs).all()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(MODEL, "wise", "--api-key", "secret-of-the-test") as url:
        yield url


@pytest.mark.parametrize("signal", ["sampled", "topk"])
@pytest.mark.parametrize("echo", [False, True])
def test_a_served_teacher_says_what_the_model_in_transformers_says(
    server: str, signal: str, echo: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WISE_KEY", "secret-of-the-test")
    wanted = config(signal, backend="http", urls=[server], api_key_variable="WISE_KEY")
    wanted.model = "wise"
    teacher = HttpTeacher(wanted, "teachers.wise", VOCABULARY)
    assert not teacher._echo  # vLLM's own dialect is tried first
    teacher._echo = echo
    compare(teacher, signal)


def test_a_server_that_refuses_our_key_is_told(server: str) -> None:
    wanted = config("sampled", backend="http", urls=[server])
    with pytest.raises(UserError, match=r"teachers.wise.urls: found .*status 401"):
        HttpTeacher(wanted, "teachers.wise", VOCABULARY)


def test_tokens_that_the_student_names_are_scored_by_vllms_own_worker_and_refused_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's checks of the request, its worker's rows and its types, with torch in place of its two GPU kernels."""
    import torch
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.sample import prompt_logprob

    with pytest.raises(UserError, match=r"^teachers.wise.signal: found student_topk, expected sampled, topk or full"):
        VllmTeacher(config("student_topk", backend="vllm"), "teachers.wise", VOCABULARY)
    t = written()
    t = replace(t, support_ids=np.random.default_rng(0).integers(0, 90, (len(t.response_tokens), TOP_K), np.int32))
    ours = LocalTeacher(config("student_topk"), "teachers.wise", VOCABULARY)
    expected = ours.score(t.ids, t)[1]
    monkeypatch.setattr(prompt_logprob, "async_tensor_h2d", lambda ids, device, kind: torch.from_numpy(ids).to(kind))
    monkeypatch.setattr(
        prompt_logprob, "compute_token_logprobs", lambda logits, ids: logits.log_softmax(-1).gather(-1, ids)
    )
    worker: Any = prompt_logprob.PromptLogprobsWorker(1, torch.device("cpu"))
    model: Any = types.SimpleNamespace(
        max_model_len=256, get_vocab_size=lambda: VOCABULARY, max_logprobs=-1, logprobs_mode="raw_logprobs"
    )
    answers = []
    for text, asked in zip(texts_of(t), named_requests(t, VOCABULARY), strict=True):
        params = SamplingParams(**OF_A_TEXT, **asked)
        params._validate_logprobs(model)
        assert len(params.prompt_logprob_token_ids) == len(text) - 1 - params.prompt_logprob_start  # input_processor.py
        worker.add_request("one", 0, params)
        body = ours._model.model
        with torch.no_grad():
            states = body(torch.tensor([text]), use_cache=False).last_hidden_state[0]
        done: dict[str, torch.Tensor] = {}
        cut = len(text) // 2  # a prompt that is computed in two steps
        for first, last in ((0, cut), (cut, len(text))):
            batch = types.SimpleNamespace(
                req_ids=["one"],
                idx_mapping_np=np.zeros(1, np.int64),
                num_computed_prefill_tokens_np=np.array([first]),
                num_scheduled_tokens=np.array([last - first]),
                prefill_len_np=np.array([len(text)]),
                query_start_loc_np=np.array([0]),
            )
            done |= worker.compute_prompt_token_id_logprobs(
                lambda rows: torch.nn.functional.linear(rows, ours._weight).detach(),
                states[first:last],
                batch,
                np.array([len(text)]),
            )
        answers.append(RequestOutput("one", None, text, None, [], True, prompt_token_id_logprobs=done["one"].numpy()))
    teacher: Any = VllmTeacher.__new__(VllmTeacher)
    teacher.__dict__ |= ours.__dict__
    teacher.score_tokens = lambda trajectories: named_scores(answers, trajectories)
    found = teacher.score(t.ids, t)[1]
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
    np.testing.assert_array_equal(found.support_ids, expected.support_ids)
    np.testing.assert_allclose(found.support_logprobs, expected.support_logprobs, atol=1e-4)
