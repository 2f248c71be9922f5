"""A campaign's trajectories, recorded with their scores, and trained on again."""

import dataclasses
import errno
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import load_dataset

from actors.data.trajectory_shards import shards_in
from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.records.writer import RunRecords, read_jsonl
from cluster.state import recorded
from cluster.state.mirror import Mirror
from tests import clean_process, light_campaign
from tests.light_campaign import configuration, fingerprint, finish, make_folder, run_with_kills
from tests.tiny_models import make_tiny_model

UPDATES = 4


def campaign(folder: Path, name: str, top: dict[str, Any], **changes: Any) -> Path:
    """A light campaign without evaluation, with these keys at the top level."""
    teacher = {"model": str(folder / "teacher"), "dtype": "float32", "signal": "topk", "top_k": 4}
    changes = {"teachers": {"default": teacher}, "checkpoint": {"every_updates": 1}, **changes}
    changes["pipeline"] = {"updates": UPDATES, **changes.get("pipeline", {})}
    file = configuration(folder, name, evaluation={"prompts": None}, **changes)
    file.write_text(file.read_text() + "".join(f"{key}: {json.dumps(value)}\n" for key, value in top.items()))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and prompts, and the run `first`, which has recorded what it trained on, with a mirror."""
    folder = make_folder(tmp_path_factory.mktemp("replay"))
    mirror = {"every_updates": 1, "keep_last": 1000, "mirror": str(folder / "mirror")}
    file = campaign(folder, "first", {"record": True}, checkpoint=mirror)
    finish(clean_process.start(finds_a_full_disk, file, log=file.with_suffix(".log")), file)
    return folder


def finds_a_full_disk(file: Path) -> None:
    """Runs the campaign; the first two tries to record an update find no room."""
    import learner.learner as module

    whole, left = module.write_shard, [errno.ENOSPC, errno.EDQUOT]

    def write_shard(*arguments: Any) -> Any:
        if left:
            raise OSError(left.pop(), "no room", "a shard")
        return whole(*arguments)

    module.write_shard = write_shard
    light_campaign.run_here(file)


def weights(run: Path) -> dict[str, str]:
    """File -> hash, of the learner's tensors in every checkpoint."""
    found = {name: its for name, its in fingerprint(run).items() if name.endswith(".safetensors")}
    assert len(found) == 2 * UPDATES
    return found


def names(directory: Path) -> list[str]:
    return sorted(Path(shard.path).name for of in shards_in(directory).values() for shard in of)


def test_a_record_has_every_trained_trajectory_once_and_pandas_and_datasets_read_it(folder: Path) -> None:
    run = folder / "runs" / "first"
    record = recorded.opened(str(run))
    assert record.updates == UPDATES and record.by_student
    assert [e["kind"] for e in read_jsonl(run / "events.jsonl") if "disk" in e["kind"]] == ["disk_full", "disk_back"]
    frame = pd.concat([pd.read_parquet(shard.path) for of in record.shards.values() for shard in of])
    trained = [n for row in read_jsonl(run / "ledger.jsonl") for a, b in row.get("trained", []) for n in range(a, b)]
    assert sorted(frame["number"]) == sorted(trained) and len(set(frame["number"])) == len(trained) == 8 * UPDATES
    assert (frame["update"] == frame["number"] // 8 + 1).all() and (
        frame["oldest_version"] == frame["update"] - 1
    ).all()
    for row in frame.itertuples():
        assert len(row.response_tokens) == len(row.behaviour_logprobs) == row.length
    scores = np.stack(next(np.stack(row) for row in frame["teacher.default.support_logprobs"]))
    assert scores.shape[1] == 4 and (np.diff(scores) <= 0).all()
    rows = load_dataset(
        "parquet", data_files=str(run / "record" / "*.parquet"), split="train", cache_dir=str(folder / "cache")
    )
    assert rows["response_tokens"][0] == frame.sort_values(["update", "row"])["response_tokens"].iloc[0].tolist()
    mirrored = folder / "mirror" / "first"
    assert names(mirrored / "record") == names(run / "record")
    back = folder / "brought_back" / "first"
    assert Mirror(str(folder / "mirror"), back).pull() == UPDATES and names(back / "record") == names(run / "record")
    RunRecords(back).truncate_after(2)
    assert list(shards_in(back / "record")) == [1, 2], "updates that are taken again are recorded again"


