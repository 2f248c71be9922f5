"""Other prompts or models under the same path are refused on resume, unless they are allowed, and then told."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.data.model_fingerprint import WHOLE_BYTES, model_fingerprint
from actors.errors import UserError
from cluster.records.writer import read_jsonl
from cluster.state.same_inputs import demand_same
from tests.light_campaign import configuration, finish, make_folder, start

NOW = {
    "prompts": {"path": "a.jsonl", "fingerprint": "1"},
    "evaluation.prompts": {"path": "h.jsonl", "fingerprint": "2"},
    "student.model": {"path": "s", "fingerprint": "3"},
    "teachers.x.model": {"path": "t", "fingerprint": "4"},
    "teachers.x.tokenizer": {"path": "t", "fingerprint": "5"},
}


def changed(*keys: str, path: str | None = None) -> dict[str, dict[str, str]]:
    return {
        key: {"path": path or entry["path"], "fingerprint": "other" if key in keys else entry["fingerprint"]}
        for key, entry in NOW.items()
    }


def told(before: dict[str, dict[str, str]], *allowed: str) -> list[str]:
    events: list[str] = []
    demand_same(before, NOW, allowed, lambda kind, **fields: events.append(f"{kind} {fields['key']}"))
    return events


@pytest.mark.parametrize("key", NOW)
def test_other_contents_are_refused_and_allowed_by_their_key(key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: found .* with other contents .*--allow-change {key} to go on"):
        told(changed(key))
    assert told(changed(key), key) == [f"contents_changed {key}"]
    assert told(changed(key), key.split(".")[0]) == [f"contents_changed {key}"]
    assert told(changed()) == told({}) == [], "checkpoints of earlier releases have no fingerprints"


def test_held_out_prompts_may_be_configured_anew_and_a_model_may_move() -> None:
    assert told(changed("evaluation.prompts", path="elsewhere")) == ["contents_changed evaluation.prompts"]
    assert told(changed(path="elsewhere")) == []
    with pytest.raises(UserError, match=r"^prompts:"):
        told(changed("prompts", path="elsewhere"))
    with pytest.raises(UserError, match=r"--allow-change: found prompt, expected one of .*did you mean 'prompts'"):
        told(changed(), "prompt")


def test_a_changed_weight_header_or_small_file_is_seen_in_a_large_model_and_a_readme_is_not(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(WHOLE_BYTES, dtype=torch.float32), "b": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    seen = [model_fingerprint(tmp_path)]
    (tmp_path / "README.md").write_text("x")
    assert model_fingerprint(tmp_path) == seen[0]
    save_file({"a": tensors["a"] * 1.001, "b": tensors["b"]}, tmp_path / "model.safetensors")
    seen.append(model_fingerprint(tmp_path))
    save_file({"a": tensors["a"] * 1.001, "c": tensors["b"]}, tmp_path / "model.safetensors")
    seen.append(model_fingerprint(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    seen.append(model_fingerprint(tmp_path))
    assert len(set(seen)) == 4


def test_a_campaign_goes_on_with_the_same_contents_only(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    config = configuration(folder, "run", pipeline={"updates": 2})
    finish(start(config), config)
    configuration(folder, "run", pipeline={"updates": 4})
    prompts = folder / "train.jsonl"
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    prompts.write_text("".join(json.dumps({**row, "unread": 1}) + "\n" for row in rows))  # read the same
    finish(start(config), config)
    configuration(folder, "run", pipeline={"updates": 6})
    prompts.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    refused = start(config)
    refused.join()
    log = config.with_suffix(".log").read_text()
    assert refused.exitcode == 1 and "train.jsonl with other contents than the campaign began with" in log
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights = folder / "teacher" / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    refused = start(config)
    refused.join()
    assert refused.exitcode == 1 and "teachers.default.model: found" in config.with_suffix(".log").read_text()
    assert [row["step"] for row in read_jsonl(folder / "runs" / "run" / "metrics.jsonl")] == list(range(5))


def test_a_misspelt_key_of_the_configuration_is_known() -> None:
    for key, meant in (
        ("learner.optimizer.learningrate", "learner.optimizer.learning_rate"),
        ("teachers.second.replica", "teachers.second.replicas"),
        ("learner.optimiser", "learner.optimizer"),
    ):
        with pytest.raises(UserError, match=rf"--allow-change: found .*did you mean '{meant}'"):
            demand_same({}, {}, [key], lambda *_, **__: None)
