import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    MptConfig,
    PhiConfig,
    Qwen3Config,
    T5Config,
)

from actors.config import TeacherConfig
from actors.data.contexts import context_length
from actors.data.models import (
    check_weights,
    find_model,
    load_config,
    load_head,
    load_model,
    looks_local,
    response_head,
)
from actors.data.tokenizer import (
    check_tokenizers_agree,
    end_token_id,
    load_tokenizer,
    stop_token_ids,
    template_difference,
    template_token_ids,
)
from actors.errors import UserError
from actors.teacher.base import context_of
from tests.tiny_models import CHARACTERS, make_tiny_model, make_tiny_tokenizer

KEY = "student.model"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture
def model_dir(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "student"))


def load(path, dtype="float32"):
    return load_model(str(path), dtype, "cpu", False, KEY)


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def test_importing_the_module_loads_neither_torch_nor_transformers():
    code = "import sys, actors.data.models; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0


def test_a_model_is_loaded_as_it_was_written_ready_for_evaluation(tiny):
    model = load(tiny)
    stored = load_file(tiny / "model.safetensors")
    assert not model.training and model.config._attn_implementation == "sdpa"
    for name, value in stored.items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_has_the_dtype_that_was_asked_for(tiny, dtype):
    assert {parameter.dtype for parameter in load(tiny, dtype).parameters()} == {getattr(torch, dtype)}


def test_a_tokenizer_is_loaded_with_its_chat_template(tiny):
    tokenizer = load_tokenizer(str(tiny), False, KEY)
    assert tokenizer.eos_token == "<eos>" and tokenizer.chat_template
    assert tokenizer.decode(tokenizer("7+8=\n15").input_ids) == "7+8=\n15"


@pytest.mark.parametrize(
    "loader", [load, lambda p: load_tokenizer(p, False, KEY), lambda p: load_config(p, False, KEY)]
)
def test_a_missing_directory_is_named_with_the_nearest_one(model_dir, loader):
    with pytest.raises(UserError, match=rf"^student\.model: found .*/studnet, expected .*mean '{model_dir}'"):
        loader(str(model_dir.parent / "studnet"))


@pytest.mark.parametrize(
    "name", ["/no/such/model", "/model", "./model", "../model", "~/no-such-model", "runs/a/model", "models/x"]
)
def test_what_looks_like_a_path_never_asks_a_hub(name, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)

    def no_hub(*_arguments, **_options):
        raise AssertionError("asked the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_hub)
    with pytest.raises(UserError, match="expected an existing directory"):
        find_model(name, KEY)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "gpt2"])
def test_a_hub_name_without_a_network_is_one_error(name, monkeypatch, tmp_path):
    def no_network(*_arguments, **_options):
        raise socket.gaierror("no network in this test")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert not looks_local(name)
    with pytest.raises(UserError, match=rf"^student\.model: found the hub name {name} .*a local directory"):
        load(name)


def test_a_directory_without_config_is_refused(model_dir):
    (model_dir / "config.json").unlink()
    with pytest.raises(UserError, match=r"student without config\.json"):
        load(model_dir)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "qwen33"}', ""])
def test_a_config_that_cannot_be_read_is_refused(model_dir, content):
    (model_dir / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"student\.model: found .*config\.json \("):
        load_config(str(model_dir), False, KEY)


def test_a_directory_without_weights_is_refused(model_dir):
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"without \*\.safetensors"):
        load(model_dir)


def test_weights_that_are_a_pickle_are_refused(model_dir):
    torch.save(load_file(model_dir / "model.safetensors"), model_dir / "pytorch_model.bin")
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"without \*\.safetensors"):
        load(model_dir)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused_by_file(model_dir, keep):
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"found .*/model\.safetensors \(.*expected a whole safetensors file"):
        load(model_dir)


def test_weights_with_a_corrupt_header_are_refused(model_dir):
    file = model_dir / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        check_weights(model_dir, KEY)


def test_a_missing_shard_is_named(model_dir):
    shard = "model-00002-of-00002.safetensors"
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UserError, match=f"without {shard}"):
        load(model_dir)


def test_a_tensor_that_the_files_lack_is_refused_instead_of_started_at_random(model_dir):
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"without 1 tensors, first model\.norm\.weight"):
        load(model_dir)


def test_weights_that_do_not_fit_the_config_are_refused(model_dir):
    edit_json(model_dir / "config.json", intermediate_size=32)
    expected = (
        r"with model\.layers\.0\.mlp\.down_proj\.weight of shape \[64, 128\], expected \[64, 32\], as config\.json says"
    )
    with pytest.raises(UserError, match=expected):
        load(model_dir)


