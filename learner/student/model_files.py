"""The files of a model directory beside its weights, which every checkpoint holds as they came.

Tokenizer, chat templates, generation defaults, preprocessor, code: a server reads them, and the learner does not change
them, so they are copied and never written anew by a library. Standard library only.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from actors.errors import UserError

WEIGHTS = [
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.gguf",
    "*.ot",
    "*.npz",
    "*.npy",
    "*.tflite",
    "*.pb",
    "*.distcp",
    "*.safetensors.index.json",
    "*.bin.index.json",
    "*.parquet",
    "*.zip",
    "*.tar",
    "*.gz",
]
"""Names of files that hold weights or data, or that say where weights are."""
IN_FOLDERS = (".py", ".jinja")
"""Suffixes of the files in subfolders that are kept: packages of code, and `additional_chat_templates`."""
LARGEST_BYTES = 256 << 20
"""No file of a tokenizer is larger; they are held in memory."""
DEEPEST = 3
"""Levels of subfolders that are looked into."""
CONFIG = "config.json"
DTYPE_KEYS = ("dtype", "torch_dtype")


def read_model_files(directory: Path, key: str) -> dict[str, bytes]:
    """Path within the directory -> content, of every file that is neither weights nor hidden.

    Read once, when the learner starts: the directory may be changed or removed while the campaign runs.
    UserError: a file cannot be read.
    """
    try:
        return {str(path.relative_to(directory)): path.read_bytes() for path in _kept(directory)}
    except OSError as error:
        raise UserError(key, f"{error.filename} ({error.strerror})", "files of the model that can be read") from error


def write_model_files(files: Mapping[str, bytes], directory: Path, dtype: str) -> None:
    """Writes the files. config.json names the dtype of the weights beside it, and is otherwise the same, key by key.

    dtype: name of a torch dtype, for example "float32".
    """
    for name, content in files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(with_dtype(content, dtype) if name == CONFIG else content)


def with_dtype(config: bytes, dtype: str) -> bytes:
    """config.json with another dtype where it has one; byte for byte the same where that is its dtype already."""
    # In the text, not through a parser: order, spaces and numbers stay as they were written.
    text = re.sub(rb'("(?:dtype|torch_dtype)"\s*:\s*)"(?:torch\.)?\w+"', rb'\1"' + dtype.encode() + rb'"', config)
    return text if _only_dtypes_differ(config, text) else config


def _only_dtypes_differ(before: bytes, after: bytes) -> bool:
    return _without_dtypes(json.loads(before)) == _without_dtypes(json.loads(after))


def _without_dtypes(content: object) -> object:
    if isinstance(content, dict):
        return {key: _without_dtypes(value) for key, value in content.items() if key not in DTYPE_KEYS}
    return [_without_dtypes(item) for item in content] if isinstance(content, list) else content


def _kept(directory: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(directory):
        inside = Path(folder).relative_to(directory)
        deep = len(inside.parts) >= DEEPEST
        # A hidden folder is a cache; `__pycache__` is another.
        folders[:] = [] if deep else sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            path = Path(folder, name)
            # A folder of a server's files has code or templates; others (`training`, `original`) hold copies of weights.
            wanted = path.suffix in IN_FOLDERS if inside.parts else not any(map(path.match, WEIGHTS))
            if wanted and not name.startswith(".") and path.is_file() and path.stat().st_size <= LARGEST_BYTES:
                yield path
