"""Adapters: only they are trained, and the published and saved model is the student with the adapters merged."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.config import LoraConfig
from actors.data.models import load_model
from actors.errors import UserError
from actors.weights.buckets import unpack
from learner.config import ObjectiveConfig, TrustRegionConfig
from learner.learner import Learner
from tests.tiny_updates import make_learner, received, sampled

peft = pytest.importorskip("peft")
LORA = LoraConfig(rank=4, alpha=8.0)


def published(learner: Learner) -> dict[str, torch.Tensor]:
    *buckets, manifest = received(learner.publish())
    return {name: tensor.clone() for name, tensor in unpack(manifest, buckets)}  # type: ignore[arg-type]


def save(learner: Learner, folder: Path) -> Path:
    learner.save(str(folder))
    while not learner.saved():
        time.sleep(0.001)
    return folder


def trained(models: dict[str, Path], updates: int = 2, **changes: Any) -> Learner:
    written, scores = sampled(models, "other")
    learner = make_learner(models, **{"lora": LORA, "objective": ObjectiveConfig(estimator="full"), **changes})
    for _ in range(updates):
        learner.update(written.ids, written, scores)
    return learner


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_adapters_add_nothing(models: dict[str, Path], dtype: str, dora: bool) -> None:
    before = published(make_learner(models))
    with_adapters = published(trained(models, updates=0, lora=replace(LORA, dora=dora), compute_dtype=dtype))
    assert list(before) == list(with_adapters)
    for name, tensor in before.items():
        assert torch.equal(tensor.to(getattr(torch, dtype)).float(), with_adapters[name]), name


@pytest.mark.parametrize("changes", [{}, {"rank_stabilised": True}, {"dora": True}])
def test_what_is_published_computes_what_the_learner_computes_with_adapters(
    models: dict[str, Path], changes: dict[str, bool]
) -> None:
    learner = trained(models, lora=replace(LORA, **changes))
    plain = load_model(str(models["student"]), "float32", "cpu", False, "a")
    untrained = dict(plain.named_parameters())["model.layers.0.mlp.up_proj.weight"].detach().clone()
    plain.load_state_dict(published(learner), strict=False)
    tokens = torch.arange(6, 30)[None]
    with torch.no_grad():
        ours = learner._model(tokens).logits
        torch.testing.assert_close(plain(tokens).logits, ours, rtol=0, atol=1e-5)
    assert (dict(plain.named_parameters())["model.layers.0.mlp.up_proj.weight"] - untrained).abs().max() > 1e-4


def test_only_the_named_layers_change_and_by_the_rank_of_an_adapter(models: dict[str, Path]) -> None:
    before = published(make_learner(models))
    after = published(trained(models, lora=LoraConfig(rank=2, alpha=4.0, target_modules=["q_proj", "down_proj"])))
    changed = {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj"}
    for change in changed.values():
        values = torch.linalg.svdvals(change)
        assert values[1] > 1e-6 and values[2] < 1e-4 * values[0]


def test_a_step_lowers_the_divergence_and_is_taken_back_beyond_the_limit(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    learner = trained(models, updates=0)
    kl = [learner.update(written.ids, written, scores)["reverse_kl"] for _ in range(4)]
    assert kl[-1] < kl[0]
    limit = ObjectiveConfig(estimator="full", trust_region=TrustRegionConfig(max_kl=1e-9))
    held = trained(models, updates=0, objective=limit)
    assert held.update(written.ids, written, scores)["step_scale"] < 1


def test_with_dora_the_lengths_of_rows_are_trained_by_themselves(models: dict[str, Path]) -> None:
    learner = trained(models, lora=replace(LORA, dora=True))
    before, after = published(make_learner(models)), published(learner)
    lengths = {n: p for n, p in learner._model.named_parameters() if "lora_magnitude_vector" in n}
    assert lengths and all(p.requires_grad and p.dtype == torch.float32 for p in lengths.values())
    for name, length in lengths.items():
        weight = name.replace("lora_magnitude_vector.default.", "")
        torch.testing.assert_close(after[weight].square().sum(1).sqrt(), length.detach(), rtol=1e-5, atol=0)
        assert (length - before[weight].norm(dim=1)).abs().max() > 1e-5


@pytest.mark.parametrize("dora", [False, True])
def test_a_checkpoint_is_the_merged_model_and_the_adapter_and_goes_on_to_the_bit(
    models: dict[str, Path], tmp_path: Path, dora: bool
) -> None:
    written, scores = sampled(models, "other")
    lora = replace(LORA, dora=dora)
    learner = trained(models, lora=lora)
    folder = save(learner, tmp_path / "saved")
    merged = published(learner)
    found = load_file(folder / "model.safetensors")
    assert all(torch.equal(found[name], merged[name]) for name in found) and found.keys() == merged.keys()

    base = AutoModelForCausalLM.from_pretrained(models["student"], dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, folder / "adapter")
    tokens = torch.arange(6, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, learner._model(tokens).logits, rtol=0, atol=1e-6)
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 4

    restored = trained(models, updates=0, checkpoint=folder, lora=lora)
    for one in (learner, restored):
        one.update(written.ids, written, scores)
    ours, others = published(learner), published(restored)
    assert all(torch.equal(ours[name], others[name]) for name in ours)


def test_what_is_not_trained_is_kept_in_the_compute_dtype(models: dict[str, Path]) -> None:
    learner = trained(models, compute_dtype="bfloat16")
    dtypes = {"lora_" in name: parameter.dtype for name, parameter in learner._model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert all(
        parameter.requires_grad == (parameter.dtype == torch.float32) for parameter in learner._model.parameters()
    )


@pytest.mark.parametrize("wrong", ["nowhere", "lm_head"])
def test_a_layer_that_cannot_have_an_adapter_is_refused(wrong: str, models: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"student\.lora\.target_modules"):
        trained(models, updates=0, lora=LoraConfig(target_modules=[wrong]))


def test_an_adapter_that_is_published_alone_is_what_a_checkpoint_has(models: dict[str, Path], tmp_path: Path) -> None:
    learner = trained(models, lora=replace(LORA, publish="adapter"))
    found = published(learner)
    stored = load_file(save(learner, tmp_path) / "adapter" / "adapter_model.safetensors")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in found)
