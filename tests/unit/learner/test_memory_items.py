"""The arithmetic of memory: by hand, and against what processes of learners hold."""

import subprocess
import sys
from dataclasses import replace
from multiprocessing import Queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.ranks import measure
from learner.config import LearnerConfig, ObjectiveConfig, TrustRegionConfig
from learner.memory_items import (
    LearnerNumbers,
    ModelNumbers,
    engine_items,
    host_items,
    learner_items,
    peak,
    teacher_items,
)
from tests import clean_process
from tests.tiny_models import make_tiny_model

QWEN3_4B = ModelNumbers(
    parameters=4_022_468_096,
    layers=36,
    hidden=2560,
    vocabulary=151_936,
    feed_forward=9728,
    queries=4096,
    keys=1024,
    key_heads=8,
    tied=True,
    inner_norms=True,
)
RECIPE = LearnerNumbers(pass_tokens=10240)
GB = 1e9


def sizes(run: LearnerNumbers, model: ModelNumbers = QWEN3_4B) -> dict[str, float]:
    return {item.name: item.nbytes / GB for item in learner_items(model, run)}


def highest(run: LearnerNumbers, **changes: Any) -> float:
    return peak(learner_items(QWEN3_4B, replace(run, **changes)))[0] / GB


def test_the_numbers_of_a_configuration_are_those_of_the_model() -> None:
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    assert ModelNumbers.of(config.get_text_config(), 4_022_468_096) == QWEN3_4B
    # Keys and values of 36 layers with 8 heads of 128, 2 bytes each.
    assert QWEN3_4B.cache_bytes(1) == 2 * 36 * 8 * 128 * 2


def test_what_a_step_holds_beside_the_state() -> None:
    fused, foreach = sizes(RECIPE), sizes(replace(RECIPE, step="foreach"))
    assert fused["float32 weights"] == fused["gradients"] == pytest.approx(16.09, abs=0.01)
    assert fused["AdamW's moments"] == pytest.approx(32.18, abs=0.01)
    assert "temporaries of the step" not in fused
    assert foreach["temporaries of the step"] == pytest.approx(16.09, abs=0.01)
    # The recipe of 4B on one card of 80 GB: 20 bytes a parameter at the step do not leave room, 16 do.
    assert highest(RECIPE, step="foreach") == pytest.approx(80.4, abs=0.1)
    assert highest(RECIPE) < 79
    # A moving average is 4 bytes a parameter more than either, at any moment.
    assert highest(RECIPE, averages=1) - highest(RECIPE) == pytest.approx(16.09, abs=0.01)


def test_the_experts_of_a_layer_are_one_weight() -> None:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32, head_dim=128, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, vocab_size=151_936)  # fmt: skip
    model = ModelNumbers.of(config, 30_532_122_624)
    assert model.largest == 128 * 2 * 768 * 2048  # transformers: experts.gate_up_proj [128, 2 * 768, 2048]
    assert 0.63 < model.largest / model.layer < 0.67
    found = {item.name: item.nbytes for item in learner_items(model, LearnerNumbers())}
    assert found["gradient of one weight, and its cast"] == 6 * model.largest
    # A token has 8 copies, each with its share of the feed-forward layer.
    plain = replace(model, copies=0)
    assert model.saved_bytes(4) - plain.saved_bytes(4) == 8 * 8 * 2048


def test_what_changes_with_the_settings() -> None:
    assert highest(RECIPE, ranks=4) < highest(RECIPE, ranks=2) < highest(RECIPE)
    assert sizes(replace(RECIPE, offload=True))["AdamW's moments, of one parameter"] == pytest.approx(3.11, abs=0.01)
    assert highest(RECIPE, offload=True) == pytest.approx(highest(RECIPE) - 32.18, abs=0.01)
    searched = replace(RECIPE, max_kl=True)
    before, after = (sizes(searched)[f"weights {when} the step (max_kl)"] for when in ("before", "after"))
    assert before == after == pytest.approx(16.09, abs=0.01)
    adapters = sizes(replace(RECIPE, adapter_parameters=33_000_000))
    assert adapters["frozen weights"] == pytest.approx(8.04, abs=0.01) and adapters["gradients"] < 0.14
    assert highest(RECIPE, checkpointing=False) > highest(RECIPE) + 60
    assert sizes(replace(RECIPE, update_tokens=1 << 20, score_bytes=768))[
        "tokens and scores of an update, at most"
    ] == pytest.approx((70 + 768) * 1.048576e-3, abs=0.01)


def test_a_configuration_of_the_learner_gives_its_numbers() -> None:
    region = TrustRegionConfig(estimator="exact", max_kl=0.1)
    config = LearnerConfig(
        replicas=2, compute_dtype="float32", microbatch_tokens=100, objective=ObjectiveConfig(trust_region=region)
    )
    found = LearnerNumbers.of(config, longest=300, averages=1)
    assert found == LearnerNumbers(
        ranks=2, compute_bytes=4, pass_tokens=300, checkpointing=False, max_kl=True, exact_region=True, averages=1
    )


