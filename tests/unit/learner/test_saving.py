"""Saving in the background: training continues, the file holds the state at the time of the call, transformers reads it."""

import os
import random
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from actors.errors import CheckpointError, NonFiniteLossError
from learner.learner import Learner
from learner.student.checkpoint import checkpoint_steps, commit, new_directory, prune, read_json, step_directory
from learner.student.tensor_files import DTYPES, copies, model_tensors, write_tensors
from tests import clean_process
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import make_learner, sampled, weights_of


def finish(learner: Learner) -> None:
    while not learner.saved():
        time.sleep(0.001)


def mixture_of_experts() -> PreTrainedModel:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(num_attention_heads=1, num_key_value_heads=1, **sizes, **experts)
    )


@pytest.mark.parametrize("kind", ["tied", "untied", "llama", "experts"])
def test_a_model_is_written_as_transformers_writes_it(kind: str, tmp_path: Path) -> None:
    if kind == "experts":  # one tensor in memory, one file entry for each expert
        model = mixture_of_experts()
    else:
        options = {"tied": {"tie": True}, "untied": {"tie": False}, "llama": {"architecture": "llama"}}[kind]
        model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "m", **options))  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "theirs")
    write_tensors(tmp_path / "ours.safetensors", copies(model_tensors(model)))
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_tensors_of_every_type_and_shape_are_read_back_to_the_bit(tmp_path: Path) -> None:
    bits = torch.randint(0, 256, (3, 5, 8), dtype=torch.uint8)
    tensors = {str(dtype): (bits > 99 if dtype == torch.bool else bits.view(dtype)) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "transposed": torch.randn(4, 6).T, "ü": bits}
    write_tensors(tmp_path / "all", copies(tensors))
    found = load_file(tmp_path / "all")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        same = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), same), name


def test_training_goes_on_while_what_was_is_written(models: dict[str, Path], tmp_path: Path) -> None:
    written, scores = sampled(models, "other")
    learner, undisturbed = make_learner(models), make_learner(models)
    for one in (learner, undisturbed):
        one.update(written.ids, written, scores)
    before = {name: tensor.clone() for name, tensor in model_tensors(learner._model).items()}
    (tmp_path / "saved").mkdir()
    pipe = tmp_path / "saved" / "model.safetensors"
    os.mkfifo(pipe)  # without a reader the writer blocks
    learner.save(str(tmp_path / "saved"))
    for one in (learner, undisturbed):
        one.update(written.ids, written, scores)
    assert not learner.saved()
    with pipe.open("rb") as file:
        pipe.unlink()  # a pipe cannot be flushed to disk
        found = load(file.read())
    finish(learner)
    assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)
    assert read_json(tmp_path / "saved" / "training" / "learner.json")["policy_version"] == 1
    moments = load_file(tmp_path / "saved" / "training" / "optimizer.safetensors")
    assert {tensor.item() for name, tensor in moments.items() if name.endswith(".step")} == {1.0}
    assert torch.equal(weights_of(learner), weights_of(undisturbed))


def save_until_the_disk_is_full(models: dict[str, Path], folder: Path) -> None:
    learner = make_learner(models)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    learner.save(str(folder / "saved"))
    with pytest.raises(CheckpointError, match=r"^File too large \("):
        finish(learner)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    learner.save(str(folder / "again"))  # the learner still works
    finish(learner)


def test_a_disk_that_is_full_is_one_clear_error(models: dict[str, Path], tmp_path: Path) -> None:
    process = clean_process.start(save_until_the_disk_is_full, models, tmp_path, log=tmp_path / "log")
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")


def write_for_ever(models: dict[str, Path], folder: Path) -> None:
    learner = make_learner(models)
    written, scores = sampled(models, "other")
    while True:
        learner.update(written.ids, written, scores)
        target = step_directory(folder, learner.policy_version)
        partial = new_directory(target)
        learner.save(str(partial))
        finish(learner)
        commit(partial, target)
        prune(folder, checkpoint_steps(folder)[-2:])


