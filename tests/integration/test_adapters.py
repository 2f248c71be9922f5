"""A real vLLM engine that is given adapters, against plain forward passes of the student that they were merged into."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.config import LoraConfig, RolloutConfig, SamplingConfig
from actors.data.models import load_model
from actors.errors import WeightError
from actors.rollout.vllm_engine import VllmEngine
from actors.weights.buckets import WeightVersion, pack_all, unpack
from learner.student.lora import adapter_tensors, add_adapters, merged_tensors
from tests.tiny_engine import OPTIONS, SAMPLING, ask, deliver, difference
from tests.tiny_models import make_tiny_model

pytest.importorskip("peft")
pytestmark = pytest.mark.integration
LORA = LoraConfig(rank=5, alpha=8.0, rank_stabilised=True, publish="adapter")


class Student:
    """Of random weights, with a random adapter that `change` makes another."""

    def __init__(self, path: Path):
        self.path = path
        self.with_adapter = load_model(str(path), "float32", "cpu", False, "student.model")
        add_adapters(self.with_adapter, LORA, None)

    def change(self, seed: int) -> None:
        torch.manual_seed(seed)
        for tensor in adapter_tensors(self.with_adapter).values():
            tensor.copy_(0.1 * torch.randn_like(tensor))

    def publish(self, version: int) -> tuple[WeightVersion, list[np.ndarray]]:
        return pack_all(version, list(adapter_tensors(self.with_adapter).items()), "float32", 4_000)

    def merged(self) -> Any:
        model = load_model(str(self.path), "float32", "cpu", False, "student.model")
        tensors = pack_all(0, list(merged_tensors(self.with_adapter)), "float32", 40_000)
        model.load_state_dict(dict(unpack(*tensors)), strict=False)
        return model


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmEngine, Student]]:
    path = make_tiny_model(tmp_path_factory.mktemp("model") / "m")
    config = RolloutConfig(dtype="float32", engine=OPTIONS)
    engine = VllmEngine(str(path), config, SAMPLING, stop_token_ids=[2], adapter=LORA)
    yield engine, Student(path)
    engine.close()


def test_recorded_logprobs_are_those_of_the_merged_student_for_every_version(parts: tuple[VllmEngine, Student]) -> None:
    engine, student = parts
    long = (np.arange(160) % 30 + 6).tolist()  # longer than a block of the prefix cache
    for version in (1, 2, 3):
        student.change(version)
        engine.load_weights(*student.publish(version)).result(timeout=600)
        written = engine.generate(ask([long, long, [6, 7, 8], [30, 9]]), SAMPLING).result(timeout=600)
        assert engine.version == version and set(written.policy_versions.tolist()) == {version}
        assert difference(student.merged(), written) < 2e-5
        assert difference(load_model(str(student.path), "float32", "cpu", False, "a"), written) > 0.1


def test_an_adapter_may_change_while_requests_run(parts: tuple[VllmEngine, Student]) -> None:
    engine, student = parts
    student.change(20)
    engine.load_weights(*student.publish(20)).result(timeout=600)
    old = student.merged()
    running = engine.generate(ask([[6 + i, 7, 8] for i in range(16)]), SamplingConfig(max_response_tokens=80))
    student.change(21)
    engine.load_weights(*student.publish(21)).result(timeout=600)
    written, new = running.result(timeout=600), student.merged()
    assert 21 in written.policy_versions
    for i in range(len(written)):
        span = slice(*written.response_offsets[i : i + 2])
        prompt = written.prompt_tokens[slice(*written.prompt_offsets[i : i + 2])]
        tokens = torch.from_numpy(np.concatenate([prompt, written.response_tokens[span]]).astype(np.int64))
        with torch.no_grad():
            both = [torch.log_softmax(m(tokens[None]).logits[0, len(prompt) - 1 : -1], -1) for m in (old, new)]
        expected = torch.where(torch.from_numpy(written.policy_versions[span] == 20)[:, None], *both)
        found = expected.gather(-1, tokens[len(prompt) :, None])[:, 0].numpy()
        assert np.abs(found - written.behaviour_logprobs[span]).max() < 2e-5


def test_what_is_no_adapter_of_the_student_is_refused_and_the_engine_works_on(
    parts: tuple[VllmEngine, Student],
) -> None:
    engine, student = parts
    student.change(30)
    engine.load_weights(*student.publish(30)).result(timeout=600)
    manifest, buckets = student.publish(31)
    half = replace(manifest, tensors=manifest.tensors[1:])
    with pytest.raises(WeightError, match=r"in 1 tensors, first .*lora_A\.weight: found nothing, expected \(5, 64\)"):
        engine.load_weights(half, buckets).result(timeout=600)
    with pytest.raises(WeightError, match=r"does not fit the model"):
        whole = pack_all(32, list(student.merged().named_parameters()), "float32", 40_000)
        engine.load_weights(*whole).result(timeout=600)
    buckets[0][100] ^= 1
    with pytest.raises(WeightError, match=r"version 31: .* has checksum"):
        deliver(engine, manifest, buckets)
    written = engine.generate(ask([[6, 7, 8]]), SAMPLING).result(timeout=600)
    assert set(written.policy_versions.tolist()) == {30}
    assert difference(student.merged(), written) < 2e-5
