"""Weight files are read as their writer meant them, or refused with the reason: by `check`, and by whatever loads them."""

import json
import math
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.data.models import check_fit, load_head, load_model
from actors.errors import UserError
from actors.memory import OVERCOMMIT
from cluster.state.soundness import _torn_tensors
from tests.tiny_models import make_tiny_model

KEY = "teachers.a.model"
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {tie: make_tiny_model(folder / str(tie), hidden=32, layers=1, context=64, tie=tie) for tie in (True, False)}


def edited(kept: dict[bool, Path], folder: Path, edit: Callable[[Tensors], Tensors], tie: bool = True) -> Path:
    shutil.copytree(kept[tie], folder / "model")
    tensors = edit(load_file(folder / "model" / "model.safetensors"))
    save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})
    return folder / "model"


def both_refuse(model: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        check_fit(str(model), False, KEY)
    with pytest.raises(UserError, match=match):
        load_model(str(model), "float32", "cpu", False, KEY)


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], bool, str]] = {
    "tied, with another head": (
        lambda t: {**t, HEAD: t[EMBEDDING] + 1e-3},
        True,
        r"lm_head\.weight that differs from .*, expected tie_word_embeddings: false",
    ),
    "tied, with a smaller head": (lambda t: {**t, HEAD: t[EMBEDDING][:9].clone()}, True, "lm_head|aten::equal"),
    "tied, with the head alone": (
        lambda t: {(HEAD if name == EMBEDDING else name): tensor for name, tensor in t.items()},
        True,
        "lm_head.weight and no embedding",
    ),
    "untied, without a head": (
        lambda t: {name: tensor for name, tensor in t.items() if name != HEAD},
        False,
        r"without 1 tensors, first lm_head\.weight, .*or tie_word_embeddings: true",
    ),
    "more layers": (
        lambda t: {**t, **{name.replace("layers.0", "layers.1"): tensor.clone() for name, tensor in t.items()}},
        True,
        r"with 11 tensors more than config\.json describes, first model\.layers\.1\.",
    ),
    "a bias": (lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, True, "1 tensors more"),
    "scales": (lambda t: {**t, "model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}, True, "1 tensors more"),
    "fp8": (
        lambda t: {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for name, tensor in t.items()},
        True,
        "of F8_E4M3 and no quantization_config",
    ),
    "int8": (lambda t: {**t, NORM: t[NORM].to(torch.int8)}, True, "of I8 and no quantization_config"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tensors_that_are_read_in_two_ways_or_not_at_all_are_refused(
    kind: str, kept: dict[bool, Path], tmp_path: Path
) -> None:
    edit, tie, match = REFUSED[kind]
    both_refuse(edited(kept, tmp_path, edit, tie), match)


def test_a_tied_model_may_store_its_head_twice_and_mix_dtypes_and_keep_buffers(
    kept: dict[bool, Path], tmp_path: Path
) -> None:
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}

    def edit(tensors: Tensors) -> Tensors:
        found = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        return {**found, HEAD: found[EMBEDDING].float(), NORM: tensors[NORM].half(), **rotary}

    model = edited(kept, tmp_path, edit)
    check_fit(str(model), False, KEY)
    network = load_model(str(model), "float32", "cpu", False, KEY)
    assert network.lm_head.weight is network.model.embed_tokens.weight
    head, _ = load_head(str(model), "float32", "cpu", False, KEY)
    assert torch.equal(head, network.lm_head.weight)


def test_an_untied_model_is_read_with_its_own_head(kept: dict[bool, Path], tmp_path: Path) -> None:
    model = edited(kept, tmp_path, lambda tensors: {**tensors, HEAD: torch.full_like(tensors[HEAD], 2.0)}, tie=False)
    check_fit(str(model), False, KEY)
    assert (load_model(str(model), "float32", "cpu", False, KEY).lm_head.weight == 2).all()
    assert (load_head(str(model), "float32", "cpu", False, KEY)[0] == 2).all()


def rename(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / name)


def index(model: Path, content: object) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps(content))


LAYOUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another name": (lambda m: rename(m, "other.safetensors"), "with other.safetensors and no model.safetensors.index"),
    "a part without index": (
        lambda m: rename(m, "model-00001-of-00001.safetensors"),
        "or the index that names its parts",
    ),
    "a part that is not there": (
        lambda m: index(m, {"weight_map": {NORM: "model.safetensors", "x": "model-2.safetensors"}}),
        "without model-2.safetensors",
    ),
    "two sets": (
        lambda m: (
            shutil.copy(m / "model.safetensors", m / "b.safetensors"),
            index(m, {"weight_map": {NORM: "b.safetensors"}}),
        ),
        "which names other files, expected one of the two",
    ),
    "a tensor in two parts": (
        lambda m: (
            shutil.copy(m / "model.safetensors", m / "b.safetensors"),
            index(m, {"weight_map": {NORM: "b.safetensors", "x": "model.safetensors"}}),
        ),
        "b.safetensors and in model.safetensors, expected each tensor in one file",
    ),
    "an index of another type": (
        lambda m: index(m, {"weight_map": {"a": 5}}),
        "expected a JSON object with weight_map",
    ),
    "an index that is a list": (lambda m: index(m, []), "expected a JSON object with weight_map"),
    "an empty index": (lambda m: index(m, {"weight_map": {}}), "expected a JSON object with weight_map"),
    "an index that leads outside": (
        lambda m: index(m, {"weight_map": {"a": "../x.safetensors"}}),
        "names of files in this",
    ),
    "pickled weights only": (lambda m: rename(m, "pytorch_model.bin"), "pickled files are not read"),
    "an adapter": (lambda m: (m / "adapter_config.json").write_text("{}"), "merge the adapter"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_files_of_which_it_is_not_clear_which_hold_the_model_are_refused(
    kind: str, kept: dict[bool, Path], tmp_path: Path
) -> None:
    change, match = LAYOUTS[kind]
    model = edited(kept, tmp_path, lambda tensors: tensors)
    change(model)
    both_refuse(model, match)
    with pytest.raises(UserError, match=match):
        load_head(str(model), "float32", "cpu", False, KEY)


def test_a_quantised_student_is_refused_and_a_quantised_teacher_needs_what_reads_it(
    kept: dict[bool, Path], tmp_path: Path
) -> None:
    model = edited(kept, tmp_path, lambda tensors: tensors)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantised weights"):
        check_fit(str(model), False, "student.model", quantised="refused")
    with pytest.raises(UserError, match="optimum"):
        check_fit(str(model), False, KEY)
    check_fit(str(model), False, KEY, quantised="elsewhere")


def larger_than_memory(kept: dict[bool, Path], folder: Path, rows: int) -> Path:
    """A model whose embedding has so many rows, as a hole of its file: the file is read, and hardly takes disk."""
    model = shutil.copytree(kept[True], folder / "model")
    file, config = model / "model.safetensors", json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, end = json.loads(content[8 : 8 + length]), 0
    for name, tensor in header.items():
        if name != "__metadata__":
            tensor["shape"] = [rows, *tensor["shape"][1:]] if name == EMBEDDING else tensor["shape"]
            tensor["data_offsets"] = [end, end := end + 4 * math.prod(tensor["shape"])]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        new.truncate(8 + len(text) + end)
    return model


def blames_memory(model: Path, read: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        read()
    told = str(caught.value)
    assert told.startswith(f"{KEY}: found {model}") and "for which the system refuses memory" in told
    assert re.search(r"llocate memory.*; address space \(ulimit -v\) \S+( GB)?, vm.overcommit_memory \w+\), ", told)
    assert "expected room for the whole file" in told and "max_shard_size" in told
    return told


def test_a_file_larger_than_memory_is_checked_and_where_it_is_loaded_memory_is_blamed(
    kept: dict[bool, Path], tmp_path: Path
) -> None:
    model = larger_than_memory(kept, tmp_path, 30_000_000_000)
    assert (model / "model.safetensors").stat().st_size > 3.8e12
    check_fit(str(model), False, KEY)
    if OVERCOMMIT.read_text().strip() == "0":  # 1 grants any map
        blames_memory(model, lambda: load_model(str(model), "float32", "cpu", False, KEY))


def test_under_a_limit_on_address_space_the_limit_is_blamed_and_no_checkpoint_is_called_damaged(
    kept: dict[bool, Path], tmp_path: Path
) -> None:
    model = larger_than_memory(kept, tmp_path, 100_000_000)
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 4_000_000_000
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        told = blames_memory(model, lambda: check_fit(str(model), False, KEY))
        assert f"(ulimit -v) {most / 1e9:.1f} GB" in told
        blames_memory(model, lambda: load_head(str(model), "float32", "cpu", False, KEY))
        with pytest.raises(UserError, match="the system refuses memory"):
            _torn_tensors(model)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
