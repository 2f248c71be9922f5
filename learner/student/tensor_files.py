"""Writes the learner's tensors as safetensors in a background thread, and reads them back by rows.

A save copies the tensors to host memory; training waits for this copy only, and a thread writes it to disk. All ranks
write one file: a tensor's rows are contiguous in it, so each rank writes its rows at their offset, and nothing is gathered.
Any number of ranks can read the file.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict, revert_weight_conversion

from actors.data.weight_files import opened
from actors.errors import CheckpointError, DiskFullError, is_full_disk
from actors.weights.buckets import Deferred
from learner.student.checksums import hash_of
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
"""The dtypes' names in a safetensors file."""


class BackgroundWrite:
    """Runs writes in a thread, one at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Waits for the write before, then starts this one. CheckpointError: the write before failed, for any reason."""
        self._finish()
        self._under_way = self._thread.submit(write)

    def done(self) -> bool:
        """Whether no write is running. CheckpointError: the last write failed; raised once."""
        if self._under_way is not None and not self._under_way.done():
            return False
        self._finish()
        return True

    def good(self) -> bool:
        """Waits for the write that is running; whether there was one, and it is well. A failure is raised later still."""
        return self._under_way is not None and self._under_way.exception() is None

    def _finish(self) -> None:
        write, self._under_way = self._under_way, None
        try:
            if write is not None:
                write.result()
        except (
            Exception
        ) as error:  # of any kind: the weights are whole, and a learner that starts anew would fail again
            raise checkpoint_error(error) from error


def checkpoint_error(error: Exception) -> CheckpointError:
    """The error of a save that failed, with the whole message: the learner itself is well."""
    if isinstance(error, CheckpointError):
        return error
    if isinstance(error, OSError):
        kind = DiskFullError if is_full_disk(error) else CheckpointError
        return kind(f"{error.strerror or error} ({error.filename or 'while writing'})")
    return CheckpointError(f"{type(error).__name__}: {' '.join(str(error).split())}")


@dataclass(frozen=True, slots=True)
class Rows:
    """A copy of this rank's rows of a tensor, or of all its rows, or of none."""

    shape: tuple[int, ...]
    """Shape of the tensor with the rows of all ranks."""
    first: int
    """Index of the first row in `values`."""
    values: torch.Tensor
    """[rows, ...] contiguous, on the CPU."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor with the rows of all ranks."""
        return torch.Size(self.shape).numel() * self.values.element_size()


def model_tensors(
    model: PreTrainedModel,
    ranks: Ranks | None = None,
    merged: Iterable[tuple[str, torch.Tensor | Deferred]] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of model.safetensors, with the names and shapes of `save_pretrained`; tied tensors once.

    merged: (name, weight) of a model with adapters, instead of the model's own tensors. With several ranks each returns
    its rows, without communication. Exception: if the file's tensors differ from those in memory (`merged`, or experts
    that are one tensor in memory and one file entry each), all ranks gather them in turn, and only rank 0 returns them.
    """
    if merged is not None:
        return _on_first_rank(model, ranks or Ranks(), merged)
    state = model.state_dict(keep_vars=True)
    # transformers finds tied tensors by their storage, which a sharded tensor does not expose. So each tensor gets a
    # stand-in, the same one under all its names.
    stand_in_of: dict[int, torch.Tensor] = {}
    stand_ins = {name: stand_in_of.setdefault(id(tensor), torch.zeros(1)) for name, tensor in state.items()}
    state = {name: state[name].detach() for name in remove_tied_weights_from_state_dict(stand_ins, model)}
    if ranks is not None and ranks.sharded:
        # Converting tensors without memory shows whether the file has the same tensors as the model.
        shapes = {name: torch.empty(tensor.shape, device="meta") for name, tensor in state.items()}
        if revert_weight_conversion(model, shapes).keys() == state.keys():
            return state
        return _on_first_rank(model, ranks, state.items())
    return revert_weight_conversion(model, state)


def _on_first_rank(
    model: PreTrainedModel, ranks: Ranks, named: Iterable[tuple[str, torch.Tensor | Deferred]]
) -> dict[str, torch.Tensor]:
    """The tensors in the file's layout on rank 0, nothing on the others; gathered one at a time. A collective."""
    found = {}
    for name, tensor in named:
        gathered = tensor.full_tensor() if isinstance(tensor, Deferred) else full_tensor(tensor)
        if ranks.rank == 0:
            found[name] = gathered.cpu()
    return revert_weight_conversion(model, found) if found else found