def test_weights_that_nothing_uses_are_remarked_on(model_dir):
    file = model_dir / "model.safetensors"
    save_file(load_file(file) | {"score.weight": torch.ones(3)}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"1 tensors that its config\.json has no use for, first score\.weight"):
        load(model_dir)


def test_a_directory_without_a_tokenizer_is_refused(model_dir):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model_dir / name).unlink()
    with pytest.raises(UserError, match="without a tokenizer"):
        load_tokenizer(str(model_dir), False, KEY)


def test_a_tokenizer_without_its_vocabulary_is_refused(model_dir):
    (model_dir / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"^student\.model"):
        load_tokenizer(str(model_dir), False, KEY)


def test_a_corrupt_tokenizer_is_refused(model_dir):
    (model_dir / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(UserError, match="a tokenizer that transformers can read"):
        load_tokenizer(str(model_dir), False, KEY)


def test_code_that_comes_with_a_model_is_not_run_unasked(model_dir, tmp_path):
    witness = tmp_path / "witness"
    (model_dir / "custom.py").write_text(f"open({str(witness)!r}, 'w')")
    edit_json(model_dir / "config.json", model_type="custom", auto_map={"AutoConfig": "custom.Config"})
    with pytest.raises(UserError, match="trust_remote_code"):
        load_config(str(model_dir), False, KEY)
    assert not witness.exists()


def test_stop_tokens_are_those_of_the_tokenizer_and_of_the_generation_config(model_dir):
    tokenizer = load_tokenizer(str(model_dir), False, KEY)
    edit_json(model_dir / "generation_config.json", eos_token_id=[3, 0])
    assert stop_token_ids(model_dir, tokenizer) == [0, tokenizer.eos_token_id, 3]
    edit_json(model_dir / "generation_config.json", eos_token_id=2)
    assert stop_token_ids(model_dir, tokenizer) == [tokenizer.eos_token_id, 2]
    (model_dir / "generation_config.json").unlink()
    assert stop_token_ids(model_dir, tokenizer) == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    assert stop_token_ids(model_dir, tokenizer) == []


@pytest.mark.parametrize(
    "content",
    [f'{{"eos_token_id": {ids}}}' for ids in ("-1", "[1, -1]", "[1, 112]", "[1, 99999]", "2147483648", str(2**70))],
)
def test_an_end_without_a_row_is_refused_with_the_file_and_the_id(model_dir, content):
    tokenizer, file = load_tokenizer(str(model_dir), False, KEY), model_dir / "generation_config.json"
    file.write_text('{"eos_token_id": [1, 111]}')
    assert stop_token_ids(model_dir, tokenizer, 112) == [1, 111]  # a padding row
    file.write_text(content)
    wrong = str(np.atleast_1d(json.loads(content)["eos_token_id"])[-1])
    with pytest.raises(
        UserError, match=rf"^{file}: found eos_token_id {wrong}, expected ids that .* rows for, 0 to 111"
    ):
        stop_token_ids(model_dir, tokenizer, 112)


@pytest.mark.parametrize("content", ["[]", "null", "3", "{", '[["eos_token_id", 1]]'])
def test_a_generation_config_that_is_no_object_is_refused(model_dir, content):
    tokenizer, file = load_tokenizer(str(model_dir), False, KEY), model_dir / "generation_config.json"
    file.write_text(content)
    with pytest.raises(UserError, match=rf"^{file}: found no JSON object"):
        stop_token_ids(model_dir, tokenizer)


def test_an_end_of_the_tokenizer_without_a_row_is_the_models_fault(model_dir):
    edit_json(model_dir / "tokenizer_config.json", eos_token="<nope>")
    tokenizer = load_tokenizer(str(model_dir), False, KEY)
    with pytest.raises(UserError, match=r"^student\.model: found .*'<nope>' with id 102, expected .*, 0 to 101"):
        stop_token_ids(model_dir, tokenizer, 102, KEY)
    with pytest.raises(UserError, match=r"^student\.model: found a student model with a vocabulary of 102 tokens"):
        agree(tokenizer, make_tiny_tokenizer(), 102, 102)


def test_a_context_that_is_no_length_is_told_with_the_file_and_the_name(model_dir):
    edit_json(model_dir / "config.json", max_position_embeddings=0)
    wrong = rf"^{model_dir}/config\.json: found max_position_embeddings 0, expected a number of tokens"
    with pytest.raises(UserError, match=wrong):
        context_length(load_config(str(model_dir), False, KEY))
    with pytest.raises(UserError, match=wrong):
        context_of(TeacherConfig(str(model_dir)), "teachers.a")


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "an infinite number")])
def test_weights_that_are_not_finite_are_named(model_dir, value, kind):
    weights = load_file(model_dir / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 3] = value
    save_file(weights, model_dir / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"^student\.model: found {kind} in model\.embed_tokens\.weight, expected"):
        load(model_dir)


