"""How the learner writes its tensors while it goes on: it copies them, and a thread writes the copies as safetensors."""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict, revert_weight_conversion

from actors.errors import CheckpointError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Their names in a safetensors file."""


class BackgroundWrite:
    """Writes in a thread, one thing at a time, while its owner goes on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Begins, when the one before has ended. CheckpointError: that one could not be written."""
        self._end()
        self._under_way = self._thread.submit(write)

    def done(self) -> bool:
        """Whether nothing is being written. CheckpointError: it could not be written; said once."""
        if self._under_way is not None and not self._under_way.done():
            return False
        self._end()
        return True

    def _end(self) -> None:
        write, self._under_way = self._under_way, None
        try:
            if write is not None:
                write.result()
        except OSError as error:
            raise CheckpointError(f"{error.strerror or error} ({error.filename or 'while writing'})") from error


def model_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of a model directory as `save_pretrained` names and lays them out, one of each that is tied."""
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(model.state_dict(), model))


def copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as they are now, in this process's memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file of CPU tensors: 8 bytes with the header's length, the header in JSON, the data.

    The library's own `save_file` keeps the interpreter's lock while it writes, and the learner would wait as long.
    Source: the section Format of https://github.com/huggingface/safetensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # each one aligned
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
