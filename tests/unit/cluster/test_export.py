"""An exported checkpoint is a model that transformers loads, with the student's own files, or there is nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from actors.errors import UserError
from cluster.commands import export as module
from cluster.commands.export import export
from cluster.commands.older_transformers import readable_by_both
from cluster.records.reader import load_run
from cluster.records.writer import read_jsonl
from tests.light_campaign import configuration, finish, make_folder, start

LORA = {"rank": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign that trains adapters, with checkpoints of updates 2 and 4, which are evaluated."""
    folder = make_folder(tmp_path_factory.mktemp("light"))
    (folder / "student" / "README.md").write_text("the base's own card")
    config = configuration(folder, "run", pipeline={"updates": 4}, evaluation={"every_updates": 2},
                           student={"lora": LORA})  # fmt: skip
    finish(start(config), config)
    return folder


def run_dir(folder: Path) -> Path:
    return folder / "runs" / "run"


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_transformers_loads_it_in_its_dtype_with_the_students_own_files(folder: Path, tmp_path: Path) -> None:
    out, checkpoint = tmp_path / "out", run_dir(folder) / "checkpoints" / "step_00000004"
    assert export(run_dir(folder), out, dtype="bfloat16") == (4, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == torch.bfloat16 and json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_file(checkpoint / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in stored:
            assert torch.equal(tensor, stored[name].bfloat16()), name
    ours, theirs = (AutoTokenizer.from_pretrained(where) for where in (out, folder / "student"))
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == theirs.chat_template is not None
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (folder / "student" / name).read_bytes()
    assert not (out / "training").exists() and left(tmp_path) == ["out"]
    prompt = ours("3+3=", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]


def test_the_card_has_teachers_data_objective_figures_and_versions(folder: Path, tmp_path: Path) -> None:
    export(run_dir(folder), tmp_path / "out", step="2")
    card = (tmp_path / "out" / "README.md").read_text()
    row = next(row for row in read_jsonl(run_dir(folder) / "metrics.jsonl") if row["step"] == 2)
    state = json.loads((run_dir(folder) / "checkpoints/step_00000002/training/campaign.json").read_text())
    assert f"{row['eval/reverse_kl']:.4f}" in card and f"{row['eval/accuracy']:.1%}" in card
    for entry in state["inputs"].values():
        assert f"`{Path(entry['path']).name}`, fingerprint `{entry['fingerprint']}`" in card
    for text in ("teacher `default`", "estimator: immediate", "temperature: 1.0", "after update 2 of 4", "torch "):
        assert text in card
    assert str(folder) not in card and "the base's own card" not in card


def test_the_best_is_the_evaluated_one_with_the_highest_accuracy(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir(folder), copy)
    rows = read_jsonl(copy / "metrics.jsonl")
    for row in rows:
        if row["step"]:
            row.update({"eval/accuracy": {2: 0.9, 4: 0.1}.get(row["step"])} if "eval/reverse_kl" in row else {})
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert export(copy, tmp_path / "best", best=True)[0] == 2
    assert export(copy, tmp_path / "newest")[0] == 4
    assert [(row["step"], row["out"]) for row in load_run(copy).exports[-2:]] == [
        (2, str(tmp_path / "best")),
        (4, str(tmp_path / "newest")),
    ]
    weights = copy / "checkpoints" / "step_00000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"step_00000002.*expected a whole checkpoint"):
        export(copy, tmp_path / "damaged", best=True)
    assert left(tmp_path) == ["best", "newest", "run"]


def test_an_adapter_is_merged_or_alone(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    run = run_dir(folder)
    export(run, tmp_path / "merged", dtype="float32")
    export(run, tmp_path / "alone", dtype="float32", adapter_only=True)
    assert json.loads((tmp_path / "alone" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folder / "student"
    )
    base = AutoModelForCausalLM.from_pretrained(folder / "student", dtype="float32")
    adapted = PeftModel.from_pretrained(base, tmp_path / "alone").merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
    tokens = torch.arange(8)[None]
    assert torch.allclose(adapted(tokens).logits, merged(tokens).logits, atol=1e-5)
    assert (tmp_path / "alone" / "tokenizer.json").exists()
    assert not list((tmp_path / "alone").glob("model*.safetensors"))
    text = yaml.safe_load((run / "config.yaml").read_text())
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.yaml").write_text(yaml.safe_dump({**text, "student": {"model": "x"}}))
    with pytest.raises(UserError, match=r"--adapter-only"):
        export(tmp_path / "whole", tmp_path / "none", adapter_only=True)


def test_nothing_half_has_the_final_name_and_nothing_is_overwritten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("x")
    with pytest.raises(UserError, match=r"OUT: found .*taken, expected a directory that is empty"):
        export(run_dir(folder), taken)
    (tmp_path / "empty").mkdir()
    export(run_dir(folder), tmp_path / "empty")

    for error in (KeyboardInterrupt(), OSError(28, "No space left on device", "x")):

        def fail(*_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(module, "model_card", lambda *_, **__: fail())
        with pytest.raises((KeyboardInterrupt, UserError)):
            export(run_dir(folder), tmp_path / "half")
    assert left(tmp_path) == ["empty", "taken"]
    with pytest.raises(UserError, match=r"--step: found 3, expected a checkpoint"):
        export(run_dir(folder), tmp_path / "half", step="3")

    def files() -> dict[Path, int]:
        found = [path for path in run_dir(folder).rglob("*") if path.name != "exports.jsonl"]
        return {path: path.stat().st_mtime_ns for path in found}

    before = files()
    monkeypatch.undo()
    export(run_dir(folder), tmp_path / "again")
    assert files() == before, "of the run all but the record of exports is only read"


def test_keys_of_transformers_5_get_those_of_4_beside_them_and_files_without_need_stay_as_they_are() -> None:
    """What release 4 reads there was tried with 4.57: without these keys it refuses the tokenizer, and its logits differ."""
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    kinds = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}

    def after(name: str, content: dict[str, Any]) -> dict[str, Any]:
        before = json.dumps(content, indent=3).encode()
        found = readable_by_both({name: before, "tokenizer.json": b"{}"})
        assert found["tokenizer.json"] == b"{}" and (json.loads(found[name]) != content or found[name] == before)
        return json.loads(found[name])

    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert after("config.json", {"rope_parameters": rope}) == {
        "rope_parameters": rope, "rope_theta": 1e6, "rope_scaling": scaling,
    }  # fmt: skip
    assert after("config.json", {"text_config": plain})["text_config"] == {
        **plain, "rope_theta": 5e5, "rope_scaling": None,
    }  # fmt: skip
    for same in ({"rope_theta": 1e6, "rope_parameters": rope}, {"rope_parameters": kinds}, {"n_layer": 2}):
        assert after("config.json", same) == same
    assert after("tokenizer_config.json", {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"],
    }  # fmt: skip
    named = {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"image": "<i>"}}
    assert after("tokenizer_config.json", named) == named


def test_an_exported_model_that_transformers_5_wrote_is_the_same_to_it(folder: Path, tmp_path: Path) -> None:
    export(run_dir(folder), tmp_path / "out", dtype="float32")
    ours, theirs = (AutoConfig.from_pretrained(where) for where in (tmp_path / "out", folder / "student"))
    assert ours.rope_parameters == theirs.rope_parameters
    assert {"rope_theta", "rope_scaling"} <= json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    ours, theirs = (AutoTokenizer.from_pretrained(where) for where in (tmp_path / "out", folder / "student"))
    assert ours.all_special_tokens == theirs.all_special_tokens and ours("1+1=") == theirs("1+1=")
    told = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
