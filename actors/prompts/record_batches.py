"""Records as they are read, in batches that are decoded apart: that takes more time, and may be done in another process.

A record is a dictionary of plain values. A field that is null inside a nested value of Arrow is absent: Arrow gives
every struct the fields of all the others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from actors.data.models import as_user_error
from actors.errors import UserError

READABLE = (
    "a Parquet file, a directory of data files, or a dataset (owner/name or owner/name:subset) on a hub that answers"
)


class Batch(Protocol):
    """Records of one source, one after the other."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: slice) -> Batch: ...

    def records(self) -> list[tuple[int, dict[str, Any]]]:
        """(number from 1, record) of each. UserError: one is broken."""
        ...


@dataclass(frozen=True)
class Lines:
    """Lines of a file of JSON lines."""

    file: str
    numbers: Sequence[int]
    lines: list[bytes]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, places: slice) -> Lines:
        return Lines(self.file, self.numbers[places], self.lines[places])

    def records(self) -> list[tuple[int, dict[str, Any]]]:
        """See Batch."""
        return [
            (number, _parsed(line, number, f"{self.file}, line {number}"))
            for number, line in zip(self.numbers, self.lines, strict=True)
        ]


@dataclass(frozen=True)
class Rows:
    """Rows of an Arrow table, one after the other."""

    key: str
    path: str
    first: int
    """Number of the first, from 1."""
    table: Any

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, places: slice) -> Rows:
        begin, end, _ = places.indices(len(self))
        return replace(self, first=self.first + begin, table=self.table.slice(begin, end - begin))

    def __reduce__(self) -> tuple[Any, ...]:
        import pyarrow

        # Its own pickle of some rows would take the whole table along.
        stream = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(stream, self.table.schema) as writer:
            writer.write(self.table)
        return _rows_sent, (self.key, self.path, self.first, stream.getvalue().to_pybytes())

    def records(self) -> list[tuple[int, dict[str, Any]]]:
        """See Batch."""
        with as_user_error(f"{self.key}.path", self.path, READABLE):
            rows = self.table.to_pylist(maps_as_pydicts="strict")
            return [(number, plain_row(row)) for number, row in enumerate(rows, self.first)]


def _rows_sent(key: str, path: str, first: int, content: bytes) -> Rows:
    import pyarrow

    return Rows(key, path, first, pyarrow.ipc.open_stream(content).read_all())


@dataclass(frozen=True)
class Records:
    """Records that are decoded already."""

    numbered: list[tuple[int, dict[str, Any]]]

    def __len__(self) -> int:
        return len(self.numbered)

    def __getitem__(self, places: slice) -> Records:
        return Records(self.numbered[places])

    def records(self) -> list[tuple[int, dict[str, Any]]]:
        """See Batch."""
        return self.numbered


def _parsed(line: bytes, number: int, where: str) -> dict[str, Any]:
    expected, shown = "a JSON object on each line", repr(line.strip()[:60].decode("utf-8", "replace"))
    try:
        # A byte-order mark can only be at the start of the file; some editors write one.
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        record = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        # The decoder's own message counts lines within this one.
        why = f"{error.msg} at its character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(where, f"{shown} ({why})", expected) from error
    if not isinstance(record, dict):
        raise UserError(where, f"{shown}, a JSON {type(record).__name__}", expected)
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # json would keep the last and say nothing
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""Made once: `json.loads` would make one for each line."""


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Arrow as a record."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