SYSTEM_FIRST = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message comes first') }}{% endif %}"
NO_ANSWER = "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"


def test_the_end_of_a_turn_is_found_with_what_the_template_accepts():
    tokenizer = make_tiny_tokenizer()
    template = tokenizer.chat_template.replace("<eos>", "<user>")
    for begun, end in (("", 3), (SYSTEM_FIRST, 3), (NO_ANSWER, 1), ("{% if %}", 1), ("{{ 1 / 0 }}", 1)):
        tokenizer.chat_template = begun + template
        assert end_token_id(tokenizer, True) == end
    tokenizer.chat_template = "<user>and no message"
    assert end_token_id(tokenizer, True) == 1


def test_the_end_of_a_turn_is_that_of_the_named_template():
    tokenizer = make_tiny_tokenizer()
    plain = tokenizer.chat_template
    tokenizer.chat_template = {"rag": plain.replace("<eos>", "<user>"), "other": plain}
    rag, arguments = {"chat_template": "rag"}, {"chat_template": "rag", "continue_final_message": True}
    assert end_token_id(tokenizer, True) == 1
    assert end_token_id(tokenizer, True, rag) == end_token_id(tokenizer, True, arguments) == 3
    # A teacher with one template, which the name of the student's is not.
    teacher = make_tiny_tokenizer()
    assert end_token_id(teacher, True, rag) == 1
    assert template_difference(tokenizer, teacher, {"chat_template": "other"}) is None
    assert template_difference(tokenizer, teacher) is None


def test_template_tokens_and_differences_of_templates_that_raise():
    student, teacher = make_tiny_tokenizer(), make_tiny_tokenizer()
    plain = student.chat_template
    teacher.chat_template = SYSTEM_FIRST + plain
    assert template_difference(teacher, teacher) is None
    assert template_token_ids(teacher) == [1, 2, 3, 4]
    teacher.chat_template = NO_ANSWER + plain
    assert template_token_ids(teacher) == [1, 3, 4]
    teacher.chat_template = "{% if %}"
    assert template_difference(student, teacher) is None
    with pytest.raises(UserError, match=r"^student\.model: found a chat template that accepts neither"):
        template_token_ids(teacher, KEY)


def test_the_context_is_that_of_the_config(tiny):
    config = load_config(str(tiny), False, KEY)
    assert context_length(config) == 256
    assert context_length(GPT2Config(n_positions=77)) == 77
    assert context_length(MptConfig(max_seq_len=88)) == 88
    with pytest.raises(UserError, match="a t5 model: found no context length"):
        context_length(T5Config())


def agree(student, teacher, student_size=200, teacher_size=300):
    sizes = (Qwen3Config(vocab_size=student_size), Qwen3Config(vocab_size=teacher_size))
    return check_tokenizers_agree(student, teacher, *sizes, "teachers.math.model")


def test_models_whose_vocabularies_are_padded_differently_agree():
    agree(make_tiny_tokenizer(), make_tiny_tokenizer())


def test_a_teacher_that_knows_more_tokens_agrees_but_one_that_knows_fewer_does_not():
    agree(make_tiny_tokenizer(CHARACTERS[:-1]), make_tiny_tokenizer())
    with pytest.raises(UserError, match=r"^teachers\.math\.model: found a tokenizer in which '~' is not in the voc"):
        agree(make_tiny_tokenizer(), make_tiny_tokenizer(CHARACTERS[:-1]))


def test_the_first_token_that_differs_is_named():
    swapped = ["\n", " ", "#", "!", '"', *CHARACTERS[5:]]
    with pytest.raises(UserError, match=r"in which '!' is token 9, expected .* token 8 \(3 of 102 tokens differ\)"):
        agree(make_tiny_tokenizer(), make_tiny_tokenizer(swapped))


def test_another_end_of_sequence_token_agrees():
    teacher = make_tiny_tokenizer()
    teacher.eos_token = "<pad>"
    assert agree(make_tiny_tokenizer(), teacher) == []


def test_added_tokens_of_one_side_agree_and_those_that_the_teacher_lacks_are_named():
    more = make_tiny_tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert agree(make_tiny_tokenizer(), more) == []
    assert agree(more, make_tiny_tokenizer()) == ["it has no token '<think>', '</think>', so these have no scores"]
    assert agree(more, make_tiny_tokenizer(), 104, 102)
    other = make_tiny_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    with pytest.raises(UserError, match=r"in which '<think>' is not in the vocabulary, expected .* token 102"):
        agree(more, other)