def test_a_killed_campaign_records_what_an_undisturbed_one_does(folder: Path) -> None:
    file = campaign(folder, "killed", {"record": True})
    assert run_with_kills(file, 1, random.Random(5), longest=60)
    assert names(folder / "runs" / "killed" / "record") == names(folder / "runs" / "first" / "record")
    recorded.opened(str(folder / "runs" / "killed"))


def test_the_same_campaign_replayed_gives_the_same_bits_without_rollout_or_teacher_actors(folder: Path) -> None:
    teachers = folder / "teacher"
    teachers.rename(folder / "elsewhere")  # nobody needs its files
    try:
        file = campaign(folder, "again", {"replay": str(folder / "runs" / "first")})
        assert run_with_kills(file, 1, random.Random(6), longest=60), "killed once, and then without an interruption"
    finally:
        (folder / "elsewhere").rename(teachers)
    again = folder / "runs" / "again"
    assert weights(again) == weights(folder / "runs" / "first")
    events = read_jsonl(again / "events.jsonl")
    assert {event["actor"] for event in events if event["kind"] == "actor_started"} == {"learner-0"}
    assert next(event for event in events if event["kind"] == "replays")["updates"] == UPDATES
    counts = json.loads((again / "summary.json").read_text())["ledger"]
    assert counts["trained"] == counts["issued"] == 8 * UPDATES
    generated = [
        [row["tokens_generated"] for row in read_jsonl(run / "metrics.jsonl") if row["step"]]
        for run in (again, folder / "runs" / "first")
    ]
    assert generated[0] == generated[1] and generated[0][0] > 0, "the tokens of the record"


def test_a_replay_of_several_epochs_weighs_and_measures_how_far_off_policy_it_is(folder: Path) -> None:
    correct = {"objective": {"mismatch": {"correction": "truncate", "level": "prefix"}}}
    # One checkpoint: this file's campaigns write one after each update, which takes most of their time.
    epochs: dict[str, Any] = {
        "pipeline": {"updates": 3 * UPDATES, "max_staleness": 2 * UPDATES},
        "checkpoint": {"every_updates": 100},
        "learner": correct,
    }
    file = campaign(folder, "epochs", {"replay": str(folder / "runs" / "first" / "record")}, **epochs)
    finish(light_campaign.start(file), file)
    rows = read_jsonl(folder / "runs" / "epochs" / "metrics.jsonl")
    assert [row["replay_epoch"] for row in rows] == [1] * UPDATES + [2] * UPDATES + [3] * UPDATES
    assert [row["staleness_max"] for row in rows] == [0] * UPDATES + [UPDATES] * UPDATES + [2 * UPDATES] * UPDATES
    kl, ess = (
        [np.mean([row[name] for row in rows if row["replay_epoch"] == e]) for e in (1, 2, 3)]
        for name in ("behaviour_kl", "behaviour_ess")
    )
    assert abs(kl[0]) < 1e-3 and kl[2] > kl[1] > 10 * abs(kl[0]) and ess[0] > 0.999 > ess[1] > ess[2]


def of_campaign(folder: Path, file: Path) -> tuple[CampaignConfig, Any, Any]:
    """(configuration, fingerprints, tokenizer) as a campaign has them."""
    from cluster.inputs import read_inputs
    from cluster.state.same_inputs import fingerprints

    config = load_config(file)
    inputs = read_inputs(config)
    return config, fingerprints(config, inputs.prompts, None, {}), inputs.tokenizer


