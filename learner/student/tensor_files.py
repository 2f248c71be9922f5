"""How the learner writes its tensors while it goes on: it copies them, and a thread writes the copies as safetensors.

The file holds whole tensors, however many ranks write it: rows of a tensor lie one after the other in it, so each rank
writes the rows that it holds into their place, and nothing is ever gathered. Any number of ranks reads them.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict, revert_weight_conversion

from actors.errors import CheckpointError
from actors.weights.buckets import Deferred
from learner.student.sharding import Ranks, full_tensor, own_rows

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


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a tensor, or all of it, in this process's memory."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    first: int
    """Number of the first of these rows."""
    values: torch.Tensor
    """[rows, ...] contiguous, on the CPU."""

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return torch.Size(self.shape).numel() * self.values.element_size()


def model_tensors(
    model: PreTrainedModel,
    ranks: Ranks | None = None,
    merged: Iterable[tuple[str, torch.Tensor | Deferred]] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of a model directory as `save_pretrained` names and lays them out, one of each that is tied.

    With several ranks, each has its rows. But where a checkpoint has other tensors than the model in memory (experts
    one by one, or `merged` with adapters), they are gathered in turn on the first rank, which alone returns them.
    """
    if merged is not None:
        return _on_first_rank(model, ranks or Ranks(), merged)
    state = model.state_dict(keep_vars=True)
    places: dict[int, torch.Tensor] = {}  # which are one, transformers tells by where they lie, and rows lie anywhere
    stand_ins = {name: places.setdefault(id(tensor), torch.zeros(1)) for name, tensor in state.items()}
    state = {name: state[name].detach() for name in remove_tied_weights_from_state_dict(stand_ins, model)}
    if ranks is not None and ranks.size > 1:
        shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in state.items()}
        if revert_weight_conversion(model, shapes).keys() == state.keys():
            return state
        return _on_first_rank(model, ranks, state.items())
    return revert_weight_conversion(model, state)


def _on_first_rank(
    model: PreTrainedModel, ranks: Ranks, named: Iterable[tuple[str, torch.Tensor | Deferred]]
) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in named:
        one = tensor.full_tensor() if isinstance(tensor, Deferred) else full_tensor(tensor)
        if ranks.rank == 0:
            found[name] = one.cpu()
    return revert_weight_conversion(model, found) if found else found


def copies(
    tensors: Mapping[str, torch.Tensor], in_host: Callable[[torch.Tensor], torch.Tensor | None] = lambda _: None
) -> dict[str, Rows]:
    """The tensors, or this rank's rows of them, as they are now. in_host: where these values are, if not in the tensor."""
    found = {}
    for name, tensor in tensors.items():
        own, first = own_rows(tensor.detach())
        held = in_host(tensor)
        values = (own if held is None else held).to("cpu", copy=True).contiguous()
        found[name] = Rows(tuple(tensor.shape), first, values)
    return found


def write_tensors(path: Path, tensors: Mapping[str, Rows], *, begin: bool = True) -> None:
    """A safetensors file: 8 bytes with the header's length, the header in JSON, the data.

    Several processes may write one file at once, each the rows that it has, of the same tensors; one of them writes
    its beginning. The library's own `save_file` keeps the interpreter's lock while it writes, and the learner would
    wait as long. Source: the section Format of https://github.com/huggingface/safetensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].values.element_size(), item[0]))  # each one aligned
    offset = 0
    for name, rows in ordered:
        end = offset + rows.nbytes
        header[name] = {"dtype": DTYPES[rows.values.dtype], "shape": list(rows.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "wb", buffering=0) as file:
        end = file.write(text) if begin else 0
        for name, rows in ordered:
            place = header[name]["data_offsets"][0] + len(text)
            if rows.first:
                place += rows.first * (rows.nbytes // rows.shape[0])
            if place != end:
                file.seek(place)
            data = rows.values.reshape(-1).view(torch.uint8).numpy().data
            end = place + len(data)
            while len(data):
                data = data[file.write(data) :]


class StoredTensors:
    """A safetensors file, read tensor by tensor, and of each the rows that are wanted."""

    def __init__(self, path: Path):
        self._file = safe_open(path, "pt")
        self._names = set(self._file.keys())

    def __len__(self) -> int:
        return len(self._names)

    def like(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The stored tensor of this name, on the device and over the ranks as `tensor` is. KeyError: there is none."""
        if name not in self._names:
            raise KeyError(name)
        if not isinstance(tensor, DTensor):
            return self._file.get_tensor(name).to(tensor.device)
        own, first = own_rows(tensor)
        rows = self._file.get_slice(name)[first : first + len(own)].to(own.device)
        return DTensor.from_local(
            rows, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