def copies(
    tensors: Mapping[str, torch.Tensor],
    ranks: Ranks | None = None,
    host_values: Callable[[torch.Tensor], torch.Tensor | None] = lambda _: None,
) -> dict[str, Rows]:
    """Copies this rank's rows of each tensor to host memory; none of those that another copy of the weights writes.

    host_values: tensor -> its values if they are already in host memory (offloaded moments), else None.
    """
    found = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        own, first = own_rows(tensor.detach())
        if ranks is not None and isinstance(tensor, DTensor) and not ranks.writes(number):
            found[name] = Rows(tuple(tensor.shape), first, torch.empty(0, dtype=own.dtype))
            continue
        offloaded = host_values(tensor)
        values = (own if offloaded is None else offloaded).to("cpu", copy=True).contiguous()
        found[name] = Rows(tuple(tensor.shape), first, values)
    return found


def dtype_of(tensors: Mapping[str, Rows]) -> str:
    """The dtype that most bytes of these tensors have, for example "float32"; "float32" without tensors."""
    nbytes: Counter[str] = Counter()
    for rows in tensors.values():
        nbytes[str(rows.values.dtype).removeprefix("torch.")] += rows.nbytes
    return nbytes.most_common(1)[0][0] if nbytes else "float32"


def sample(tensors: Mapping[str, torch.Tensor], most_bytes: int | None) -> dict[str, torch.Tensor]:
    """The smallest tensors, of at most so many bytes together, and at least one of each dtype. None: all.

    For a trial of a save that must not take the time of a whole one. Every rank takes the same.
    """
    if most_bytes is None:
        return dict(tensors)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].numel(), item[0])):
        most_bytes -= tensor.numel() * tensor.element_size()
        if most_bytes >= 0 or all(tensor.dtype != other.dtype for other in found.values()):
            found[name] = tensor
    return found


def write_tensors(path: Path, tensors: Mapping[str, Rows], *, begin: bool = True) -> list[tuple[int, int, str]]:
    """Writes a safetensors file: 8 bytes with the header's length, the header in JSON, the data.

    Returns (offset, bytes, checksum) of each piece that it wrote, hashed in memory (checksums.py).

    Several ranks may write one file at once: each passes its rows of the same tensors, and one of them has `begin`, with
    which it also writes the header. OSError: the file cannot be written.
    Source: the section Format of https://github.com/huggingface/safetensors.
    """
    # Not safetensors' `save_file`, which holds the GIL while it writes: training would stand still for that time.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # Largest elements first, so that every tensor is aligned to its element size. Every rank computes the same offsets.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].values.element_size(), item[0]))
    offset = 0
    for name, rows in ordered:
        end = offset + rows.nbytes
        header[name] = {"dtype": DTYPES[rows.values.dtype], "shape": list(rows.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    # Without O_TRUNC: another rank may have written its rows already.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), "wb", buffering=0) as file:
        end = file.write(text) if begin else 0
        pieces = [(0, len(text), hash_of(text))] if begin else []
        for name, rows in ordered:
            place = header[name]["data_offsets"][0] + len(text)
            if rows.first:
                place += rows.first * (rows.nbytes // rows.shape[0])
            if place != end:
                file.seek(place)
            data = rows.values.reshape(-1).view(torch.uint8).numpy().data
            end = place + len(data)
            if len(data):
                pieces.append((place, len(data), hash_of(data)))
            while len(data):  # one call of an unbuffered file may write only a part
                data = data[file.write(data) :]
    return pieces


class StoredTensors:
    """A safetensors file, from which each rank reads its own rows of one tensor at a time."""

    def __init__(self, path: Path):
        self._file = opened(path, "pt")
        self._names = set(self._file.keys())

    def __len__(self) -> int:
        return len(self._names)

    def like(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The stored tensor of this name, on the device of `tensor` and sharded like it. KeyError: it is not in the file."""
        if name not in self._names:
            raise KeyError(name)
        if not isinstance(tensor, DTensor):
            return self._file.get_tensor(name).to(tensor.device)
        own, first = own_rows(tensor)
        stored = self._file.get_slice(name)
        rows = (stored[first : first + len(own)] if len(own) else stored[:0]).to(own.device)
        return DTensor.from_local(
            rows, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
