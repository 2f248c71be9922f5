"""Reads records: JSON lines, Parquet, and data sets of Hugging Face (a hub name, a directory of data files, `save_to_disk`).

A record is a dictionary of plain values. A field that is null inside a nested value of Arrow is absent: Arrow gives
every struct the fields of all the others.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.config import PromptsConfig
from actors.data.hub import hub_errors
from actors.data.models import as_user_error, looks_local
from actors.errors import UserError

BATCH = 1024
"""Records that are read, and tokenised, at a time."""

SAVED_DATASET, SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"
"""The file by which `Dataset.save_to_disk` and `DatasetDict.save_to_disk` are known."""


def read_records(
    config: PromptsConfig, key: str, fields: list[tuple[str, str]], optional: list[str]
) -> tuple[str, Iterator[tuple[int, dict[str, Any]]]]:
    """("line" or "row", iterator of (number from 1, record)); the word is used in messages.

    key: the section's configuration key. fields: (configuration key, field) of each field that every record needs.
    optional: fields that records may have. UserError: the file is missing, of another kind or broken, or lacks a field.
    """
    path = Path(config.path).expanduser()
    if path.is_dir() or is_hub_dataset(config.path):
        return "row", _arrow_rows(_dataset(path, config, key, fields, optional), config.path, key)
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*")]
        raise UserError(f"{key}.path", path, f"an existing .jsonl or .parquet file (from {Path.cwd()})", near)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return "line", _jsonl(path)
    if path.suffix != ".parquet":
        raise UserError(
            f"{key}.path", config.path, "a .jsonl or .parquet file (.jsonl.gz too), or the name of a dataset"
        )
    return "row", _arrow_rows(_parquet(path, fields, optional), config.path, key)


def is_hub_dataset(name: str) -> bool:
    """Whether `prompts.path` is the name of a data set on the hub: no file, no directory, and nothing like a path."""
    path = Path(name).expanduser()
    return not path.exists() and path.suffix not in (".jsonl", ".parquet") and not looks_local(name)


def field_of(record: dict[str, Any], name: str, where: str, key: str) -> Any:
    """The field of a record. UserError: it has none, with the nearest of those that are there."""
    if name not in record:
        raise UserError(key, name, f"a field of {where} ({', '.join(record)})", record)
    return record[name]


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as start:
        compressed = start.read(2) == b"\x1f\x8b"
    file: Any
    with gzip.open(path) if compressed else path.open("rb") as file:
        lines = enumerate(file, 1)
        while True:
            with as_user_error(str(path), "gzip data that is broken", "a whole file"):
                number, line = next(lines, (0, b""))
            if not number:
                return
            if line.strip():
                yield number, _parsed(line, number, f"{path}, line {number}")


def _parsed(line: bytes, number: int, where: str) -> dict[str, Any]:
    expected = "a JSON object on each line"
    try:
        # A byte-order mark can only be at the start of the file; some editors write one.
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        record = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise UserError(where, f"{line.strip()[:60]!r} ({error})", expected) from error
    if not isinstance(record, dict):
        raise UserError(where, f"{line.strip()[:60]!r}, a JSON {type(record).__name__}", expected)
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # json would keep the last and say nothing
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _columns(names: list[str], path: str, fields: list[tuple[str, str]], optional: list[str]) -> list[str]:
    """The columns to read. UserError: one of those that are needed is not among `names`."""
    for key, name in fields:
        field_of(dict.fromkeys(names), name, path, key)
    wanted = list(dict.fromkeys([*(name for _, name in fields), *(name for name in optional if name in names)]))
    for name in wanted:
        if names.count(name) > 1:
            raise UserError(path, f"{names.count(name)} columns called {name}", "one")
    return wanted


def _parquet(path: Path, fields: list[tuple[str, str]], optional: list[str]) -> Iterator[Any]:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    yield from file.iter_batches(BATCH, columns=_columns(file.schema_arrow.names, str(path), fields, optional))


def _dataset(
    path: Path, config: PromptsConfig, key: str, fields: list[tuple[str, str]], optional: list[str]
) -> Iterator[Any]:
    import datasets
    from huggingface_hub import HfApi, is_offline_mode

    datasets.disable_progress_bars()
    if path.is_dir() and any((path / name).is_file() for name in (SAVED_DATASET, SAVED_SPLITS)):
        found = _saved(datasets.load_from_disk(str(path)), config.split, key)
    else:
        name, _, subset = config.path.partition(":")
        if path.is_dir():
            name, subset = str(path), ""
        elif not is_offline_mode():
            # Fails at once if the hub does not answer; load_dataset would retry for half a minute.
            with hub_errors(f"{key}.path", name, config.revision, others=False):
                HfApi().repo_info(name, repo_type="dataset", revision=config.revision)
        # A directory of data files has no revision: `pin` refuses one.
        found = datasets.load_dataset(name, subset or None, split=config.split, revision=config.revision)
    columns = _columns(found.column_names, config.path, fields, optional)
    yield from found.select_columns(columns).with_format("arrow").iter(BATCH)


def _saved(found: Any, split: str, key: str) -> Any:
    """The split of what `save_to_disk` wrote. A single data set is one split; it need not be called `train`."""
    if isinstance(found, dict):
        if split not in found:
            raise UserError(f"{key}.split", split, f"a split that was saved: {', '.join(found)}", found)
        return found[split]
    if split not in ("train", str(found.split)):
        raise UserError(f"{key}.split", split, f"{found.split or 'train'}: a single data set was saved", [])
    return found


def _arrow_rows(batches: Iterator[Any], path: str, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    expected = "a Parquet file, a directory of data files, or a dataset (owner/name or owner/name:subset) on a hub that answers"
    number = 0
    with as_user_error(f"{key}.path", path, expected):
        for batch in batches:
            for record in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield number, {name: _without_nulls(value) for name, value in record.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
