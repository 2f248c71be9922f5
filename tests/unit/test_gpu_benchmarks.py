"""The benchmarks for GPUs run, on a tiny shape and a CPU; and what they divide by is counted right."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.shapes import SHAPES, forward_flops, make_model, make_work

OPTIONS = Namespace(shape="tiny", tokens=128, length=32, prompt=8, repeats=1, compile=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "tiny")


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_and_says_what_it_took(part: str, model: Path) -> None:
    found = PARTS[part](OPTIONS, model)
    if "skipped" not in found:
        assert found["seconds"] > 0 and found["extra_gb"] >= 0
        if "tokens_a_second" in found:
            assert found["tokens_a_second"] == pytest.approx(128 / found["seconds"], rel=0.1)


def test_operations_are_those_that_torch_counts_but_for_the_half_of_attention_that_no_token_sees(model: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.arange(96).view(2, 48), use_cache=False)
    size = SHAPES["tiny"]
    unseen = 96 * 2 * 48 * size["num_hidden_layers"] * size["num_attention_heads"] * size["head_dim"]
    assert counter.get_total_flops() == forward_flops("tiny", 96, 48, head=True) + unseen


@pytest.mark.parametrize(("shape", "billions"), [("0.6b", 0.596), ("1.7b", 1.72), ("4b", 4.02), ("8b", 8.19)])
def test_shapes_have_the_parameters_of_the_models_they_are_named_after(shape: str, billions: float) -> None:
    from transformers import Qwen3Config

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPES[shape]))
    assert network.num_parameters() / 1e9 == pytest.approx(billions, rel=0.01)


def test_work_is_of_the_length_that_was_asked_for() -> None:
    written, scores = make_work("tiny", 128, 32, 8)
    assert len(written) == 4 and written.lengths.tolist() == [24] * 4
    assert len(written.prompt_tokens) == 32 and len(scores.logprobs) == 96
