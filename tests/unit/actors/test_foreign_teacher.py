"""The scores of a teacher with another tokenizer, against plain forward passes over its own tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.config import StudentConfig, TeacherConfig
from actors.errors import UserError
from actors.teacher.cross_tokenizer import CrossTokenizerTeacher
from actors.teacher.local import LocalTeacher
from actors.trajectory import FINISH_REASONS, Limits, Prompts, Trajectories, offsets_of
from tests.tiny_models import make_tiny_model
from tests.tiny_tokenizers import byte_level, sentencepiece

RESPONSES = ["the answer is 15", "über 🙂 möglich", "7 + 8 = 15\n", "x"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    tokenizers = {"sentencepiece": sentencepiece(), "byte_level": byte_level(), "finer": byte_level(300)}
    return {
        name: make_tiny_model(home / name, seed=seed, tokenizer=tokenizer)
        for seed, (name, tokenizer) in enumerate(tokenizers.items())
    }


def make(models: dict[str, Path], student: str, teacher: str) -> CrossTokenizerTeacher:
    config = TeacherConfig(model=str(models[teacher]), tokenizer=str(models[teacher]), dtype="float32")
    return CrossTokenizerTeacher(Demanding, config, "teachers.wise", StudentConfig(model=str(models[student])), True)


class Demanding(LocalTeacher):
    """Fails for an empty response, as a backend may."""

    def score(self, ids: np.ndarray, *batches: Trajectories, **more: Any) -> Any:
        assert len(ids) and all((batch.lengths > 0).all() for batch in batches)
        return super().score(ids, *batches, **more)


def written(tokenizer: Any, texts: list[str] = RESPONSES, stopped: int = 2) -> Trajectories:
    """These responses in the student's tokens; the first `stopped` of them end with the eos token."""
    rows = [
        tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * (row < stopped)
        for row, text in enumerate(texts)
    ]
    tokens = np.array([token for row in rows for token in row], np.int32)
    reasons = [FINISH_REASONS.index("stop" if row < stopped else "length") for row in range(len(rows))]
    return Trajectories(
        ids=np.array([(0, row, 0) for row in range(len(rows))], np.int64),
        prompt_tokens=np.full(len(rows), 1, np.int32),  # never read: the teacher has prompts of its own
        prompt_offsets=offsets_of([1] * len(rows)),
        response_tokens=tokens,
        response_offsets=offsets_of(map(len, rows)),
        behaviour_logprobs=-np.linspace(0.1, 3, len(tokens), dtype=np.float32),
        policy_versions=np.zeros(len(tokens), np.int32),
        finish_reasons=np.array(reasons, np.uint8),
    )


def prompts(tokenizer: Any, count: int = len(RESPONSES)) -> Prompts:
    rows = [tokenizer(f"<|user|>prompt {i}")["input_ids"] for i in range(count)]
    return Prompts(np.array([t for row in rows for t in row], np.int32), offsets_of(map(len, rows)))


def plain_logprobs(path: Path, prompt: list[int], response: list[int]) -> np.ndarray:
    """log q(response token | prompt, what came before), one forward pass, float64 softmax."""
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = network(torch.tensor([[*prompt, *response]])).logits[0].double()
    rows = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
    return rows[torch.arange(len(response)), torch.tensor(response)].numpy()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("sentencepiece", "byte_level"),
        ("byte_level", "sentencepiece"),
        ("finer", "byte_level"),
        ("byte_level", "finer"),
    ],
)
def test_a_response_has_the_log_prob_of_the_teachers_own_tokens_for_it(
    models: dict[str, Path], student: str, teacher: str
) -> None:
    """Checks the complete response, and every prefix that is a sequence of tokens for both."""
    ours, theirs = (AutoTokenizer.from_pretrained(models[name]) for name in (student, teacher))
    t = written(ours)
    own_prompts = prompts(theirs)
    counts, scores = make(models, student, teacher).score(t.ids, t, prompts=own_prompts)
    assert counts.missing == 0 and scores.ids.tolist() == t.ids.tolist()
    checked = 0
    for row, text in enumerate(RESPONSES):
        response = theirs(text, add_special_tokens=False)["input_ids"] + [theirs.eos_token_id] * (row < 2)
        prompt = own_prompts[0][own_prompts[1][row] : own_prompts[1][row + 1]].tolist()
        expected = plain_logprobs(models[teacher], prompt, response).cumsum()
        place = slice(*t.response_offsets[row : row + 2])
        found = scores.logprobs[place].astype(np.float64).cumsum()
        assert found[-1] == pytest.approx(expected[-1], abs=1e-4)
        prefixes = {theirs.decode(response[: n + 1]): value for n, value in enumerate(expected)}
        for n in range(len(found)):
            prefix = ours.decode(t.response_tokens[place][: n + 1])
            if prefix and prefix in prefixes and "�" not in prefix:
                checked += 1
                assert found[n] == pytest.approx(prefixes[prefix], abs=1e-4)
    assert checked > 5