def test_what_does_not_fit_is_refused_before_the_first_update(folder: Path) -> None:
    first = folder / "runs" / "first"
    copy = folder / "copy"
    config, inputs, tokenizer = of_campaign(folder, campaign(folder, "refused", {"replay": str(first)}))

    def refused(told: str, top: Any = None, **changes: Any) -> None:
        file = campaign(folder, "refused", {"replay": str(first if top is None else top)}, **changes)
        with pytest.raises(UserError, match=told):
            read = of_campaign(folder, file) if changes else (load_config(file), inputs, tokenizer)
            recorded.replayed(*read, lambda *_, **__: None)

    more = {"pipeline": {"updates": UPDATES + 1, "max_staleness": UPDATES}}
    refused(r"mismatch.correction: found none, with 5 updates from a record of 4, expected truncate or mask", **more)
    weighed = {"learner": {"objective": {"mismatch": {"correction": "truncate"}}}}
    refused(
        r"pipeline.max_staleness: found 0, .* 4 updates old, expected at least 4", pipeline={"updates": 5}, **weighed
    )
    make_tiny_model(folder / "other", hidden=32, layers=1, context=64, seed=9)
    refused(
        rf"^student\.model: found {folder}/other, whose files are not the same, expected the files of {folder}/student, as in",
        student={"model": str(folder / "other")},
    )
    teacher = {"model": str(folder / "other"), "dtype": "float32", "signal": "topk", "top_k": 4}
    told = rf"^teachers\.default\.model: found {folder}/other, whose files are not the same, expected the files of {folder}/teacher"
    refused(told, teachers={"default": teacher})
    refused(r"teachers.default.top_k: found 5, expected 4", teachers={"default": {**teacher, "top_k": 5}})
    refused(r"sampling.temperature: found 0.5, expected 1.0", sampling={"temperature": 0.5})
    for damage, told in {
        "missing": "without update 2 of 4",
        "last": "without update 4, which ledger",
        "changed": "damaged",
    }.items():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(first, copy)
        [shard] = shards_in(copy / "record")[4 if damage == "last" else 2]
        content = bytearray(Path(shard.path).read_bytes())
        content[len(content) // 2] ^= 1
        Path(shard.path).write_bytes(content) if damage == "changed" else Path(shard.path).unlink()
        refused(told, copy)
    refused("which holds no record", folder / "teacher")
    other = dataclasses.replace(recorded.Origin.of(config, inputs, tokenizer), tokenizer="another")
    with pytest.raises(
        UserError, match=r"student.model: found .*, whose vocabulary is not the same, expected the vocabulary of"
    ):
        recorded.demand_fit(config, recorded.opened(str(first)), other)


def test_a_record_begins_with_the_first_update_and_keeps_no_whole_vocabularies(folder: Path) -> None:
    from cluster.planning.record_size import record_bytes

    file = campaign(folder, "late", {"record": True})
    with pytest.raises(UserError, match="record: found true from update 3 on, and no record of update 1"):
        recorded.begin(*of_campaign(folder, file), 2)
    config = load_config(file)
    assert record_bytes(config) == 13 + 4 + 8 * 4
    config.teachers["default"].signal = "full"
    assert record_bytes(config) > 13 + 4  # a vocabulary of some dozens
    import cluster.planning.record_size as size

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(size, "MOST_SCORE_BYTES", 100)
        with pytest.raises(UserError, match=r"teachers.default.signal: found full, .* bytes a token"):
            record_bytes(config)


def test_a_damaged_record_json_is_told_in_words(tmp_path: Path) -> None:
    whole = {
        **{"tokenizer": "a", "student": "b", "teachers": {"default": {}}, "sampling": {}, "trajectories_per_update": 8},
        **{"samples_per_prompt": 1, "written_by": "student", "format": 1},
    }
    file = tmp_path / "record.json"
    for content, told in (
        ("[]", "it holds no JSON object"),
        ("{", "Expecting property name"),
        ({"tokenizer": "a"}, "it has no student"),
        ({**whole, "student": 5}, "student is 5, which is no text"),
        ({**whole, "samples_per_prompt": "1"}, 'samples_per_prompt is "1", which is no whole number'),
        ({**whole, "rewards": None}, "rewards is null, which is no true or false"),
        ({**whole, "teachers": {"default": []}}, "teachers.default is [], which is no object"),
        ({**whole, "format": None}, "format is null"),
        ({**whole, "more": 1}, "it has the key 'more', which no record has"),
    ):
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UserError) as refused:
            recorded.read_origin(tmp_path)
        assert str(refused.value).startswith(f"{file}: found a damaged file (") and told in str(refused.value)
    file.write_text(json.dumps({**whole, "format": 2, "more": 1}))
    with pytest.raises(UserError, match="found format 2, expected at most 1: a newer release wrote it"):
        recorded.read_origin(tmp_path)
    file.write_text(json.dumps(whole))
    assert recorded.read_origin(tmp_path).written_by == "student"