def test_engines_teachers_and_the_host() -> None:
    engine = engine_items(QWEN3_4B, dtype_bytes=2, tensor_parallel=2, context=10240)
    assert [item.nbytes for item in engine] == [4_022_468_096, 10240 * 147_456 // 2]
    scores = engine_items(QWEN3_4B, dtype_bytes=2, tensor_parallel=2, context=10240, scored_tokens=16384)
    assert {item.name: round(item.nbytes / GB, 2) for item in scores if not item.certain} == {
        "activations of one layer": 0.98,  # 16,384 x (4 x 2,560 + (2 x 4,096 + 2 x 1,024 + 3 x 9,728) / 2) x 2 bytes
        "log-probs of a chunk of tokens": 1.87,  # 1,024 x 151,936 x 12 bytes
    }
    # More ranks than key-value heads hold copies of them.
    assert engine_items(QWEN3_4B, dtype_bytes=2, tensor_parallel=16, context=8)[1].nbytes == 147_456
    teacher = {"dtype_bytes": 2, "pass_tokens": 16384, "head_chunk_tokens": 1024}
    whole, half = (teacher_items(QWEN3_4B, tensor_parallel=n, **teacher)[0].nbytes for n in (1, 2))
    head = 2 * 151_936 * 2560
    assert (whole, half) == (8_044_936_192, head + (8_044_936_192 - head) // 2)
    host = host_items(QWEN3_4B, replace(RECIPE, offload=True), publish_bytes=2, bucket=1 << 28, delta=True)
    assert {item.name: round(item.nbytes / GB, 1) for item in host} == {
        "a copy for the checkpoint that is being written": 48.3,
        "AdamW's moments": 32.2,
        "a bucket": 0.8,
        "the last version and the next (delta)": 16.1,
    }


def test_the_module_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys, learner.memory_items; print(sorted({'torch', 'numpy', 'omegaconf', 'ray'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("model", ["qwen3", "llama", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_saves_for_its_backward_pass_what_the_formula_says(
    tmp_path: Path, model: Any, dtype: torch.dtype
) -> None:
    from actors.data.models import load_model
    from actors.forward.packing import hidden_states

    tokens, of_layers = 512, {}
    for layers in (1, 3):
        size = {"hidden": 128, "architecture": model, "heads_of_keys": 4, "context": 1024}
        network = load_model(
            str(make_tiny_model(tmp_path / str(layers), layers=layers, **size)),
            "float32",
            "cpu",
            False,
            "student.model",
        )
        saved: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, torch.Tensor] = saved) -> torch.Tensor:
            # Neither weights nor their casts; a token meets two experts.
            if tensor.dtype.is_floating_point and {tokens, 2 * tokens} & set(tensor.shape):
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with (
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            hidden_states(network.base_model, np.arange(tokens) % 50, np.array([tokens]), "cpu")
        of_layers[layers] = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    numbers = ModelNumbers.of(network.config.get_text_config(), sum(p.numel() for p in network.parameters()))
    a_token = (of_layers[3] - of_layers[1]) / 2 / tokens
    assert a_token == pytest.approx(numbers.saved_bytes(dtype.itemsize) + 4 * numbers.hidden, rel=0.03)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelNumbers, dict[str, dict[str, float]]]:
    """The numbers of a model, and by kind of learner what its first rank held, in bytes."""
    folder = tmp_path_factory.mktemp("memory")
    model = make_tiny_model(folder / "model", hidden=512, layers=8, vocab_extra=16_384, dtype=torch.bfloat16)
    make_tiny_model(folder / "small", hidden=32, layers=1)
    answers: Queue = clean_process.CONTEXT.Queue()
    found = {}
    for name, size in (("one", 1), ("two", 2)):
        processes = [
            clean_process.start(measure_and_end, rank, size, model, folder, answers, log=folder / f"{name}-{rank}")
            for rank in range(size)
        ]
        for rank, process in enumerate(processes):
            process.join(300)
            assert process.exitcode == 0, (folder / f"{name}-{rank}").read_text()[-3000:]
        found[name] = dict(answers.get(timeout=60) for _ in range(size))[0]
    from safetensors.torch import load_file
    from transformers import AutoConfig

    parameters = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    return ModelNumbers.of(AutoConfig.from_pretrained(model), parameters), found


def measure_and_end(*arguments: Any) -> None:
    measure(*arguments)
    arguments[4].close()
    arguments[4].join_thread()  # the process ends by os._exit, which would not wait for what is still in the queue


@pytest.mark.parametrize(("name", "ranks"), [("one", 1), ("two", 2)])
def test_a_rank_holds_what_the_arithmetic_says(name: str, ranks: int, measured: Any) -> None:
    model, found = measured
    run = LearnerNumbers(
        ranks=ranks, compute_bytes=4, pass_tokens=64, head_chunk_tokens=64, checkpointing=False, step="single"
    )
    formula, _ = peak(learner_items(model, run))
    assert found[name]["update_peak"] == pytest.approx(formula, rel=0.1)
    assert found[name]["built"] == pytest.approx(4 * model.parameters / ranks, rel=0.1, abs=10e6)
    # With several ranks torch keeps a buffer of the size of the embedding until the next pass.
    kept = 4 * model.head * (ranks > 1)
    assert found[name]["updated"] == pytest.approx(16 * model.parameters / ranks + kept, rel=0.1)


def test_a_rank_loads_the_student_without_a_copy_of_it(measured: Any) -> None:
    model, found = measured
    rows = 4 * model.parameters / 2
    # Beside its rows one layer, or embedding and head, in float32, while they are sharded; not the whole model.
    assert found["two"]["build_own"] < rows + 4 * model.head + 8e6
    assert found["two"]["build_own"] < 3.5 * model.parameters
