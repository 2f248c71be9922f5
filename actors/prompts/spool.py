"""Columns that grow part by part: in memory, and, once there are many rows, in files of a directory.

A column is a flat array. One whose name ends with OFFSETS holds the offsets [m + 1] of a ragged one; they begin at 0 in every
part, and go on from part to part here.
"""

from __future__ import annotations

from pathlib import Path
from shutil import rmtree
from typing import NamedTuple

import numpy as np
import xxhash

OFFSETS = ".offsets"
MANY = 50_000
"""Rows from which on files are written, and other processes help to read: both are worth their while."""
HELD_BYTES = 32 << 20
"""Of parts in memory, before they are written."""


class Part(NamedTuple):
    """Some rows."""

    columns: dict[str, np.ndarray]
    domains: list[str | None]
    """The values that the column `domains` has the places of."""


class ColumnFile(NamedTuple):
    """The file of a column, which has its name."""

    dtype: str
    length: int
    digest: xxhash.xxh3_128
    """Of its bytes."""


class Spool:
    """Rows, part by part."""

    def __init__(self, directory: Path | None = None):
        """directory: for the files; it is made with the first. None: all rows stay in memory."""
        self.directory = directory
        self.files: dict[str, ColumnFile] = {}
        self.rows = 0
        self.cause = ""
        """Why there are no files, although there was a directory for them."""
        self._codes: dict[str | None, int] = {}
        self._held: list[dict[str, np.ndarray]] = []
        self._held_bytes = 0
        self._ends: dict[str, int] = {}

    @property
    def domains(self) -> list[str | None]:
        """The values that the column `domains` has the places of, in the order in which they come first."""
        return list(self._codes)

    def add(self, part: Part) -> None:
        """Adds rows after the others."""
        codes = np.array([self._codes.setdefault(domain, len(self._codes)) for domain in part.domains], np.int32)
        columns = {**part.columns, "domains": codes[part.columns["domains"]]}
        for name, column in columns.items():
            if name.endswith(OFFSETS):
                begin = self._ends.get(name)
                columns[name] = column if begin is None else column[1:] + begin
                self._ends[name] = int(columns[name][-1]) if len(columns[name]) else begin or 0
        self._held.append(columns)
        self._held_bytes += sum(column.nbytes for column in columns.values())
        self.rows += len(columns["domains"])
        if self.rows >= MANY and self._held_bytes > HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what is in memory. If the disk fails, `take_back`."""
        if self.directory is None or not self._held:
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.files = {name: self._appended(self.directory / name) for name in self._held[0]}
        except OSError as error:
            self.take_back(f"{type(error).__name__}: {error}")
        else:
            self._held, self._held_bytes = [], 0

    def take_back(self, cause: str) -> None:
        """Takes what is in files into memory, where all rows stay from now on. OSError: a file cannot be read."""
        assert self.directory is not None
        back = {name: np.fromfile(self.directory / name, one.dtype, one.length) for name, one in self.files.items()}
        self._held = [*([back] if back else []), *self._held]
        self.discard()
        self.files, self.directory, self.cause = {}, None, cause

    def _appended(self, path: Path) -> ColumnFile:
        own = [columns[path.name] for columns in self._held]
        before = self.files.get(path.name)
        digest, length = (xxhash.xxh3_128(), 0) if before is None else (before.digest, before.length)
        with path.open("ab") as file:
            for column in own:
                file.write(column.data)
                digest.update(column.data)
        return ColumnFile(own[0].dtype.str, length + sum(map(len, own)), digest)

    def columns(self) -> dict[str, np.ndarray]:
        """All rows, where they are in memory. They are moved out of here, one column after the other."""
        return {name: np.concatenate([columns.pop(name) for columns in self._held]) for name in list(self._held[0])}

    def discard(self) -> None:
        """Deletes the files."""
        if self.directory is not None:
            rmtree(self.directory, ignore_errors=True)
