"""Options of vLLM's engine are checked before an engine is built."""

import subprocess
import sys
from typing import Any

import pytest

from actors.errors import UserError
from actors.vllm_options import check_options


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        (
            "max_num_seq",
            8,
            "an option that does not exist, expected an option of vLLM's engine, 'max_num_seqs' perhaps",
        ),
        ("max_model_len", "abc", "found 'abc', expected a value of the type int"),
        ("max_model_len", True, "found True, expected a value of the type int"),
        ("gpu_memory_utilization", "0.9", "found '0.9', expected a value of the type float"),
        ("enforce_eager", "no", "found 'no', expected a value of the type bool"),
        ("max_num_seqs", 1.5, "found 1.5"),
        ("load_format", None, "found None"),
    ],
)
def test_an_option_that_vllm_does_not_have_or_of_another_type_is_named(option: str, value: Any, told: str) -> None:
    if option == "load_format":
        option, value, told = "revision", 3, "found 3"
    with pytest.raises(UserError) as caught:
        check_options({option: value}, "rollout.engine")
    assert str(caught.value).startswith(f"rollout.engine.{option}: ") and told in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("repetition_penalty", 1.2, "found 1.2, expected no such option"),
        ("override_generation_config", {"min_p": 0.1}, "expected no such option: the learner would take"),
        ("logits_processors", ["a.b:C"], "expected no such option: the learner would take"),
        ("speculative_config", {"method": "ngram"}, "expected no such option: the learner would take"),
        ("generation_config", "elsewhere", "expected auto or vllm"),
        ("logprobs_mode", "raw_logits", "expected no such option: it is set here"),
        ("temperature", 0.5, "expected sampling.temperature"),
        ("dtype", "float16", "expected the key of this name"),
        ("hf_overrides", {"rope_theta": 1.0}, "expected no such option: the learner trains the model"),
        ("hf_config_path", "elsewhere", "expected no such option: the learner trains the model"),
        ("tokenizer", "elsewhere", "expected no such option: the learner trains the model"),
        ("max_num_seqs", -1, "found -1, expected at least 1"),
        ("max_num_seqs", 0, "found 0, expected at least 1"),
        ("gpu_memory_utilization", 2, "found 2, expected at least 0.01 and at most 1"),
    ],
)
def test_samplers_that_the_objective_does_not_know_are_refused(option: str, value: Any, told: str) -> None:
    with pytest.raises(UserError) as caught:
        check_options({option: value}, "rollout.engine")
    assert str(caught.value).startswith(f"rollout.engine.{option}: ") and told in str(caught.value)
    check_options({"generation_config": "vllm", "override_generation_config": {}}, "rollout.engine")


def test_options_that_vllm_has_pass_whether_their_type_is_plain_or_not() -> None:
    check_options({"max_num_seqs": 8, "gpu_memory_utilization": 1, "enforce_eager": True, "quantization": "fp8",
                   "kv_cache_dtype": "auto", "compilation_config": 3, "hf_overrides": {}, "max_num_batched_tokens": None},
                  "rollout.engine")  # fmt: skip


def test_vllm_is_not_imported_for_it() -> None:
    code = "import sys; from actors.vllm_options import check_options; check_options({'seed': 1}, 'k'); print('vllm' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
