"""Columns of many prompts on the disk, so that the next start maps them into memory instead of reading the records again.

An entry is a directory, `<cache>/prompts/<digest>`: a file for each column, and HEADER, which says what they are and has their
checksums. The digest is of everything that the columns depend on: the contents of the files (not their paths and times, under
which there may be others without a word), the tokenizer with its chat template, the configuration, the libraries, and the code.
An entry is written beside its place and renamed, so it is whole or not there; processes that begin together write one each, and
keep the first. Nothing is ever deleted but damaged entries: users do (docs/data.md).
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

import numpy as np
import xxhash

from actors.config import SourceConfig
from actors.data.hub import COMMIT
from actors.heartbeat import beat
from actors.prompts.files import is_hub_dataset
from actors.prompts.parts import PartMaker
from actors.prompts.spool import MANY, Spool

VARIABLE = "UNDERSTUDY_CACHE"
"""Names the cache's directory, in place of `understudy` in XDG_CACHE_HOME or ~/.cache."""
HEADER = "columns.json"
PARTIAL, LEFT_SECONDS = ".partial", 24 * 3600
READ_BYTES = 4 << 20
LEAST_BYTES = 1 << 20
"""Files of fewer bytes in all are read at once; nothing is kept of them."""
OUTSIDE = (
    *("path", "revision", "streaming", "weight", "sources"),
    *("max_prompt_tokens", "too_long", "duplicates", "shuffle", "keep", "margin", "curriculum"),
)
"""Keys of prompts on which the columns do not depend, or by the contents of the files only."""
LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow", "datasets")
CODE = (
    *("columns", "files", "parts", "record_batches", "responses", "spool", "texts"),
    *("../data/messages", "../json_files"),
)
"""Modules that make the columns, by their places from here."""


class Damaged(Exception):
    """An entry whose files are not those that were written."""


class SourceFile(NamedTuple):
    """One file, data set or function of a source."""

    key: str
    """Configuration key of the source."""
    source: SourceConfig
    file: SourceConfig


class Span(NamedTuple):
    """Consecutive prompts that are from one file."""

    file: int
    """Its number."""
    unit: str
    """What it is counted in, for messages: line, row or record."""
    rows: int
    """How many they are."""


class Columns(NamedTuple):
    """All prompts, and where they are from."""

    arrays: dict[str, np.ndarray]
    domains: list[str | None]
    """The values that the column `domains` has the places of."""
    origins: list[Span]


