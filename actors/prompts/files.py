"""Reads records: JSON lines, Parquet, data sets of Hugging Face (a hub name, also as a stream, a directory of data files,
`save_to_disk`), and what a function of the user's own yields (own_records.py).
"""

from __future__ import annotations

import glob
import gzip
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from actors.config import SourceConfig
from actors.data.hub import hub_errors
from actors.data.models import as_user_error, looks_local
from actors.errors import UserError
from actors.prompts.own_records import own_records
from actors.prompts.record_batches import READABLE, Batch, Lines, Records, Rows, plain_row

BATCH = 1024
"""Records that are read, and tokenised, at a time."""

SAVED_DATASET, SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"
"""The file by which `Dataset.save_to_disk` and `DatasetDict.save_to_disk` are known."""


LINES, FILES = (".jsonl", ".jsonl.gz", ".jsonl.zst"), "an existing .jsonl or .parquet file"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
"""How compressed files begin, whatever they are called."""


FORMATS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".arrow")
"""Endings of data files in a directory, but for those of COMPRESSED; `datasets` reads JSON and JSON lines alike."""
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
DESCRIPTIONS = ("config.json", "dataset_infos.json", SAVED_DATASET, SAVED_SPLITS)
"""Files of a data set that hold no records."""
SHOWN = 3
"""Names of files in a message."""


def files_of(source: SourceConfig, key: str) -> list[SourceConfig]:
    """The source, or, where its path is a pattern or a directory with .jsonl.zst, one for each file, in the order of their names.

    UserError: no file matches the pattern; or a directory whose data files would be read in part.
    """
    if source.path is not None and Path(source.path).expanduser().is_dir() and not source.streaming:
        return _of_directory(source, key)
    if source.path is None or not is_pattern(source.path):
        return [source]
    found = sorted(
        name for name in glob.glob(str(Path(source.path).expanduser()), recursive=True) if Path(name).is_file()
    )
    if not found:
        raise UserError(f"{key}.path", source.path, f"a pattern that files match (from {Path.cwd()})")
    return [replace(source, path=name) for name in found]


def _of_directory(source: SourceConfig, key: str) -> list[SourceConfig]:
    """A directory as one source; or the files of its split, where `datasets` would need another library to read them.

    UserError: it holds files of several formats, or files of no split. `datasets` would read only some of them.
    """
    path = Path(os.path.realpath(Path(str(source.path)).expanduser()))
    if any((path / name).is_file() for name in (SAVED_DATASET, SAVED_SPLITS)) or _names_its_files(path / "README.md"):
        return [source]
    there = _data_files(path)
    formats = Counter(map(_format, there))
    if len({".json" if one in (".jsonl", ".ndjson") else one for one in formats}) > 1:
        found = f"{source.path} with {', '.join(f'{count} {one}' for one, count in sorted(formats.items()))} files"
        patterns = [_pattern(source, there, one) for one in (".jsonl", ".parquet") if one in formats]
        way_out = f"; or a pattern such as {' or '.join(patterns)}" if patterns else ""
        raise UserError(f"{key}.path", found, f"data files of one format, so that none is left out{way_out}")
    splits = _splits(path)
    if outside := sorted(set(there).difference(*splits.values())):
        names = ", ".join(str(name.relative_to(path)) for name in outside[:SHOWN])
        found = f"{source.path}, {len(outside)} of whose {len(there)} data files are in no split ({names}{', …' if len(outside) > SHOWN else ''})"
        expected = f"files that are all in splits ({', '.join(splits)}), or a pattern such as {_pattern(source, there)}"
        raise UserError(f"{key}.path", found, expected)
    if not any(name.suffix == ".zst" for name in there) or not all(name.name.endswith(LINES) for name in there):
        return [source]
    if source.split not in splits:
        raise UserError(f"{key}.split", source.split, f"a split of {source.path}: {', '.join(splits)}", splits)
    return [replace(source, path=str(name), split="train") for name in sorted(splits[source.split])]


def _names_its_files(card: Path) -> bool:
    """Whether a directory's README.md says which files are read, as those of data sets on the hub may."""
    if not card.is_file():
        return False
    _, *parts = re.split(r"^---\s*$", card.read_text("utf-8", "replace"), maxsplit=2, flags=re.MULTILINE)
    return len(parts) == 2 and re.search(r"^configs:", parts[0], re.MULTILINE) is not None


