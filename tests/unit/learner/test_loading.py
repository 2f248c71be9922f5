"""A student that is loaded as its files are, and cast later, is the one that is loaded in float32, to the bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.data.models import load_model
from actors.forward.packing import hidden_states, use_packed_attention
from learner.student.build import _as_trained, computed_in_float32
from tests.tiny_architectures import ARCHITECTURES, make_architecture


def in_bfloat16(path: Path) -> str:
    """The model directory, with its weights in bfloat16."""
    file = path / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return str(path)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "qwen3_moe"])
def test_cast_later_is_loaded_in_float32(name: str, tmp_path: Path) -> None:
    path = in_bfloat16(make_architecture(tmp_path / name, *ARCHITECTURES[name]))
    expected = load_model(path, "float32", "cpu", False, "student.model")
    stored = load_model(path, None, "cpu", False, "student.model")
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    tokens, lengths = np.arange(12) % 50, np.array([12])
    wanted = hidden_states(expected.base_model, tokens, lengths, "cpu")
    with torch.no_grad(), computed_in_float32(stored):
        before = hidden_states(stored.base_model, tokens, lengths, "cpu")
        assert use_packed_attention(stored) == use_packed_attention(expected)
    assert before.dtype == torch.float32 and torch.equal(before, wanted)
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    _as_trained(stored, "cpu", torch.float32)
    for (key, tensor), (other, same) in zip(
        [*stored.named_parameters(), *stored.named_buffers()],
        [*expected.named_parameters(), *expected.named_buffers()],
        strict=True,
    ):
        assert key == other and tensor.dtype == same.dtype and torch.equal(tensor, same), key


def test_files_of_other_dtypes_are_loaded_in_float32(tmp_path: Path) -> None:
    path = make_architecture(tmp_path / "mixed", *ARCHITECTURES["llama"])
    file = path / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    for other in (torch.float16, torch.float32):
        save_file(
            {**{n: t.bfloat16() for n, t in tensors.items()}, name: tensors[name].to(other)}, file, {"format": "pt"}
        )
        model = load_model(str(path), None, "cpu", False, "student.model")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