@dataclass(frozen=True)
class Entry:
    """The place of some prompts in the cache."""

    directory: Path
    stamps: tuple[Any, ...]
    """Of the files when their contents were read: other ones mean that somebody has written to them since."""

    def opened(self) -> Columns | None:
        """The columns, mapped into memory; None: they are not there. Damaged: something else is."""
        if not self.directory.exists():
            return None
        try:
            header = json.loads((self.directory / HEADER).read_text("utf-8"))
            content = header["content"]
            if _digest(content) != header["xxh3_128"]:
                raise Damaged(f"{self.directory / HEADER} has another checksum")
            for name, (_, _, checksum) in content["columns"].items():
                if checksum_of(self.directory / name) != checksum:
                    raise Damaged(f"{self.directory / name} has another checksum")
            return self._mapped(content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{self.directory} cannot be read ({type(error).__name__}: {error})") from error

    def spool(self) -> Spool:
        """For the rows, in files beside the entry's place. Those of processes that were killed are deleted after a day."""
        with suppress(OSError):
            # By the clock of the file system, which other machines may share.
            os.utime(self.directory.parent)
            now = self.directory.parent.stat().st_mtime
            for left in self.directory.parent.glob(f"*{PARTIAL}"):
                if now - left.stat().st_mtime > LEFT_SECONDS:
                    rmtree(left, ignore_errors=True)
        return Spool(self.directory.with_name(f"{self.directory.name}.{socket.gethostname()}.{os.getpid()}{PARTIAL}"))

    def keep(self, spool: Spool, origins: Sequence[Span]) -> Columns | None:
        """Puts the files of a spool in their place; returns their columns. None: it cannot be, and all is in memory.

        Where another process was first, its entry stays.
        """
        spool.flush()
        if spool.directory is None:
            return None
        columns = {name: [one.dtype, one.length, one.digest.hexdigest()] for name, one in spool.files.items()}
        content = {"columns": columns, "domains": spool.domains, "origins": list(map(list, origins))}
        try:
            if self.stamps == _stamps(path for path, *_ in self.stamps):
                header = json.dumps({"xxh3_128": _digest(content), "content": content})
                (spool.directory / HEADER).write_text(header, "utf-8")
                return self._put(spool.directory, content)
            cause = "a file of prompts has changed while it was read"
        except OSError as error:
            cause = f"{type(error).__name__}: {error}"
        spool.take_back(cause)
        return None

    def _put(self, directory: Path, content: Any) -> Columns:
        try:
            directory.rename(self.directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            with suppress(Damaged):
                if (first := self.opened()) is not None:
                    rmtree(directory, ignore_errors=True)
                    return first
            rmtree(self.directory)
            directory.rename(self.directory)
        return self._mapped(content)

    def _mapped(self, content: Any) -> Columns:
        arrays = {
            name: _array(self.directory / name, dtype, length)
            for name, (dtype, length, _) in content["columns"].items()
        }
        return Columns(arrays, content["domains"], [Span(*one) for one in content["origins"]])


def entry_of(maker: PartMaker, files: Sequence[SourceFile]) -> Entry | None:
    """The place of these prompts in the cache. None: nothing is kept of them, because they are few, nothing but reading them
    tells what they are (a function, a branch on a hub), or code that comes with the model makes their tokens.
    """
    limits = {one.key: one.source.limit for one in files}
    if not is_plain(maker.reader.tokenizer) or sum(limit or MANY for limit in limits.values()) < MANY:
        return None
    try:
        contents = [_contents(one.file) for one in files]
        sizes = [sum(path.stat().st_size for path, _ in own) for own in contents if isinstance(own, list)]
        if None in contents or (len(sizes) == len(files) and sum(sizes) < LEAST_BYTES):
            return None
        directory = cache_directory()
        paths = [path for own in contents if isinstance(own, list) for path, _ in own]
        stamps = _stamps(paths)
        told = [
            own if isinstance(own, str) else [[name, checksum_of(path)] for path, name in own or ()] for own in contents
        ]
    except (OSError, RuntimeError):  # reading them says what is wrong; or there is no home directory
        return None
    keys = list(limits)
    sources = [[keys.index(one.key), own, _settings(one.file)] for one, own in zip(files, told, strict=True)]
    return Entry(directory / "prompts" / _digest([*_of_reader(maker), sources]), stamps)


def cache_directory() -> Path:
    """Where the cache is. RuntimeError: there is no home directory."""
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "understudy"


def is_plain(tokenizer: Any) -> bool:
    """Whether the tokenizer is one of transformers' own, made of a file that says everything about it."""
    return bool(getattr(tokenizer, "is_fast", False)) and type(tokenizer).__module__.startswith("transformers.")


def checksum_of(path: Path) -> str:
    """xxh3-128 of a file's contents. It is read, not mapped, so that it takes no memory."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
            beat()
    return digest.hexdigest()


def _contents(source: SourceConfig) -> list[tuple[Path, str]] | str | None:
    """(path, name) of the files whose contents are the records; or a data set at a commit of a hub; None: it has no name."""
    if source.path is None:
        return None
    path = Path(source.path).expanduser()
    if path.is_file():
        return [(path, path.suffix if path.suffix == ".parquet" else "")]
    if path.is_dir():
        found = [Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names]
        return [(one, str(one.relative_to(path))) for one in sorted(found)]
    at = source.revision or ""
    return f"{source.path}@{at}" if is_hub_dataset(source.path) and COMMIT.fullmatch(at) else None


def _stamps(paths: Iterable[Path]) -> tuple[Any, ...]:
    found = ((path, path.stat()) for path in paths)
    return tuple((path, own.st_ino, own.st_size, own.st_mtime_ns) for path, own in found)


def _of_reader(maker: PartMaker) -> list[Any]:
    """Everything besides the records that the columns depend on."""
    reader = maker.reader
    tokenizer: Any = reader.tokenizer
    files = ("tokenizer_object", "name_or_path")
    made_with = {
        name: value for name, value in tokenizer.init_kwargs.items() if name not in files and not name.endswith("_file")
    }
    room = Path(__file__).parent
    return [
        [f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}", tokenizer.backend_tokenizer.to_str()],
        [tokenizer.chat_template, tokenizer.special_tokens_map, made_with],
        [_settings(reader.section), reader.template, maker.keep_records, maker.ends],
        {name: version(name) for name in LIBRARIES},
        {name: checksum_of(room / f"{name}.py") for name in CODE},
    ]


def _settings(section: SourceConfig) -> dict[str, Any]:
    return {item.name: getattr(section, item.name) for item in dataclasses.fields(section) if item.name not in OUTSIDE}


def _digest(content: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, default=str).encode())


def _array(path: Path, dtype: str, length: int) -> np.ndarray:
    if not length:  # nothing can be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r", shape=(length,)).view(np.ndarray)