def _data_files(path: Path) -> list[Path]:
    """The data files at any depth, in the order of their names, without hidden ones."""
    return sorted(
        name
        for name in path.rglob("*")
        if _format(name) in FORMATS
        and name.name not in DESCRIPTIONS
        and not any(part.startswith((".", "__")) for part in name.relative_to(path).parts)
        and name.is_file()
    )


def _format(name: Path) -> str:
    return (name.with_suffix("") if name.suffix in COMPRESSED else name).suffix


def _pattern(source: SourceConfig, names: list[Path], ending: str | None = None) -> str:
    """A pattern for files as the first of this format (None: of any), for messages."""
    first = next(name for name in names if ending in (None, _format(name)))
    return f"{source.path}/**/*{_format(first)}{first.suffix if first.suffix in COMPRESSED else ''}"


def _splits(path: Path) -> dict[str, list[Path]]:
    """Split -> its files, as `datasets` tells them from the names of files and directories; {}: it finds none."""
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        found = DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
    except (EmptyDatasetError, FileNotFoundError):
        return {}
    return {str(split): [Path(name) for name in names] for split, names in found.items()}


def read_records(
    source: SourceConfig, key: str, fields: list[tuple[str, str]], optional: list[str] | None
) -> tuple[str, Iterator[Batch]]:
    """("line", "row" or "record", the first `source.limit` records in batches); the word is used in messages.

    key: the source's configuration key. fields: (configuration key, field) of each field that every record needs.
    optional: fields that records may have; None: all of theirs. UserError: the file is missing, of another kind or broken,
    or lacks a field.
    """
    if source.function is not None:
        return "record", _batches(own_records(source.function, source.function_arguments, source.limit, key))
    name = source.path or ""
    path = Path(name).expanduser()
    if source.streaming:
        return "row", _batches(_numbered(_streamed(source, key, fields, optional), name, key))
    if path.is_dir() or is_hub_dataset(name):
        return "row", _rows(_dataset(path, source, key, fields, optional), name, key, source.limit)
    if path.exists() and not path.is_file():
        raise UserError(f"{key}.path", f"{path}, which is neither a regular file nor a directory", FILES)
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*")]
        raise UserError(f"{key}.path", path, f"{FILES} (from {Path.cwd()})", near)
    if source.split != "train":
        raise UserError(f"{key}.split", source.split, f"nothing: {name} is a single file, which has no splits")
    if path.name.endswith(LINES):
        return "line", _jsonl(path, source.limit)
    if path.suffix != ".parquet":
        expected = "a .jsonl or .parquet file (.jsonl.gz and .jsonl.zst too), or the name of a dataset"
        raise UserError(f"{key}.path", name, expected)
    return "row", _rows(_parquet(path, fields, optional), name, key, source.limit)


def is_pattern(name: str) -> bool:
    """Whether a path stands for all files that match it."""
    return any(character in name for character in "*?[") and not Path(name).expanduser().exists()


def is_hub_dataset(name: str) -> bool:
    """Whether `prompts.path` is the name of a data set on the hub: no file, no directory, and nothing like a path."""
    path = Path(name).expanduser()
    known = name.endswith((*LINES, ".parquet")) or is_pattern(name)
    return not known and not path.exists() and not looks_local(name)


def field_of(record: dict[str, Any], name: str, where: str, key: str) -> Any:
    """The field of a record. UserError: it has none, with the nearest of those that are there."""
    if name not in record:
        raise UserError(key, name, f"a field of {where} ({', '.join(record)})", record)
    return record[name]


def _jsonl(path: Path, limit: int | None) -> Iterator[Batch]:
    with path.open("rb") as start:
        begins = start.read(4)
    kind = "gzip" if begins.startswith(GZIP) else "zstd"
    seen = found = 0
    with _opened(path, begins) as file:
        while limit is None or found < limit:
            with as_user_error(str(path), f"{kind} data that is broken", "a whole file"):
                lines = list(islice(file, BATCH if limit is None else min(BATCH, limit - found)))
            if not lines:
                return
            places = [place for place, line in enumerate(lines) if not line.isspace()]
            if places:
                yield Lines(str(path), [seen + 1 + place for place in places], [lines[place] for place in places])
            seen, found = seen + len(lines), found + len(places)


def _opened(path: Path, begins: bytes) -> Any:
    """The file's lines, decompressed."""
    if begins.startswith(GZIP):
        return gzip.open(path)
    if begins.startswith(ZSTD):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    return path.open("rb")


