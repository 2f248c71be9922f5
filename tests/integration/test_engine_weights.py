"""What is inside a real vLLM engine after a weight version was loaded: the published bytes, and nothing of the old ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.config import RolloutConfig, SamplingConfig
from actors.errors import AbortedError, WeightError
from actors.rollout.vllm_engine import VllmEngine
from actors.weights.buckets import WeightVersion
from learner.config import ObjectiveConfig
from tests import clean_process
from tests.tiny_engine import OPTIONS, SAMPLING, Brake, ask, change, deliver, difference, publish
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import make_learner, received, sampled
from tests.waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmEngine, Any]]:
    path = make_tiny_model(tmp_path_factory.mktemp("model") / "m", tie=request.param)
    engine = VllmEngine(str(path), RolloutConfig(dtype="float32", engine=OPTIONS), SAMPLING, stop_token_ids=[2])
    yield engine, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    engine.close()


def read_back(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every weight of the engine's model. A linear layer that the CPU backend has packed is asked for its weights: the
    identity times W^T is W^T to the bit, since each sum has one term that is not zero."""
    found = {}
    for name, layer in module.named_modules():
        if hasattr(layer, "quant_method") and hasattr(layer, "cpu_linear"):
            width = getattr(layer, "input_size_per_partition", None) or layer.embedding_dim
            found[f"{name}.packed"] = layer.quant_method.apply(layer, torch.eye(width)).T.contiguous()
        for own, parameter in layer.named_parameters(recurse=False):
            if parameter.numel():
                found[f"{name}.{own}"] = parameter.detach().clone()
    return found


