"""Checks that a model's safetensors files hold what config.json describes, as their writer meant it.

transformers, vLLM and a server read a doubtful file in different ways: one reads a second head that the others skip, one
starts a missing tensor at random. What is doubtful is refused here, the same for the student and for every teacher.
Reads headers; of tensors only the two ends of a tied model that stores both. `key`: the configuration key of the model.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from actors.errors import UserError
from actors.memory import ROOM, is_refused, limits

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
PACKED = re.compile(r"(^|[._])(weight|qweight|weight_packed|qzeros)$")
"""Names under which the weights of a layer are stored; buffers of integers have others."""
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    dtype: str
    """As safetensors names it, for example "BF16"."""
    shape: tuple[int, ...]


def opened(file: Path | str, framework: Literal["numpy", "pt"]) -> Any:
    """Opens a safetensors file, to read its header or a few of its tensors.

    The tensors are read and not mapped: Linux counts such a map as memory, and refuses one that is larger than all it has.
    """
    from safetensors import safe_open

    return safe_open(file, framework, backend="pread")


class Headers:
    """Stands for `safe_open` in transformers: a file of tensors that have shapes and no memory (device "meta")."""

    def __init__(self, file: Path | str, framework: Literal["numpy", "pt"], **_: Any):
        self._file = opened(file, framework)

    def keys(self) -> list[str]:
        """The tensors' names."""
        return list(self._file.keys())

    def get_slice(self, name: str) -> Any:
        """One of them."""
        import torch
        from transformers.modeling_utils import str_to_torch_dtype

        tensor = self._file.get_slice(name)
        return torch.empty(tensor.get_shape(), dtype=str_to_torch_dtype[tensor.get_dtype()], device="meta")

    def __exit__(self, *_: object) -> None:
        """Called by transformers when it has loaded a model."""
        self._file.__exit__(None, None, None)


