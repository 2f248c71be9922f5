"""Student and teacher with different numbers of rows: ids that one of them lacks, in every place where one can occur."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.config import TeacherConfig
from actors.teacher.local import LocalTeacher
from actors.teacher_scores import TeacherScores, select_scores
from actors.trajectory import Limits, Prompts, Trajectories, offsets_of
from learner.config import ObjectiveConfig
from learner.objective import divergences as d
from tests.tiny_models import make_tiny_model, make_tiny_tokenizer
from tests.tiny_updates import make_learner

SIGNALS = ("sampled", "topk", "student_topk", "full", "hidden")
ROWS = len(make_tiny_tokenizer())  # of the tokenizer, 102
WIDE, BEYOND = ROWS + 30, ROWS + 7


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models of one tokenizer, with and without padding rows."""
    folder = tmp_path_factory.mktemp("vocabularies")
    return {
        name: make_tiny_model(folder / name, hidden=32, layers=1, vocab_extra=extra, seed=seed)
        for seed, (name, extra) in enumerate({"wide": 30, "narrow": 0, "middle": 10}.items())
    }


def written() -> Trajectories:
    """Two responses. Token BEYOND is in a prompt, in a response, at its end, and in a support."""
    prompts, responses = [[6, BEYOND, 8], [9]], [[10, BEYOND, 11, 12], [13, 14, BEYOND]]
    count = sum(map(len, responses))
    support = np.tile(np.array([[7, 8, 9]], np.int32), (count, 1))
    support[2, 1] = BEYOND
    return Trajectories(
        ids=np.array([[0, 0, 0], [0, 1, 0]]),
        prompt_tokens=np.concatenate(prompts).astype(np.int32),
        prompt_offsets=offsets_of(map(len, prompts)),
        response_tokens=np.concatenate(responses).astype(np.int32),
        response_offsets=offsets_of(map(len, responses)),
        behaviour_logprobs=np.full(count, -2.0, np.float32),
        policy_versions=np.zeros(count, np.int32),
        finish_reasons=np.zeros(2, np.uint8),
        support_ids=support,
    )


def config(home: dict[str, Path], name: str, signal: str) -> TeacherConfig:
    return TeacherConfig(str(home[name]), dtype="float32", signal=signal, top_k=5)  # type: ignore[arg-type]


def scored(home: dict[str, Path], name: str, signal: str, student_rows: int = WIDE) -> TeacherScores:
    teacher = LocalTeacher(config(home, name, signal), f"teachers.{name}", student_rows)
    return teacher.score(written().ids, written())[1]


@pytest.mark.parametrize("signal", SIGNALS)
def test_an_id_beyond_the_teachers_rows_is_missing_and_nothing_else(home: dict[str, Path], signal: str) -> None:
    scores, beyond = scored(home, "narrow", signal), written().response_tokens == BEYOND
    assert np.array_equal(np.isnan(scores.logprobs), beyond)
    # An independent forward pass, which reads the teacher's last row in the place of what it does not know.
    network = AutoModelForCausalLM.from_pretrained(home["narrow"], dtype=torch.float32)
    with torch.no_grad():
        logits = network(torch.tensor([[6, ROWS - 1, 8, 10, ROWS - 1, 11, 12]])).logits[0].double()
    expected = torch.log_softmax(logits, -1)[[2, 4, 5], [10, 11, 12]].numpy()
    np.testing.assert_allclose(scores.logprobs[[0, 2, 3]], expected, atol=1e-5)
    if signal == "student_topk":
        assert np.argwhere(np.isnan(scores.support_logprobs)).tolist() == [[2, 1]]
    if signal == "full":
        np.testing.assert_allclose(np.exp(scores.support_logprobs).sum(-1), 1, atol=1e-5)


def test_a_teacher_answers_a_prompt_with_such_an_id_and_ignores_such_a_stop_token(home: dict[str, Path]) -> None:
    teacher = LocalTeacher(config(home, "narrow", "sampled"), "teachers.narrow", WIDE)
    prompts = Prompts(np.array([6, BEYOND, 9, BEYOND], np.int32), offsets_of([3, 1]))
    for stop in ([BEYOND], [BEYOND, 1]):
        tokens, offsets = teacher.generate(prompts, Limits(4, stop))
        assert len(offsets) == 3 and (tokens < ROWS).all()