def test_the_engine_holds_the_published_bytes_after_every_version(parts: tuple[VllmEngine, Any]) -> None:
    engine, model = parts
    for version in range(1, 4):
        change(model, version)
        engine.load_weights(*publish(model, version)).result(timeout=600)
        assert engine.version == version
        [found] = engine.apply_model(read_back).result(timeout=600)
        own = dict(model.named_parameters())
        head = own.get("lm_head.weight", own["model.embed_tokens.weight"])
        expected = {
            "model.embed_tokens.weight": own["model.embed_tokens.weight"],
            "model.norm.weight": own["model.norm.weight"],
            "lm_head.packed": head,
        }
        for i in range(model.config.num_hidden_layers):
            layer = f"model.layers.{i}"
            expected |= {
                f"{layer}.self_attn.qkv_proj.packed": torch.cat(
                    [own[f"{layer}.self_attn.{x}_proj.weight"] for x in "qkv"]
                ),
                f"{layer}.self_attn.o_proj.packed": own[f"{layer}.self_attn.o_proj.weight"],
                f"{layer}.mlp.gate_up_proj.packed": torch.cat(
                    [own[f"{layer}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
                ),
                f"{layer}.mlp.down_proj.packed": own[f"{layer}.mlp.down_proj.weight"],
            }
            for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
                expected[f"{layer}.{norm}.weight"] = own[f"{layer}.{norm}.weight"]
        if "lm_head.packed" not in found:  # a tied head computes from the embedding's packed copy
            found["lm_head.packed"] = found["model.embed_tokens.packed"]
        assert found.keys() - expected.keys() <= {"model.embed_tokens.packed", "lm_head.weight"}
        for name, tensor in expected.items():
            rows = found[name][: len(tensor)]  # the vocabulary may be padded below
            assert torch.equal(rows, tensor.detach()), name


def test_recorded_logprobs_are_those_of_a_plain_forward_pass(parts: tuple[VllmEngine, Any]) -> None:
    engine, model = parts
    rng = np.random.default_rng(0)
    for version in range(4, 7):
        change(model, version)
        engine.load_weights(*publish(model, version)).result(timeout=600)
        prompts = [rng.integers(6, 40, rng.integers(3, 12)).tolist() for _ in range(8)]
        written = engine.generate(ask(prompts), SAMPLING).result(timeout=600)
        assert set(written.policy_versions.tolist()) == {version}
        assert difference(model, written) < 2e-5


def test_cached_prefixes_of_old_weights_are_forgotten(parts: tuple[VllmEngine, Any]) -> None:
    engine, model = parts
    prompts = [(np.arange(160) % 30 + 6).tolist()] * 4  # longer than a block of the cache
    for version in (7, 8):
        change(model, version)
        engine.load_weights(*publish(model, version)).result(timeout=600)
        assert difference(model, engine.generate(ask(prompts), SAMPLING).result(timeout=600)) < 2e-5


def test_a_sample_is_a_function_of_its_seed_not_of_its_company(parts: tuple[VllmEngine, Any]) -> None:
    engine, model = parts
    engine.load_weights(*publish(model, 9)).result(timeout=600)
    prompts = [[6 + i, 7, 8] for i in range(6)]
    together = engine.generate(ask(prompts), SAMPLING).result(timeout=600)
    alone = engine.generate(ask(prompts[:1]), SAMPLING).result(timeout=600)
    other = engine.generate(ask(prompts[:1], seed=99), SAMPLING).result(timeout=600)
    first = slice(0, together.response_offsets[1])
    np.testing.assert_array_equal(together.response_tokens[first], alone.response_tokens)
    np.testing.assert_array_equal(together.behaviour_logprobs[first], alone.behaviour_logprobs)
    assert alone.response_tokens.tolist() != other.response_tokens.tolist()


def test_a_corrupt_version_is_refused_and_the_engine_works_on(parts: tuple[VllmEngine, Any]) -> None:
    engine, model = parts
    engine.load_weights(*publish(model, 10)).result(timeout=600)
    manifest, buckets = publish(model, 11)
    buckets[0][100] ^= 1
    with pytest.raises(WeightError, match=r"version 11: .* has checksum"):
        deliver(engine, manifest, buckets)
    other = WeightVersion(12, manifest.tensors[1:], manifest.bucket_bytes)
    buckets[0][100] ^= 1
    with pytest.raises(
        WeightError, match=r"does not fit .* in 1 tensors, first model\.embed_tokens.weight: found nothing"
    ):
        deliver(engine, other, buckets)
    written = engine.generate(ask([[6, 7, 8]]), SAMPLING).result(timeout=600)
    assert set(written.policy_versions.tolist()) == {10}
    assert difference(model, written) < 2e-5


def test_weights_may_change_while_requests_run(parts: tuple[VllmEngine, Any]) -> None:
    engine, model = parts
    engine.load_weights(*publish(model, 20)).result(timeout=600)
    long = SamplingConfig(max_response_tokens=80)
    brake = Brake(engine, steps=3)
    running = engine.generate(ask([[6 + i, 7, 8] for i in range(16)]), long)
    brake.wait()
    change(model, 21)
    engine.load_weights(*publish(model, 21)).result(timeout=600)
    brake.release()
    written = running.result(timeout=600)
    assert len(written) == 16
    versions = [written.policy_versions[slice(*written.response_offsets[i : i + 2])] for i in range(16)]
    assert all(set(own.tolist()) <= {20, 21} and (np.diff(own) >= 0).all() for own in versions)
    assert any(own[-1] == 21 for own in versions)
    new = engine.generate(ask([[6, 7, 8]]), SAMPLING).result(timeout=600)
    assert difference(model, new) < 2e-5


def test_weights_may_wait_for_what_runs_and_what_comes_later_waits_for_them(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m")
    config = RolloutConfig(dtype="float32", on_new_weights="wait", engine=OPTIONS)
    engine = VllmEngine(str(path), config, SAMPLING, stop_token_ids=[])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    try:
        engine.load_weights(*publish(model, 1)).result(timeout=600)
        long = SamplingConfig(max_response_tokens=80)
        brake = Brake(engine, steps=3)
        running = engine.generate(ask([[6 + i, 7, 8] for i in range(4)]), long)
        given_up = engine.generate(ask([[30, 7, 8]]), long)
        change(model, 2)
        loading = engine.load_weights(*publish(model, 2))
        later = engine.generate(ask([[6, 7, 8]]), SAMPLING)
        engine.abort(np.array([(0, 0, 0)])).result(timeout=600)  # the first of each call; the last is not in yet
        assert not loading.done(), "an abort passes weights that wait"
        brake.release()
        for call in (running, given_up):
            with pytest.raises(AbortedError):
                call.result(timeout=600)
        assert set(later.result(timeout=600).policy_versions.tolist()) == {2}
        assert loading.done() and difference(model, later.result()) < 2e-5
        running = engine.generate(ask([[6 + i, 7, 8] for i in range(4)]), long)
        engine.load_weights(*publish(model, 3))
        assert set(running.result(timeout=600).policy_versions.tolist()) == {2}
    finally:
        engine.close()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_keys_and_values_of_old_weights_may_be_kept_for_what_runs_but_for_nothing_new(
    tmp_path: Path, asynchronous: bool
) -> None:
    path = make_tiny_model(tmp_path / "m", context=512)
    options = OPTIONS | {"async_scheduling": asynchronous}
    config = RolloutConfig(dtype="float32", recompute_kv=False, engine=options)
    engine = VllmEngine(str(path), config, SAMPLING, stop_token_ids=[])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    try:
        engine.load_weights(*publish(model, 1)).result(timeout=600)
        prompt = [6 + i % 60 for i in range(300)]  # two blocks of cache
        long = SamplingConfig(max_response_tokens=150)
        engine.generate(ask([prompt]), SAMPLING).result(timeout=600)
        brake = Brake(engine, steps=3)
        running = engine.generate(ask([[*prompt, 66]]), long)
        brake.wait()
        change(model, 2)
        engine.load_weights(*publish(model, 2)).result(timeout=600)
        brake.release()
        new = engine.generate(ask([prompt]), SAMPLING).result(timeout=600)
        assert difference(model, new) < 2e-5, "a cached prefix of the old weights was used"
        written = running.result(timeout=600)
        assert set(written.policy_versions.tolist()) == {1, 2}
    finally:
        engine.close()


@pytest.mark.parametrize("recompute_kv", [False, True])
def test_every_token_has_the_version_that_computed_it_when_steps_overlap(tmp_path: Path, recompute_kv: bool) -> None:
    path = make_tiny_model(tmp_path / "m")
    options = OPTIONS | {"async_scheduling": True}  # as on GPUs: the next step is under way while one is collected
    config = RolloutConfig(dtype="float32", recompute_kv=recompute_kv, engine=options)
    engine = VllmEngine(str(path), config, SAMPLING, stop_token_ids=[])
    old, new = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for _ in range(2))
    change(new, 2)
    try:
        engine.load_weights(*publish(old, 1)).result(timeout=600)
        brake = Brake(engine, steps=3)
        running = engine.generate(ask([[6 + i, 7, 8] for i in range(13)]), SamplingConfig(max_response_tokens=60))
        brake.wait()
        engine.load_weights(*publish(new, 2)).result(timeout=600)
        brake.release()
        written = running.result(timeout=600)
    finally:
        engine.close()
    changed = 0
    for i in range(13):
        prompt = written.prompt_tokens[slice(*written.prompt_offsets[i : i + 2])]
        span = slice(*written.response_offsets[i : i + 2])
        response, versions = written.response_tokens[span].astype(np.int64), written.policy_versions[span]
        text = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        with torch.no_grad():
            rows = [model(text).logits[0, len(prompt) - 1 : -1].log_softmax(-1).numpy() for model in (old, new)]
        first, second = (row[np.arange(len(response)), response] for row in rows)
        # The old weights' tokens have their log-probs exactly; the first token of the new weights has another one.
        np.testing.assert_allclose(written.behaviour_logprobs[span][versions == 1], first[versions == 1], atol=2e-5)
        if recompute_kv:
            np.testing.assert_allclose(
                written.behaviour_logprobs[span][versions == 2], second[versions == 2], atol=2e-5
            )
        changed += {1, 2} == set(versions.tolist())
    assert changed == 13


def test_an_engine_without_weights_refuses_to_sample(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "m")
    engine = VllmEngine(str(path), RolloutConfig(dtype="float32", engine=OPTIONS), SAMPLING)
    try:
        with pytest.raises(WeightError, match="not been given weights"):
            engine.generate(ask([[6, 7]]), SAMPLING).result(timeout=600)
    finally:
        engine.close()


def learn_with_experts(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    learner = make_learner(models, objective=ObjectiveConfig(estimator="full"))
    config = RolloutConfig(dtype="float32", engine=OPTIONS)
    engine = VllmEngine(str(models["student"]), config, SAMPLING, stop_token_ids=[2])
    for _ in range(2):  # the first version replaces random weights, the second one that was packed
        learner.update(written.ids, written, scores)
        *buckets, manifest = received(learner.publish())
        engine.load_weights(manifest, buckets).result(timeout=600)  # type: ignore[arg-type]
        answers = engine.generate(ask([[7, 8, 9], [20, 21, 22, 23]]), SAMPLING).result(timeout=600)
        assert difference(learner._model, answers) < 1e-4


def test_a_student_of_experts_learns_from_a_teacher_of_experts_and_samples_from_what_it_has_learnt(
    tmp_path: Path,
) -> None:
    models = {
        name: make_tiny_model(tmp_path / name, architecture="qwen3_moe", seed=seed)
        for seed, name in enumerate(("student", "other"))
    }
    # vLLM makes the groups that experts need with the first engine of a process.
    process = clean_process.start(learn_with_experts, models, log=tmp_path / "log")
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-4000:]
