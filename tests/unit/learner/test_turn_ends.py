"""A base student and an instruct teacher of its family: the same vocabulary, another token that ends a turn."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.config import TeacherConfig
from actors.data.tokenizer import turn_end
from actors.errors import UserError
from actors.teacher.local import LocalTeacher
from actors.teacher.turn_ends import TurnEnds, TurnEndTeacher
from actors.trajectory import Limits, Prompts, Trajectories, offsets_of
from cluster.config_file import load_config
from cluster.inputs import read_inputs
from cluster.preflight import checks
from learner.config import ObjectiveConfig
from learner.objective import divergences
from tests.light_campaign import configuration
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer
from tests.tiny_updates import make_learner

SIGNALS = ("sampled", "topk", "student_topk", "full", "hidden")
EOS, SYSTEM = 1, 2  # of the student, and, in this test, of the instruct model
ENDS = TurnEnds(student=EOS, teacher=SYSTEM)
CHATML = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<system>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_instruct(path: Path, **more: Any) -> Path:
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = "<system>", CHATML
    return make_tiny_model(path, hidden=32, layers=1, seed=4, tokenizer=tokenizer, **more)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pair")
    (folder / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+2=", "answer": "4"}\n')
    return {
        "folder": folder,
        "student": make_tiny_model(folder / "student", hidden=32, layers=1),
        "instruct": make_instruct(folder / "instruct"),
    }


def written() -> Trajectories:
    """Two responses: one ends with the student's token, the other has the teacher's in the middle."""
    responses = [[10, 11, EOS], [12, SYSTEM, 13, 14]]
    rng, count = np.random.default_rng(0), 7
    support = np.array(
        [[EOS, SYSTEM, 10, 11], *rng.permuted(np.tile(np.arange(1, 30), (6, 1)), axis=1)[:, :4]], np.int32
    )
    return Trajectories(
        ids=np.array([[0, 0, 0], [0, 1, 0]]),
        prompt_tokens=np.array([6, SYSTEM, 7], np.int32),
        prompt_offsets=offsets_of([2, 1]),
        response_tokens=np.array([t for row in responses for t in row], np.int32),
        response_offsets=offsets_of(map(len, responses)),
        behaviour_logprobs=np.full(count, -2.0, np.float32),
        policy_versions=np.zeros(count, np.int32),
        finish_reasons=np.zeros(2, np.uint8),
        support_ids=support,
    )


def distribution(path: Path) -> torch.Tensor:
    """[7, V] log q at each token of `written`, over the student's ids: by hand, one forward pass for each response."""
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rows = []
    for prompt, response in (([6, SYSTEM], [10, 11, SYSTEM]), ([7], [12, EOS, 13, 14])):
        with torch.no_grad():
            logits = network(torch.tensor([[*prompt, *response]])).logits[0].double()
        rows.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
    found = torch.cat(rows)
    found[:, [EOS, SYSTEM]] = found[:, [SYSTEM, EOS]]
    return found