@contextmanager
def blaming_memory(key: str, what: object) -> Iterator[None]:
    """UserError that names the limits where the system refuses memory or address space in this context."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_refused(error):
            reason = " ".join(str(error).split())[:200]
            raise UserError(key, f"{what}, for which the system refuses memory ({reason}; {limits()})", ROOM) from error
        raise


def stored_tensors(model_dir: Path | str, key: str) -> dict[str, Stored]:
    """Name -> place of every tensor of a model directory; reads the header of every file.

    UserError: no file, or one is missing, corrupt or truncated; several that contradict each other; an adapter.
    """
    found: dict[str, Stored] = {}
    for file in _files(Path(model_dir), key):
        try:
            # Opening compares the file's size with its header.
            with blaming_memory(key, file), opened(file, "numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is not a dictionary
                    if name in found:  # which of the two is read depends on the reader
                        raise UserError(
                            key, f"{name} in {found[name].file} and in {file.name}", "each tensor in one file"
                        )
                    part = tensors.get_slice(name)
                    found[name] = Stored(file, part.get_dtype(), tuple(part.get_shape()))
        except UserError:
            raise
        except Exception as error:
            raise UserError(key, f"{file} ({type(error).__name__}: {error})", "a whole safetensors file") from error
    return found


def _files(path: Path, key: str) -> list[Path]:
    if (path / "adapter_config.json").is_file():
        raise UserError(key, f"{path} with adapter_config.json", "a whole model: merge the adapter into its weights")
    beside = sorted(file.name for file in path.glob("*.safetensors"))
    index = path / INDEX
    if not index.is_file():
        if not beside and (pickled := sorted(file.name for file in path.glob("*.bin"))):
            raise UserError(
                key,
                f"{path} with {pickled[0]} and without *.safetensors",
                "safetensors, since pickled files are not read: convert them with `save_pretrained`",
            )
        if not beside:
            raise UserError(
                key,
                f"{path} without *.safetensors",
                "a Hugging Face model directory (config.json, safetensors, tokenizer)",
            )
        if WHOLE not in beside:
            raise UserError(
                key, f"{path} with {beside[0]} and no {INDEX}", f"{WHOLE}, or the index that names its parts"
            )
        return [path / WHOLE]
    names = weight_file_names(path, key)
    if absent := [name for name in names if not (path / name).is_file()]:
        raise UserError(key, f"{path} without {absent[0]}", f"every file that {INDEX} names")
    if WHOLE in beside and WHOLE not in names:
        raise UserError(key, f"{path} with {WHOLE} and with {INDEX}, which names other files", "one of the two")
    return [path / name for name in names]


def weight_file_names(path: Path, key: str) -> list[str]:
    """The safetensors files that a model directory should have: those that its index names, or WHOLE without one.

    UserError: an index that cannot be read.
    """
    index = path / INDEX
    if not index.is_file():
        return [WHOLE]
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("names of files in this directory are expected")
    except Exception as error:
        raise UserError(key, f"{index} ({type(error).__name__}: {error})", "a JSON object with weight_map") from error
    return names


def refuse_quantised(path: Path, stored: Mapping[str, Stored], config: Any, key: str) -> None:
    """UserError: the files hold quantised weights, and config.json does not say how to read them."""
    if getattr(config, "quantization_config", None) is not None:
        return
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATS and (tensor.dtype.startswith("F") or (PACKED.search(name) and tensor.shape)):
            raise UserError(
                key,
                f"{path} with {name} of {tensor.dtype} and no quantization_config in config.json",
                "weights of " + ", ".join(FLOATS),
            )


def refuse_misfit(path: Path, report: Mapping[str, Any], network: Any, key: str) -> None:
    """Judges what transformers says of a model that it has loaded. UserError: missing or other weights.

    report: its loading info. A tensor that it did not use is refused where the model has such a module or more such layers:
    the files are then of another model. Else it is left over, as a value head is, and said in a warning.
    """
    if report["mismatched_keys"]:
        name, stored, wanted = sorted(report["mismatched_keys"])[0]
        raise UserError(key, f"{path} with {name} of shape {list(stored)}", f"{list(wanted)}, as config.json says")
    if absent := sorted(report["missing_keys"]):
        head = [name for name in absent if name in _names_of(network, network.get_output_embeddings())]
        tied = ", or tie_word_embeddings: true there if its output layer is the embedding" if head == absent else ""
        raise UserError(
            key, f"{path} without {len(absent)} tensors, first {absent[0]}", f"all weights of config.json{tied}"
        )
    unused = sorted(report["unexpected_keys"])
    modules = {_numberless(name) for name, _ in network.named_modules()}
    if of_the_model := [name for name in unused if _numberless(name).rpartition(".")[0] in modules]:
        raise UserError(
            key,
            f"{path} with {len(of_the_model)} tensors more than config.json describes, first {of_the_model[0]}",
            "the config.json of these weights",
        )
    if unused:
        warnings.warn(
            f"{path} holds {len(unused)} tensors that its config.json has no use for, first {unused[0]}", stacklevel=3
        )


def refuse_two_heads(path: Path, stored: Mapping[str, Stored], network: Any, key: str) -> None:
    """UserError: config.json ties the output layer to the embedding, and the files hold another output layer.

    network: the model, perhaps without memory (device "meta").
    """
    if not getattr(network.config.get_text_config(), "tie_word_embeddings", False):
        return
    embedding, head = (
        next((name for name in _names_of(network, module) if name in stored), None)
        for module in (network.get_input_embeddings(), network.get_output_embeddings())
    )
    if head is None or head == embedding:
        return
    if embedding is None:
        raise UserError(
            key,
            f"{path} with {head} and no embedding, where config.json has tie_word_embeddings: true",
            f"the tensor under the embedding's name, {_names_of(network, network.get_input_embeddings())[0]}",
        )
    if not _equal(stored[embedding].file, embedding, stored[head].file, head):
        raise UserError(
            key,
            f"{path} with {head} that differs from {embedding}, where config.json has tie_word_embeddings: true",
            f"tie_word_embeddings: false in config.json if this is the output layer, or files without {head}",
        )


def _names_of(network: Any, module: Any) -> list[str]:
    """The names under which files may have the weight of a module: with the prefix of the body, and without it."""
    full = [f"{name}.weight" for name, one in network.named_modules() if one is module]
    prefix = f"{getattr(network, 'base_model_prefix', '')}."
    return [*full, *(name.removeprefix(prefix) for name in full if name.startswith(prefix))]


def _equal(file: Path, name: str, other_file: Path, other: str, rows: int = 4096) -> bool:
    import torch

    with opened(file, "pt") as here, opened(other_file, "pt") as there:
        one, two = here.get_slice(name), there.get_slice(other)
        if one.get_shape() != two.get_shape():
            return False
        total = one.get_shape()[0]
        parts = [slice(a, min(a + rows, total)) for a in range(0, total, rows)]
        return all(torch.equal(one[part].double(), two[part].double()) for part in parts)


def _numberless(name: str) -> str:
    return NUMBER.sub("#", f".{name}.")[1:-1]
