"""Prompts that are too long or repeated are left out and counted, and held-out prompts that are trained on are told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.errors import UserError
from actors.prompts.columns import Texts
from actors.prompts.filters import repeated
from cluster.config_file import load_config
from cluster.inputs import Inputs, read_inputs
from tests.light_campaign import configuration, make_folder

LONG = "1+" * 15 + "1="


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("filters"))
    for name, prompts in (
        ("long", ["1+1=", LONG, "2+2=", "1+1=", LONG]),
        ("heldout", ["2+2=", "9+9=", "1+1="]),
        ("repeats", ["2+2=", "2+2="]),
    ):
        lines = [json.dumps({"prompt": prompt, "answer": "2", "hint": "h" * 20}) + "\n" for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def read(folder: Path, prompts: dict[str, Any], held_out: str | None = None, **teacher: Any) -> Inputs:
    place = None if held_out is None else {"path": str(folder / held_out)}
    teachers = {"default": {"model": str(folder / "teacher"), "dtype": "float32", **teacher}}
    file = configuration(folder, "x", prompts=prompts, evaluation={"prompts": place}, teachers=teachers)
    return read_inputs(load_config(file))


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["a", "b", "c", "dd", "é"]), max_size=30), st.data())
def test_a_text_is_a_repeat_where_an_earlier_one_is_the_same(texts: list[str], data: Any) -> None:
    among = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    seen: set[str] = set()
    expected = []
    for text, looked_at in zip(texts, among, strict=True):
        expected.append(looked_at and text in seen)
        seen |= {text} if looked_at else set()
    assert repeated(Texts.of(texts), np.array(among, bool)).tolist() == expected
    with pytest.MonkeyPatch.context() as patch:  # of texts with the same digest, none is left out that differs
        patch.setattr("actors.prompts.columns.xxhash.xxh3_64_intdigest", len)
        assert not np.any(repeated(Texts.of(texts), np.array(among, bool)) & ~np.array(expected, bool))


def test_long_and_repeated_prompts_are_left_out_and_counted(folder: Path) -> None:
    path = str(folder / "long.jsonl")
    with pytest.raises(UserError, match=r"line 2: .* tokens \(2 of 5 .*at most 20, prompts\.max_prompt_tokens"):
        read(folder, {"path": path, "max_prompt_tokens": 20})
    inputs = read(folder, {"path": path, "max_prompt_tokens": 20, "too_long": "drop"})
    assert [text[6:10] for text in inputs.prompts.texts] == ["1+1=", "2+2=", "1+1="]
    assert inputs.prompts.where(1) == f"{path}, line 3" and len(inputs.prompt_routes.routes) == 3
    inputs = read(folder, {"path": path, "max_prompt_tokens": 20, "too_long": "drop", "duplicates": "drop"})
    assert len(inputs.prompts) == 2
    assert "prompts: 3 of 5 prompts dropped (2 too long, 1 duplicates)" in inputs.remarks
    assert inputs.counts() == {"prompts": {"prompts": 2, "too_long": 2, "duplicates": 1}}
    events: list[Any] = []
    inputs.tell(lambda kind, **fields: events.append((kind, fields["key"], fields["too_long"], fields["duplicates"])))
    assert events == [("prompts_dropped", "prompts", 2, 1)]


def test_a_prompt_that_a_teacher_cannot_read_is_dropped_with_its_view(folder: Path) -> None:
    view = {"prompt_template": "{prompt} {hint}{hint}"}
    with pytest.raises(UserError, match=r"line 2: found .* tokens as teachers\.default reads it"):
        read(folder, {"path": str(folder / "long.jsonl")}, **view)
    inputs = read(folder, {"path": str(folder / "long.jsonl"), "too_long": "drop"}, **view)
    its = inputs.prompt_routes.privileged["default"]
    assert len(inputs.prompts) == len(its) == 3 and all("hhhh" in text for text in its.texts)


def test_a_source_of_which_nothing_is_left_is_refused(folder: Path) -> None:
    sources = {name: {"path": str(folder / f"{name}.jsonl")} for name in ("long", "repeats")}
    section = {"path": None, "sources": sources, "duplicates": "drop"}
    with pytest.raises(UserError, match=r"^prompts\.sources\.repeats: found 2 of 2 prompts dropped \(2 duplicates\)"):
        read(folder, section)


def test_held_out_prompts_that_are_trained_on_are_told(folder: Path) -> None:
    inputs = read(folder, {"path": str(folder / "long.jsonl")}, "heldout.jsonl")
    assert inputs.shared.startswith("2 of 3 held-out prompts are among those that are trained on (")
    assert f"{folder / 'heldout.jsonl'}, line 1" in inputs.shared and f"note: {inputs.shared}" in inputs.remarks
    events: list[str] = []
    inputs.tell(lambda kind, **fields: events.append(kind))
    assert events == ["held_out_overlap"]
    assert read(folder, {"path": str(folder / "train.jsonl")}, "heldout.jsonl").shared.startswith("3 of 3")
    assert read(folder, {"path": str(folder / "repeats.jsonl")}).shared == ""


def test_odd_tokens_in_responses_and_a_schedule_without_the_first_updates_are_told(folder: Path) -> None:
    texts = ["2", "2<eos>3", "2§"]
    lines = [json.dumps({"prompt": "1+1=", "answer": text}) + "\n" for text in texts]
    (folder / "odd.jsonl").write_text("".join(lines))
    prompts = {"path": str(folder / "odd.jsonl"), "response_field": "answer", "reference_field": None}
    schedule = {"max_response_tokens": 20, "response_tokens_schedule": [[3, 8], [5, 16]]}
    file = configuration(
        folder,
        "odd",
        prompts=prompts,
        evaluation={"prompts": None},
        learner={"objective": {"estimator": "sft"}},
        pipeline={"updates": 6, "samples_per_prompt": 1},
        sampling=schedule,
    )
    place = folder / "odd.jsonl"
    assert read_inputs(load_config(file)).remarks == [
        f"note: 1 of 3 responses hold <eos> within a text, first {place}, line 2",
        f"note: 1 of 3 responses hold <unk> within a text, first {place}, line 3",
        "note: before update 3, with which sampling.response_tokens_schedule begins, responses have up to 20 tokens "
        "(max_response_tokens)",
    ]
    whole = "sampling.response_tokens_schedule=[[1, 8], [5, 16]]"
    assert len(read_inputs(load_config(file, [whole])).remarks) == 2


def test_a_schedule_of_turns_without_the_first_updates_is_told(folder: Path) -> None:
    file = configuration(folder, "turns", environment={"name": "tests.guessing:Guess", "turns_schedule": [[2, 3]]})
    told = (
        "note: before update 2, with which environment.turns_schedule begins, episodes have up to 16 turns (max_turns)"
    )
    assert told in read_inputs(load_config(file, ["pipeline.updates=2"])).remarks