def test_killed_at_any_moment_of_a_write_the_newest_checkpoint_loads(models: dict[str, Path], tmp_path: Path) -> None:
    draw, kills, interrupted = random.Random(0), 0, 0
    expected = load_file(models["student"] / "model.safetensors").keys()
    while interrupted < 9 or not checkpoint_steps(tmp_path):  # how many kills that takes depends on the disk
        kills += 1
        for old in tmp_path.glob(".step_*"):
            shutil.rmtree(old)
        process = clean_process.start(write_for_ever, models, tmp_path, log=tmp_path / "log")
        while process.exitcode is None and not any(tmp_path.glob(".step_*")):
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        interrupted += any(tmp_path.glob(".step_*"))
        assert kills < 20 * (interrupted + 1), "hardly any write was interrupted: this shows nothing"
        for step in checkpoint_steps(tmp_path):
            directory = step_directory(tmp_path, step)
            assert read_json(directory / "training" / "learner.json")["policy_version"] == step
            moments = load_file(directory / "training" / "optimizer.safetensors")
            assert {tensor.item() for name, tensor in moments.items() if name.endswith(".step")} == {float(step)}
            assert load_file(directory / "model.safetensors").keys() == expected
        prune(tmp_path, checkpoint_steps(tmp_path)[-2:])


def test_what_an_error_says_of_the_last_checkpoint_waits_for_the_one_that_is_being_written(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, gate = make_learner(models), threading.Event()
    written, scores = sampled(models, "other")
    learner.update(written.ids, written, scores)
    monkeypatch.setattr("learner.student.state.flush", lambda _: gate.wait())
    good = learner._write.good
    monkeypatch.setattr(learner._write, "good", lambda: gate.set() or good())
    learner.save(str(tmp_path / "saved"))
    with pytest.raises(NonFiniteLossError, match="the last checkpoint is good"):
        learner._refuse("the loss is nan", written.ids)
    finish(learner)


def test_nothing_in_a_checkpoint_is_pickled(models: dict[str, Path], tmp_path: Path) -> None:
    learner = make_learner(models)
    written, scores = sampled(models, "other")
    learner.update(written.ids, written, scores)
    learner.save(str(tmp_path / "saved"))
    finish(learner)
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".jinja"}
    for path in files:
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".safetensors":
            load_file(path)


GENERATION_CONFIGS = {
    "greedy with a temperature": '{"temperature": 0.6, "top_p": 0.9}',
    "nothing that transformers knows": '{"of_our_own": [1, {"a": null}], "top_k": 5,\n "do_sample": false}',
    "several answers": '{"num_return_sequences": 3}',
    "a wrong type": '{"temperature": "hot"}',
    "beams": '{"early_stopping": true, "num_beams": 1, "cache_implementation": "nope"}',
}


@pytest.mark.parametrize("kind", GENERATION_CONFIGS)
def test_files_beside_the_weights_are_in_each_checkpoint_as_they_came(kind: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "student", hidden=32, layers=1)
    config = (model / "config.json").read_text().replace('"float32"', '"bfloat16"')
    config = config.replace("{", '{\n    "of_our_own":   {"x": [1, 2.50]},', 1)
    files = {
        "generation_config.json": GENERATION_CONFIGS[kind],
        "config.json": config,
        "chat_template.jinja": "{{ messages }}  ",
        "additional_chat_templates/tool.jinja": "{{ tools }}",
        "modeling_ours.py": "class Ours: ...",
        "added_tokens.json": '{"<more>": 101}',
        "preprocessor_config.json": "{}",
        "merges.txt": "a b\n",
        "vocabulary.tiktoken": "YQ== 0",
    }
    others = ("pytorch_model.bin", "model.safetensors.index.json.bak.pt", "training/campaign.json", ".cache/x.py")
    for name, text in {**files, **dict.fromkeys(others, "{}")}.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)
    files |= {name: (model / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    learner = make_learner({"student": model})
    shutil.rmtree(model)  # a cache may be cleaned while the campaign runs
    learner.save(str(tmp_path / "saved"))
    finish(learner)
    for name, text in files.items():
        wanted = text.replace('"bfloat16"', '"float32"') if name == "config.json" else text
        assert (tmp_path / "saved" / name).read_text() == wanted, name
    assert not any((tmp_path / "saved" / name).exists() for name in others)
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model_tensors(learner._model).items())


@pytest.mark.parametrize("when", ["copying", "writing"])
def test_a_save_that_fails_for_any_reason_leaves_the_learner_alive_and_says_all(
    when: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("GenerationConfig is invalid:\n- `temperature`: `do_sample` is not set")

    learner = make_learner(models)
    with monkeypatch.context() as patch:
        patch.setattr(f"learner.student.state.{'copies' if when == 'copying' else 'write_model_files'}", fail)
        with pytest.raises(
            CheckpointError, match=r"^ValueError: GenerationConfig is invalid: - `temperature`: `do_sample`"
        ):
            learner.save(str(tmp_path / "saved"))
            finish(learner)
    learner.save(str(tmp_path / "again"))
    finish(learner)
    assert (tmp_path / "again" / "model.safetensors").exists()