@pytest.mark.parametrize("teacher", ["narrow", "wide"])
@pytest.mark.parametrize("signal", SIGNALS)
def test_an_update_trains_on_all_that_has_a_score(home: dict[str, Path], signal: str, teacher: str) -> None:
    student = "wide" if teacher == "narrow" else "narrow"
    text = written()
    if student == "narrow":  # which cannot write what it has no row for
        text = replace(
            text,
            prompt_tokens=np.minimum(text.prompt_tokens, ROWS - 1),
            response_tokens=np.minimum(text.response_tokens, ROWS - 1),
            support_ids=np.minimum(text.support_ids, ROWS - 1),
        )
    rows = WIDE if student == "wide" else ROWS
    one = LocalTeacher(config(home, teacher, signal), "teachers.t", rows).score(text.ids, text)[1]
    objective = ObjectiveConfig(estimator="immediate" if signal == "sampled" else "full")
    learner = make_learner(
        {"student": home[student]}, objective=objective, teachers={"t": config(home, teacher, signal)}
    )
    metrics = learner.update(text.ids, text, one)
    assert metrics["tokens_trained"] == (5 if student == "wide" else 7)
    assert np.isfinite([metrics["loss"], metrics["grad_norm"], metrics["reverse_kl"]]).all()


@pytest.mark.parametrize("signal", ["full", "hidden"])
def test_a_mixture_of_teachers_with_different_rows_is_a_distribution_over_those_that_all_have(
    home: dict[str, Path], signal: str
) -> None:
    """By hand: each teacher's softmax over the rows that all have, weighted; the student's over the same rows."""
    text = written()
    text = replace(
        text, response_tokens=np.minimum(text.response_tokens, ROWS - 1), prompt_tokens=text.prompt_tokens % 100
    )
    half = np.full(2, np.log(0.5), np.float32)
    names = ("narrow", "wide", "middle")
    student_rows = ROWS + 10
    batches = [
        LocalTeacher(config(home, name, signal), f"teachers.{name}", student_rows).score(
            text.ids, text, log_weights=half
        )[1]
        for name in names[:2]
    ]
    learner = make_learner(
        {"student": home["middle"]},
        objective=ObjectiveConfig(estimator="full"),
        teachers={name: config(home, name, signal) for name in names[:2]},
    )
    found = learner.update(text.ids, text, *batches)["reverse_kl"]

    def softmax_of(name: str) -> torch.Tensor:
        network = AutoModelForCausalLM.from_pretrained(home[name], dtype=torch.float32)
        rows = []
        for i in range(2):
            prompt = text.prompt_tokens[slice(*text.prompt_offsets[i : i + 2])].tolist()
            response = text.response_tokens[slice(*text.response_offsets[i : i + 2])].tolist()
            with torch.no_grad():
                logits = network(torch.tensor([[*prompt, *response]])).logits[0].double()
            rows.append(torch.softmax(logits[len(prompt) - 1 : -1, :ROWS], -1))
        return torch.cat(rows)

    student, q = softmax_of("middle"), 0.5 * softmax_of("narrow") + 0.5 * softmax_of("wide")
    assert found == pytest.approx((student * (student / q).log()).sum(-1).mean().item(), rel=1e-4)
    if signal == "full":
        mixed = select_scores(text.ids, batches)
        np.testing.assert_allclose(np.exp(mixed.support_logprobs), q.numpy(), atol=1e-5)


@pytest.mark.parametrize("close", [d.with_tail, d.renormalised])
@pytest.mark.parametrize(
    "name", ["reverse_kl", "forward_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "bounded"]
)
def test_a_missing_entry_makes_a_smaller_support(name: str, close: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Value and gradient are those of the support without the entry, whatever the student gives it."""

    def cost(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if name == "bounded":
            return d.expected_cost(student, d.bounded_cost(student, teacher, power=0.5))
        extra = [0.3] if name in ("jsd", "skewed_forward_kl", "skewed_reverse_kl") else []
        return getattr(d, name)(student, teacher, *extra)

    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 9, generator=draw, requires_grad=True)
    teacher = torch.randn(4, 9, generator=draw).log_softmax(-1)[:, :5]
    expected = torch.stack(
        [
            cost(
                *(
                    close(x[None, [k for k in range(5) if k != row]])
                    for x in (logits.log_softmax(-1)[row], teacher[row])
                )
            )[0]
            for row in range(4)
        ]
    )
    (wanted,) = torch.autograd.grad(expected.sum(), logits, retain_graph=True)
    teacher = teacher.masked_fill(torch.eye(4, 5, dtype=torch.bool), torch.nan)
    found = cost(*map(close, d.without_missing(logits.log_softmax(-1)[:, :5], teacher)))
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(gradient, wanted)