@pytest.mark.parametrize(("sizes", "whose"), [((101, 200), "student"), ((200, 101), "teacher")])
def test_a_model_without_a_row_for_each_token_is_refused(sizes, whose):
    agree(make_tiny_tokenizer(), make_tiny_tokenizer(), 102, 102)
    with pytest.raises(UserError, match=f"a {whose} model with a vocabulary of 101 tokens, expected at least 102"):
        agree(make_tiny_tokenizer(), make_tiny_tokenizer(), *sizes)


def test_a_chat_template_that_differs_is_described_and_an_equal_one_is_not():
    student, teacher = make_tiny_tokenizer(), make_tiny_tokenizer()
    assert template_difference(student, teacher) is None
    teacher.chat_template = teacher.chat_template.replace("<assistant>", "<assistant>Think!")
    assert "Think!" in template_difference(student, teacher)
    teacher.chat_template = None
    assert template_difference(student, teacher) is None


def config_of(kind, **options):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 32}
    return kind(**sizes, num_attention_heads=1, num_key_value_heads=1, pad_token_id=0, **options)


@pytest.mark.parametrize(("architecture", "tie"), [("qwen3", True), ("qwen3", False), ("llama", False)])
def test_body_and_head_make_the_models_logits(tmp_path, architecture, tie):
    model = load(make_tiny_model(tmp_path / "m", architecture=architecture, tie=tie, vocab_extra=10))
    body, weight, bias = response_head(model, KEY)
    tokens = torch.arange(12).view(2, 6)
    logits = torch.nn.functional.linear(body(tokens).last_hidden_state, weight, bias)
    assert weight.shape == (112, 64) and bias is None
    torch.testing.assert_close(logits, model(tokens).logits, rtol=0, atol=1e-6)


def test_looking_for_the_head_leaves_the_model_as_it_was(tiny):
    model = load(tiny)
    before = model(torch.arange(5)[None]).logits
    response_head(model, KEY)
    assert torch.equal(model(torch.arange(5)[None]).logits, before)


@pytest.mark.parametrize(
    "config",
    [
        config_of(Gemma2Config, final_logit_softcapping=30.0),
        config_of(GraniteConfig, logits_scaling=1.001),
    ],
    ids=["soft cap", "scaling"],
)
def test_an_architecture_that_changes_its_logits_after_the_head_is_refused(config):
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match=f"the architecture {type(model).__name__}"):
        response_head(model, KEY)


def test_a_model_that_scales_the_hidden_state_before_the_head_is_refused(tiny):
    model = load(tiny)
    model.lm_head.register_forward_pre_hook(lambda _module, arguments: (arguments[0] * 1.001,))
    with pytest.raises(UserError, match="Qwen3ForCausalLM"):
        response_head(model, KEY)


def test_weights_that_are_no_numbers_are_not_taken_for_an_unknown_architecture(tiny):
    model = load(tiny)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(UserError, match="found a model whose hidden states are not finite"):
        response_head(model, KEY)


def test_a_head_with_a_bias_is_returned_with_it(tiny):
    model = load(tiny)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(102))
    body, weight, bias = response_head(model, KEY)
    tokens = torch.arange(5)[None]
    logits = torch.nn.functional.linear(body(tokens).last_hidden_state, weight, bias)
    torch.testing.assert_close(logits, model(tokens).logits, rtol=0, atol=1e-6)


def test_the_head_alone_is_that_of_the_whole_model_with_its_bias(model_dir):
    model = load(model_dir)
    assert torch.equal(load_head(str(model_dir), "float32", "cpu", False, KEY)[0], model.get_output_embeddings().weight)
    config = config_of(PhiConfig)
    AutoModelForCausalLM.from_config(config).save_pretrained(model_dir)
    whole = AutoModelForCausalLM.from_pretrained(model_dir)
    weight, bias = load_head(str(model_dir), "float32", "cpu", False, KEY)
    assert torch.equal(weight, whole.lm_head.weight) and torch.equal(bias, whole.lm_head.bias)


def test_files_without_the_head_are_refused(model_dir):
    edit_json(model_dir / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"without lm_head\.weight"):
        load_head(str(model_dir), "float32", "cpu", False, KEY)


def test_the_tiny_model_is_the_same_for_the_same_seed(tiny, tmp_path):
    def files(path):
        return {file.name: file.read_bytes() for file in path.iterdir()}

    assert files(make_tiny_model(tmp_path / "again")) == files(tiny)
    assert files(make_tiny_model(tmp_path / "other", seed=1)) != files(tiny)
    assert Tokenizer.from_file(str(tiny / "tokenizer.json")).encode("1+1").tokens == ["1", "+", "1"]
