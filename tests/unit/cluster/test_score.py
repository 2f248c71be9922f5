"""`understudy score`: scores for a file of responses and for a record, as replays need them."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.data.trajectory_shards import shards_in
from actors.errors import UserError
from cluster.commands.score import _there, to_score
from cluster.config_file import load_config
from cluster.records.writer import read_jsonl
from cluster.state import recorded
from tests import clean_process, light_campaign
from tests.light_campaign import configuration, finish, make_folder

TEACHER = {"dtype": "float32", "signal": "topk", "top_k": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models; responses.jsonl with eleven answers, the last of which is cut; chats.jsonl with two turns each."""
    folder = make_folder(tmp_path_factory.mktemp("score"))
    rows = [{"prompt": f"{i}+{i}=", "response": "1" * 50 if i == 10 else str(2 * i)} for i in range(11)]
    (folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    chats = [{"messages": [*turns, {"role": "user", "content": f"{i}+1="}, turns[1]]} for i in range(3)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return folder


def campaign(folder: Path, name: str, **changes: dict) -> Path:
    teachers = {"default": {"model": str(folder / "teacher"), **TEACHER}}
    sizes = {"prompts_per_update": 4, "samples_per_prompt": 1, "updates": 2}
    whole = {
        "teachers": teachers,
        "pipeline": sizes,
        "sampling": {"max_response_tokens": 30, "temperature": 0.7},
        **changes,
    }
    return configuration(folder, name, evaluation={"prompts": None}, **whole)


def command(folder: Path, *arguments: str) -> tuple[int | None, str]:
    log = folder / "command.log"
    log.unlink(missing_ok=True)
    process = clean_process.start(light_campaign.run_command_here, folder, *arguments, log=log)
    process.join()
    return process.exitcode, log.read_text()


def frame_of(directory: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(shard.path) for of in shards_in(directory).values() for shard in of])


def assert_scores_of(model: Path, temperature: float, frame: pd.DataFrame) -> None:
    """The recorded scores are those of a plain forward pass over each row by itself."""
    teacher = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for _, row in frame.iterrows():
        tokens = torch.tensor([[*row["prompt_tokens"], *row["response_tokens"]]])
        with torch.no_grad():
            logits = teacher(tokens).logits[0, len(row["prompt_tokens"]) - 1 : -1]
        whole = (logits / temperature).log_softmax(-1).numpy()
        own, response = row["trained"], np.array(row["response_tokens"])
        sampled = whole[np.arange(len(response)), response]
        np.testing.assert_allclose(row["teacher.default.logprobs"][own], sampled[own], atol=1e-4)
        support = np.stack(list(row["teacher.default.support_logprobs"]))
        np.testing.assert_allclose(support[own], np.sort(whole)[:, :-5:-1][own], atol=1e-4)


def test_each_row_of_a_file_is_scored_once_also_after_an_interrupt_and_the_scores_are_replayed(folder: Path) -> None:
    file = str(campaign(folder, "own"))
    status, told = command(folder, "score", file, "responses.jsonl", "--output", "scored")
    assert status == 0 and "scored 8 of 11" in told and "scored: 11 responses" in told
    scored = folder / "scored"
    whole = {path.name: path.stat().st_mtime_ns for path in scored.glob("*.parquet")}
    frame = frame_of(scored)
    assert frame["number"].tolist() == list(range(11)) and [len(of) for of in shards_in(scored).values()] == [1, 1, 1]
    assert all(np.isfinite(row).all() for row in frame["teacher.default.logprobs"])
    assert_scores_of(folder / "teacher", 0.7, frame)
    assert all(np.isnan(row).all() for row in frame["behaviour_logprobs"])
    second = next(path for path in scored.glob("*.parquet") if path.name.startswith("update_00000002"))
    second.unlink()
    third = next(path for path in scored.glob("*.parquet") if path.name.startswith("update_00000003"))
    third.write_bytes(third.read_bytes()[:-1])
    status, told = command(folder, "score", file, "responses.jsonl", "--output", "scored")
    assert status == 0 and "11 responses, 4 of them earlier" in told
    again = {path.name: path.stat().st_mtime_ns for path in scored.glob("*.parquet")}
    assert again.keys() == whole.keys() and {n for n in whole if whole[n] != again[n]} == {second.name, third.name}
    with pytest.raises(UserError, match="which holds scores of something else"):
        _there(scored, SimpleNamespace(origin=replace(recorded.read_origin(scored), input="another")))  # type: ignore[arg-type]

    objective = {"learner": {"objective": {"estimator": "full"}}}
    replay = campaign(folder, "copied", **objective)
    replay.write_text(replay.read_text() + f"replay: {scored}\n")
    finish(light_campaign.start(replay), replay)
    rows = read_jsonl(folder / "runs" / "copied" / "metrics.jsonl")
    assert [row["trajectories"] for row in rows] == [4, 8] and all(row["staleness_max"] == 0 for row in rows)
    config, record = load_config(replay), recorded.opened(str(scored))
    assert record.updates == 2, "the rest fills no update"
    config.learner.objective.estimator = "immediate"
    with pytest.raises(
        UserError, match="estimator: found immediate, and responses that no policy of this student wrote"
    ):
        recorded.demand_fit(config, record, record.origin)


def test_conversations_and_records_are_scored(folder: Path) -> None:
    file = str(campaign(folder, "chats", sampling={"max_response_tokens": 50}))
    fields = ("--prompt-field", "messages", "--response-field", "messages")
    status, told = command(folder, "score", file, "chats.jsonl", *fields, "--output", "chats")
    assert status == 0, told
    frame = frame_of(folder / "chats")
    assert all(row["trained"].sum() == row["length"] - row["context"] < row["length"] for _, row in frame.iterrows())

    assert_scores_of(folder / "teacher", 1.0, frame)
    # The same trajectories, and the scores of another teacher in the place of the first one's.
    other = f"teachers.default.model={folder / 'student'}"
    status, told = command(folder, "score", file, "chats", other, "--output", "again")
    assert status == 0 and "scored: 3 responses" in told
    again = frame_of(folder / "again")
    own = [name for name in frame if not name.startswith("teacher.")]
    pd.testing.assert_frame_equal(frame[own], again[own])
    assert_scores_of(folder / "student", 1.0, again)


def test_what_cannot_be_scored_is_refused(folder: Path) -> None:
    config = load_config(campaign(folder, "refused"))
    with pytest.raises(UserError, match=r"FILE: found .*nowhere.jsonl, which is not there"):
        to_score(config, folder / "nowhere.jsonl")
    config.teachers["default"].signal = "student_topk"
    with pytest.raises(UserError, match=r"teachers.default.signal: found student_topk"):
        to_score(config, folder / "responses.jsonl")
