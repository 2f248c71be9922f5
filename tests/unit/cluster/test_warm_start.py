"""Training on responses of a data set, on the first tokens of an answer, and on text of any teacher: campaigns in one process."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config_file import load_config
from cluster.records.writer import read_jsonl
from tests.light_campaign import assert_ledger_adds_up, configuration, fingerprint, finish, make_folder, start
from tests.unit.cluster.test_config import GOOD, refusal

GAME = ("environment.name=tests.guessing:Guess",)
DATA = "learner.objective.estimator=sft", "prompts.response_field=answer", "teachers={}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def without_evaluation(file: Path, **sections: Any) -> Path:
    content = yaml.safe_load(file.read_text()) | {"evaluation": {}} | sections
    file.write_text(yaml.safe_dump(content))
    return file


def chats(folder: Path, name: str, updates: int = 6) -> Path:
    """Conversations of two turns, of which eleven are read and one is too long."""
    talk = [
        [
            {"role": "user", "content": f"{i}+{i}="},
            {"role": "assistant", "content": str(2 * i)},
            {"role": "user", "content": "ok?"},
            {"role": "assistant", "content": "yes" * (30 if i == 5 else 1)},
        ]
        for i in range(12)
    ]
    lines = [json.dumps({"messages": messages}) + "\n" for messages in talk]
    (folder / "chats.jsonl").write_text("".join(lines[:6]))
    (folder / "more.jsonl").write_text("".join(lines[6:]))
    source = {"prompt_field": "messages", "response_field": "messages", "reference_field": None}
    sources = {one: {"path": str(folder / f"{one}.jsonl"), **source} for one in ("chats", "more")}
    file = configuration(
        folder,
        name,
        prompts={"path": None, "sources": sources, "too_long": "drop"},
        learner={"objective": {"estimator": "sft"}, "optimizer": {"learning_rate": 1e-2, "warmup_updates": 0}},
        pipeline={"updates": updates, "prompts_per_update": 4, "samples_per_prompt": 1},
        sampling={"max_response_tokens": 60},
    )
    return without_evaluation(file, teachers={})


def test_conversations_are_trained_on_by_a_learner_alone_and_exactly_on_resume(folder: Path) -> None:
    whole, killed = chats(folder, "whole"), chats(folder, "killed")
    finish(start(whole), whole)
    first = start(killed, 40)
    first.join()
    assert first.exitcode == -9
    finish(start(killed), killed)
    run = folder / "runs" / "whole"
    assert fingerprint(run) == fingerprint(folder / "runs" / "killed")
    started = [event["actor"] for event in read_jsonl(run / "events.jsonl") if event["kind"] == "actor_started"]
    assert started == ["learner-0"]
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    for row in rows:  # what the assistant has written: a sum of one or two digits, `yes`, and two ends
        assert 4 * 6 <= row["tokens_trained"] <= 4 * 7 and row["tokens_trained"] == 4 * row["response_length_mean"]
        assert row["publish_bytes"] == 0 and row["busy_rollout"] == row["busy_teacher"] == 0
        assert row["reverse_kl"] is None and row["truncated_fraction"] == 0
    ledger = [number for row in read_jsonl(run / "ledger.jsonl") for a, b in row["trained"] for number in range(a, b)]
    assert ledger == list(range(24)), "each number once, over two epochs of eleven prompts and more"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["prompts"]["prompts"] == {"prompts": 11, "too_long": 1, "duplicates": 0}
    kept = [row for path in (run / "trajectories").iterdir() for row in read_jsonl(path)]
    assert {row["response"][-3:] for row in kept} == {"yes"}


def test_a_schedule_cuts_training_alone_and_a_masked_update_takes_no_step(folder: Path) -> None:
    file = configuration(
        folder,
        "horizon",
        sampling={"max_response_tokens": 6, "response_tokens_schedule": [[1, 1], [3, 2], [5, 6]]},
        learner={"objective": {"estimator": "to_go", "truncated": "mask"}},
        pipeline={"updates": 6, "max_staleness": 1},
        evaluation={
            "max_response_tokens": 9,
            "every_updates": 6,
            "sets": {
                "near": {"prompts": {"path": str(folder / "heldout.jsonl"), "limit": 3}, "max_response_tokens": 12}
            },
        },
    )
    first = start(file, 60)
    first.join()
    assert first.exitcode == -9
    finish(start(file), file)
    run = folder / "runs" / "horizon"
    assert_ledger_adds_up(run, updates=6, size=8, max_staleness=1)
    start_row, *rows = read_jsonl(run / "metrics.jsonl")
    assert [row["response_length_max"] for row in rows] == [1, 1, 2, 2, 6, 6]
    assert 6 < start_row["eval/response_length_mean"] <= 9 < start_row["eval/near/response_length_mean"] <= 12
    for row in rows:
        assert row["truncated_masked"] == round(8 * row["truncated_fraction"])
        # Responses that were cut have the length of the limit; all others are trained on, and no token of those.
        whole = round(8 * row["response_length_mean"]) - row["truncated_masked"] * row["response_length_max"]
        assert row["tokens_trained"] == whole
    cut = [row for row in rows if row["truncated_masked"] == 8]
    assert cut, "the example has an update of cut responses alone"
    assert all(row["tokens_trained"] == 0 and row["steps_taken"] == 0 and row["steps_skipped"] == 1 for row in cut)


def test_a_teacher_that_writes_alone_needs_no_engine(folder: Path) -> None:
    objective = {"objective": {"estimator": "sft"}}
    file = configuration(folder, "alone", learner=objective, pipeline={"updates": 2, "max_staleness": 1})
    without_evaluation(file)
    finish(start(file), file)
    events = read_jsonl(folder / "runs" / "alone" / "events.jsonl")
    assert {event["actor"] for event in events if event["kind"] == "actor_started"} == {
        "learner-0",
        "teacher.default-0",
    }
    rows = read_jsonl(folder / "runs" / "alone" / "metrics.jsonl")
    assert sum(row["busy_teacher"] for row in rows) > 0 == sum(row["busy_rollout"] for row in rows)
    assert all(row["tokens_trained"] > 0 for row in rows)


def test_what_training_on_responses_needs_is_started_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(GOOD)

    def started(*overrides: str) -> tuple[bool, list[str]]:
        config = load_config(
            tmp_path / "c.yaml",
            [
                "learner.objective.estimator=sft",
                "prompts.response_field=a",
                "pipeline.samples_per_prompt=1",
                *overrides,
            ],
        )
        return config.needs_rollout, list(config.started_teachers)

    held_out = "evaluation.sets.far.prompts.path=h.jsonl"
    judged = [held_out, "evaluation.sets.far.temperature=0", "evaluation.sets.far.verifier.name=exact"]
    assert started() == (False, [])
    assert started(held_out) == (True, ["default"])
    assert started(*judged) == (True, ["default"])  # which answers, too
    assert started(*judged, "evaluation.teacher=false") == (True, [])
    assert started("prompts.response_field=null") == (False, ["default"])


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            (*DATA, "learner.objective.estimator=immediate", "teachers.default.model=t"),
            "prompts.response_field: found answer",
        ),
        ((*DATA, "pipeline.samples_per_prompt=1", "record=true"), "record: found true, expected nothing where"),
        ((*DATA, "pipeline.samples_per_prompt=2"), "pipeline.samples_per_prompt: found 2, expected 1"),
        ((*DATA, "prompts.response_field=null"), "or responses to train on (prompts.response_field)"),
        ((*DATA, "prompts.response_field=prompt", "prompts.chat=false"), "prompts.response_field: found prompt"),
        ((*DATA, "prompts.chat_template_arguments.continue_final_message=true"), "continue_final_message: found true"),
        ((*DATA, "learner.objective.trust_region.beta=0.1"), "trust_region.beta: found 0.1"),
        (("sampling.response_tokens_schedule=[[1, 2000]]",), "schedule[0]: found 2000 tokens, expected 1 to 1024"),
        (
            ("sampling.response_tokens_schedule=[[5, 20], [5, 30]]",),
            "schedule[1]: found update 5, expected an update above 5",
        ),
        (("sampling.response_tokens_schedule=[[101, 20]]",), "found update 101, expected at most 100"),
        (
            (*GAME, "environment.turns_schedule=[[1, 17]]"),
            "environment.turns_schedule[0]: found 17 turns, expected 1 to 16 (environment.max_turns)",
        ),
        (
            (*GAME, "environment.turns_schedule=[[2]]"),
            "found [2], expected two numbers: the update that it begins with",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, overrides: tuple[str, ...], told: str) -> None:
    text = (
        GOOD.replace("teachers:\n  default: {model: teacher, signal: full}\n", "")
        if "teachers={}" in overrides
        else GOOD
    )
    found = refusal(tmp_path, text, *(one for one in overrides if one != "teachers={}"))
    assert told in found, found


def test_the_limit_of_an_update_is_the_last_that_has_begun(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(GOOD)
    asked = ["sampling.max_response_tokens=100", "sampling.response_tokens_schedule=[[3, 10], [20, 40]]"]
    sampling = load_config(tmp_path / "c.yaml", asked).sampling
    assert [sampling.response_tokens_at(update) for update in (1, 2, 3, 19, 20, 99)] == [100, 100, 10, 10, 40, 40]
    config = load_config(tmp_path / "c.yaml", [*GAME, "environment.turns_schedule=[[3, 2]]"])
    assert [config.limits_at(update) for update in (None, 2, 3)] == [(1024, None), (1024, 16), (1024, 2)]