def test_with_the_same_tokenizer_scores_are_those_of_the_ordinary_path_to_the_bit(models: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["byte_level"])
    t, own_prompts = written(tokenizer), prompts(tokenizer)
    path = str(models["byte_level"])
    ordinary = LocalTeacher(TeacherConfig(model=path, dtype="float32"), "teachers.wise")
    expected = ordinary.score(t.ids[::-1], t, prompts=own_prompts, log_weights=np.full(4, -1, np.float32))[1]
    found = make(models, "byte_level", "byte_level").score(
        t.ids[::-1], t, prompts=own_prompts, log_weights=np.full(4, -1, np.float32)
    )[1]
    for name in ("ids", "response_offsets", "logprobs", "log_weights", "support_ids", "support_logprobs"):
        ours, its = (getattr(scores, name) for scores in (found, expected))
        assert ours.dtype == its.dtype and np.array_equal(ours, its), name


def test_what_the_teacher_cannot_read_has_no_score_and_is_counted(models: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["finer"])
    smile = tokenizer("a🙂", add_special_tokens=False)["input_ids"]
    t = written(tokenizer, ["a", "a", "b"], stopped=0)
    broken = Trajectories(**{name: getattr(t, name) for name in t.__slots__} | {
        "response_tokens": np.array([*smile[:-1], *smile[1:2], 3], np.int32),
        "response_offsets": offsets_of([len(smile) - 1, 1, 1]),
        "behaviour_logprobs": -np.ones(len(smile) + 1, np.float32),
        "policy_versions": np.zeros(len(smile) + 1, np.int32),
        "trained": np.ones(len(smile) + 1, bool),
    })  # fmt: skip
    theirs = AutoTokenizer.from_pretrained(models["sentencepiece"])
    counts, scores = make(models, "finer", "sentencepiece").score(broken.ids, broken, prompts=prompts(theirs, 3))
    # `a`, then parts of a character; parts of a character alone; a special token that the teacher lacks.
    assert np.isfinite(scores.logprobs).tolist() == [True] + [False] * len(smile) and counts.missing == len(smile)
    only = broken.ids[1:]
    counts, scores = make(models, "finer", "sentencepiece").score(only, broken, prompts=prompts(theirs, 2))
    assert counts.missing == 2, "of responses of which nothing can be read, the model is not asked"


def test_tokens_that_are_context_are_read_and_their_missing_scores_are_not_counted(models: dict[str, Path]) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(models[name]) for name in ("byte_level", "finer"))
    teacher, t = make(models, "byte_level", "finer"), written(ours, ["the answer " * 60, "is 15"], stopped=1)
    mixed = replace(t, trained=np.arange(len(t.response_tokens)) % 3 > 0)
    counts, scores = teacher.score(mixed.ids, mixed, prompts=prompts(theirs, 2))
    expected = teacher.score(t.ids, t, prompts=prompts(theirs, 2))[1].logprobs
    np.testing.assert_array_equal(scores.logprobs, expected)
    assert counts.missing == np.isnan(expected[mixed.trained]).sum() > 0


def test_what_lies_beyond_the_teachers_context_has_no_score(models: dict[str, Path]) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(models[name]) for name in ("byte_level", "finer"))
    t = written(ours, ["the answer " * 60], stopped=1)  # more tokens to the teacher than its context of 256
    counts, scores = make(models, "byte_level", "finer").score(t.ids, t, prompts=prompts(theirs, 1))
    finite = np.isfinite(scores.logprobs)
    assert 0 < counts.missing < len(finite) and finite.tolist() == sorted(finite.tolist(), reverse=True)


def test_its_own_answers_come_in_the_students_tokens(models: dict[str, Path]) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(models[name]) for name in ("byte_level", "finer"))
    teacher = make(models, "byte_level", "finer")
    stop = ours.eos_token_id
    tokens, offsets = teacher.generate(prompts(theirs), Limits(12, [stop, 3]))
    plain = LocalTeacher(TeacherConfig(model=str(models["finer"]), dtype="float32"), "teachers.wise")
    own, own_offsets = plain.generate(prompts(theirs), Limits(12, [theirs.eos_token_id]))
    for row in range(len(RESPONSES)):
        found = tokens[offsets[row] : offsets[row + 1]]
        expected = own[own_offsets[row] : own_offsets[row + 1]]
        assert ours.decode(found, skip_special_tokens=True) == theirs.decode(expected, skip_special_tokens=True)
        assert (found[-1] == stop) == (expected[-1] == theirs.eos_token_id)
    assert teacher.status()["probe_logprob"] == plain.status()["probe_logprob"]


def test_a_tokenizer_that_is_not_there_is_one_error(models: dict[str, Path], tmp_path: Path) -> None:
    config = TeacherConfig(model=str(models["finer"]), tokenizer=str(tmp_path), dtype="float32")
    with pytest.raises(UserError, match=r"^teachers\.wise\.tokenizer: found .*without config\.json"):
        CrossTokenizerTeacher(
            LocalTeacher, config, "teachers.wise", StudentConfig(model=str(models["byte_level"])), True
        )