def _columns(names: list[str], path: str, fields: list[tuple[str, str]], optional: list[str] | None) -> list[str]:
    """The columns to read. UserError: one of those that are needed is not among `names`."""
    for key, name in fields:
        field_of(dict.fromkeys(names), name, path, key)
    others = names if optional is None else [name for name in optional if name in names]
    wanted = list(dict.fromkeys([*(name for _, name in fields), *others]))
    for name in wanted:
        if names.count(name) > 1:
            raise UserError(path, f"{names.count(name)} columns called {name}", "one")
    return wanted


def _parquet(path: Path, fields: list[tuple[str, str]], optional: list[str] | None) -> Iterator[Any]:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    yield from file.iter_batches(BATCH, columns=_columns(file.schema_arrow.names, str(path), fields, optional))


def _dataset(
    path: Path, source: SourceConfig, key: str, fields: list[tuple[str, str]], optional: list[str] | None
) -> Iterator[Any]:
    import datasets

    datasets.disable_progress_bars()
    if path.is_dir() and any((path / name).is_file() for name in (SAVED_DATASET, SAVED_SPLITS)):
        found = _saved(datasets.load_from_disk(str(path)), source.split, key)
    else:
        # A directory of data files has no revision: `pin` refuses one.
        name, subset = (str(path), None) if path.is_dir() else _on_hub(source, key)
        with _split_errors(source, key):
            found = datasets.load_dataset(name, subset, split=source.split, revision=source.revision)
    columns = _columns(found.column_names, str(source.path), fields, optional)
    yield from found.select_columns(columns).with_format("arrow").iter(BATCH)


def _on_hub(source: SourceConfig, key: str) -> tuple[str, str | None]:
    """Name and subset of a data set on the hub. UserError: the hub does not know it, or does not answer."""
    from huggingface_hub import HfApi, is_offline_mode

    name, _, subset = str(source.path).partition(":")
    if not is_offline_mode():
        # Fails at once if the hub does not answer; load_dataset would retry for half a minute.
        with hub_errors(f"{key}.path", name, source.revision, others=False):
            HfApi().repo_info(name, repo_type="dataset", revision=source.revision)
    return name, subset or None


@contextmanager
def _split_errors(source: SourceConfig, key: str) -> Iterator[None]:
    """UserError for a split that the data set has not. `datasets` raises ValueError, with the names in its message."""
    try:
        yield
    except ValueError as error:
        told = re.match(
            r"(?:Unknown split .*?Should be one of|Bad split: .*?Available splits:) \[(.*)\]", str(error), re.DOTALL
        )
        if told is None:
            raise
        names = re.findall(r"[\w.]+", told[1].replace("NamedSplit", ""))
        raise UserError(f"{key}.split", source.split, f"a split of {source.path}: {', '.join(names)}", names) from error


def _streamed(
    source: SourceConfig, key: str, fields: list[tuple[str, str]], optional: list[str] | None
) -> Iterator[dict[str, Any]]:
    """The first rows of a data set on the hub, at its commit. Its files are read as far as they are needed."""
    if not is_hub_dataset(str(source.path)):
        expected = f"false: {source.path} is on a disk, and only data sets on a hub are streamed"
        raise UserError(f"{key}.streaming", "true", expected)
    import datasets

    name, subset = _on_hub(source, key)
    with _split_errors(source, key):
        found = datasets.load_dataset(name, subset, split=source.split, revision=source.revision, streaming=True)
    if found.column_names is not None:
        found = found.select_columns(_columns(found.column_names, name, fields, optional))
    yield from found.take(source.limit)


def _saved(found: Any, split: str, key: str) -> Any:
    """The split of what `save_to_disk` wrote. A single data set is one split; it need not be called `train`."""
    if isinstance(found, dict):
        if split not in found:
            raise UserError(f"{key}.split", split, f"a split that was saved: {', '.join(found)}", found)
        return found[split]
    if split not in ("train", str(found.split)):
        raise UserError(f"{key}.split", split, f"{found.split or 'train'}: a single data set was saved", [])
    return found


def _rows(tables: Iterator[Any], path: str, key: str, limit: int | None) -> Iterator[Batch]:
    with as_user_error(f"{key}.path", path, READABLE):
        number = 1
        for table in tables:
            rows = Rows(key, path, number, table)
            number += len(rows)
            if limit is not None and number > limit:
                yield rows[: len(rows) - (number - 1 - limit)]
                return
            yield rows


def _batches(numbered: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[Batch]:
    while batch := list(islice(numbered, BATCH)):
        yield Records(batch)


def _numbered(records: Iterator[dict[str, Any]], path: str, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with as_user_error(f"{key}.path", path, READABLE):
        for number, record in enumerate(records, 1):
            yield number, plain_row(record)