def config(home: dict[str, Path], signal: str) -> TeacherConfig:
    return TeacherConfig(str(home["instruct"]), dtype="float32", signal=signal, top_k=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_end_of_one_is_scored_as_the_end_of_the_other(home: dict[str, Path], signal: str) -> None:
    text, expected = written(), distribution(home["instruct"])
    teacher = TurnEndTeacher(LocalTeacher, config(home, signal), "teachers.t", 102, ENDS)
    counts, scores = teacher.score(text.ids, text)
    assert counts.missing == 0
    tokens = torch.from_numpy(text.response_tokens.astype(np.int64))
    np.testing.assert_allclose(scores.logprobs, expected.gather(1, tokens[:, None])[:, 0], atol=1e-5)
    if signal == "topk":
        best = expected.topk(4)
        np.testing.assert_array_equal(scores.support_ids, best.indices)
        np.testing.assert_allclose(scores.support_logprobs, best.values, atol=1e-5)
    if signal == "student_topk":
        np.testing.assert_array_equal(scores.support_ids, text.support_ids)
        ids = torch.from_numpy(text.support_ids.astype(np.int64))
        np.testing.assert_allclose(scores.support_logprobs, expected.gather(1, ids), atol=1e-5)
    if signal == "full":
        np.testing.assert_allclose(scores.support_logprobs, expected, atol=1e-5)


@pytest.mark.parametrize("signal", ["full", "hidden"])
def test_the_learner_minimises_the_divergence_to_the_teacher_with_its_ends_swapped(
    home: dict[str, Path], signal: str
) -> None:
    text = written()
    scores = TurnEndTeacher(LocalTeacher, config(home, signal), "teachers.t", 102, ENDS).score(text.ids, text)[1]
    learner = make_learner(
        {"student": home["student"]},
        objective=ObjectiveConfig(estimator="full"),
        teachers={"t": config(home, signal)},
        turn_ends={"t": ENDS},
    )
    network = AutoModelForCausalLM.from_pretrained(home["student"], dtype=torch.float32)
    rows = []
    for prompt, response in (([6, SYSTEM], [10, 11, EOS]), ([7], [12, SYSTEM, 13, 14])):
        with torch.no_grad():
            rows.append(network(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double())
    expected = divergences.reverse_kl(torch.cat(rows).log_softmax(-1), distribution(home["instruct"])).mean()
    assert learner.update(text.ids, text, scores)["reverse_kl"] == pytest.approx(expected.item(), rel=1e-4)


def test_its_answers_end_with_the_students_token(home: dict[str, Path]) -> None:
    ends = TurnEnds(EOS, 51)  # a token that this model likes to write
    teacher = TurnEndTeacher(LocalTeacher, config(home, "sampled"), "teachers.t", 102, ends)
    plain = LocalTeacher(config(home, "sampled"), "teachers.t", 102)
    prompts = Prompts(np.arange(6, 26, dtype=np.int32), offsets_of([1] * 20))
    mine, offsets = teacher.generate(prompts, Limits(30, [EOS]))
    its, _ = plain.generate(prompts, Limits(30, [51]))
    np.testing.assert_array_equal(mine, ends.swapped(its))
    assert (mine[offsets[1:] - 1] == EOS).any(), "some of them end"


def test_an_end_that_only_the_teacher_has_a_row_for(home: dict[str, Path], tmp_path: Path) -> None:
    """As a fine-tune with added tokens: the student's own end gets the mass of the teacher's new token."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    path = make_tiny_model(tmp_path / "added", hidden=32, layers=1, seed=5, tokenizer=tokenizer)
    text, ends = written(), TurnEnds(EOS, 102)
    text = replace(text, response_tokens=np.where(text.response_tokens == SYSTEM, 15, text.response_tokens))
    for signal in ("full", "topk"):
        settings = TeacherConfig(str(path), dtype="float32", signal=signal, top_k=103)  # type: ignore[arg-type]
        scores = TurnEndTeacher(LocalTeacher, settings, "teachers.t", 102, ends).score(text.ids, text)[1]
        network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logits = network(torch.tensor([[6, SYSTEM, 10, 11, 102]])).logits[0, 1:-1].double()
        whole = logits.log_softmax(-1)
        assert scores.logprobs[2] == pytest.approx(whole[2, 102].item(), abs=1e-5)
        if signal == "full":
            logits[:, EOS] = logits[:, 102]
            np.testing.assert_allclose(scores.support_logprobs[:3], logits[:, :102].log_softmax(-1), atol=1e-5)
        else:
            known = ~np.isnan(scores.support_logprobs)
            assert known.sum(1).tolist() == [102] * 7 and scores.support_ids.max() == 101


def test_what_ends_a_turn_is_what_generation_stops_at(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    assert turn_end(tmp_path, tokenizer, True) == EOS
    tokenizer.chat_template = CHATML  # a base model with the template of its instruct model, which it does not stop at
    assert turn_end(tmp_path, tokenizer, True) == EOS
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, SYSTEM]}))
    assert turn_end(tmp_path, tokenizer, True) == SYSTEM and turn_end(tmp_path, tokenizer, False) == EOS


def test_check_accepts_the_pair_and_says_what_is_matched(home: dict[str, Path]) -> None:
    content = configuration(home["folder"], "pair", evaluation={"prompts": None})
    settings = load_config(content)
    settings.teachers = {"wise": replace(settings.teachers["default"], model=str(home["instruct"]), signal="full")}
    told = dict(checks(settings, offline=True))["teacher wise"]
    assert told is not None
    assert "it ends its turns with '<system>', the student with '<eos>': where one ends, the other's" in told()
    assert read_inputs(settings).turn_ends == {"wise": ENDS}
    settings.teachers["wise"].model = str(home["student"])
    assert read_inputs(settings).turn_ends == {}


def test_a_base_student_without_a_template_is_told_where_to_get_one(home: dict[str, Path], tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", hidden=32, layers=1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = None
    for file in base.glob("chat_template*"):
        file.unlink()
    tokenizer.save_pretrained(base)
    settings = load_config(configuration(home["folder"], "base", evaluation={"prompts": None}))
    settings.teachers = {"wise": replace(settings.teachers["default"], model=str(home["instruct"]))}
    settings.student.model = str(base)
    with pytest.raises(UserError, match=r"prompts\.chat: .*chat_template\.jinja, for example that of teachers\.wise"):
        read_inputs(settings)
