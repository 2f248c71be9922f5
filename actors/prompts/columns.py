"""Columns of many rows in arrays, without a Python object for each row: texts as UTF-8 bytes, and values that repeat.

Their arrays may be mapped from files (cache.py). Shapes: M rows, N bytes of all texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from operator import eq
from typing import Any, Generic, Self, TypeVar, overload

import numpy as np
import xxhash

from actors.trajectory import offsets_of, ragged_rows

T = TypeVar("T")
S = TypeVar("S")
ENCODING = ("utf-8", "surrogatepass")
"""JSON may hold half a surrogate pair, which a reference answer keeps."""
ROWS = 1 << 16
"""Rows that are worked on at a time."""
LONE = 0xED, 0xA0
"""A surrogate in UTF-8 begins with the first of these bytes, and its second byte is at least the other."""


class Column(Sequence[T]):
    """M values that are made when they are asked for. Equal to any sequence with the same values."""

    __slots__ = ()

    def _at(self, row: int) -> T:
        raise NotImplementedError

    @overload
    def __getitem__(self, row: int) -> T: ...
    @overload
    def __getitem__(self, row: slice) -> list[T]: ...
    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self._at(one) for one in range(*row.indices(len(self)))]
        row = int(row)
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        return self._at(row % len(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self[:3]!r}, of {len(self):,})"


class Texts(Column[Any]):
    """M texts, or None where one is missing. Example: texts[1] is data[offsets[1]:offsets[2]] as UTF-8."""

    __slots__ = ("_digests", "data", "missing", "offsets")

    def __init__(
        self,
        data: np.ndarray,
        offsets: np.ndarray,
        missing: np.ndarray | None = None,
        digests: np.ndarray | None = None,
    ):
        """data: [N] uint8. offsets: [M + 1] int64. missing: [M] bool; None: no text is. digests: see `digests`, if known."""
        self.data, self.offsets, self._digests = data, offsets, digests
        self.missing = np.zeros(len(offsets) - 1, bool) if missing is None else missing

    @classmethod
    def of(cls, texts: Iterable[str | None]) -> Self:
        """From Python strings. It takes ROWS of them at a time, so a generator's strings are never all in memory."""
        rest = iter(texts)
        parts = [cls._of(some) for some in iter(lambda: list(islice(rest, ROWS)), [])]
        return cls(
            np.concatenate([np.zeros(0, np.uint8), *(part.data for part in parts)]),
            offsets_of(np.concatenate([np.zeros(0, np.int64), *(np.diff(part.offsets) for part in parts)])),
            np.concatenate([np.zeros(0, bool), *(part.missing for part in parts)]),
        )

    @classmethod
    def _of(cls, texts: list[str | None]) -> Self:
        encoded = [b"" if text is None else text.encode(*ENCODING) for text in texts]
        missing = np.fromiter((text is None for text in texts), bool, len(texts))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets_of(map(len, encoded)), missing)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def _at(self, row: int) -> str | None:
        return None if self.missing[row] else self._bytes(row).decode(*ENCODING)

    def _bytes(self, row: int) -> bytes:
        return self.data[self.offsets[row] : self.offsets[row + 1]].tobytes()

    def __iter__(self) -> Iterator[Any]:
        for begin in range(0, len(self), ROWS):
            bounds = self.offsets[begin : begin + ROWS + 1]
            data, ends = self.data[bounds[0] : bounds[-1]].tobytes(), (bounds - bounds[0]).tolist()
            for row, missing in enumerate(self.missing[begin : begin + ROWS].tolist()):
                yield None if missing else data[ends[row] : ends[row + 1]].decode(*ENCODING)

    def take(self, rows: np.ndarray) -> Texts:
        """The texts of these rows, ascending [m]."""
        digests = None if self._digests is None else self._digests[rows]
        return Texts(
            many_rows(self.data, self.offsets, rows),
            offsets_of(self.offsets[rows + 1] - self.offsets[rows]),
            self.missing[rows],
            digests,
        )

    def picked(self, rows: np.ndarray) -> Column[Any]:
        """The texts of these rows, ascending [m], without a copy."""
        return self if len(rows) == len(self) else Picked(self.__getitem__, rows)

    def digests(self) -> np.ndarray:
        """[M] uint64: xxh3 of each text. Texts with other digests differ."""
        if self._digests is not None:
            return self._digests
        return np.fromiter(
            (xxhash.xxh3_64_intdigest(self._bytes(row)) for row in range(len(self))), np.uint64, len(self)
        )

    def marked(self, rows: range) -> Iterator[bytes]:
        """The texts of these rows in one stream, in pieces: 0 for one that is missing, else 1, the text and 0. Lone surrogates
        are written as `\\udc00`."""
        for begin in range(rows.start, rows.stop, ROWS):
            stop = min(begin + ROWS, rows.stop)
            bounds, missing = self.offsets[begin : stop + 1], self.missing[begin:stop]
            data = self.data[bounds[0] : bounds[-1]]
            if np.any((data[:-1] == LONE[0]) & (data[1:] >= LONE[1])):
                yield b"".join(map(marked, self[begin:stop]))
                continue
            lengths = np.diff(bounds)
            starts = offsets_of(np.where(missing, 1, lengths + 2))
            stream = np.zeros(starts[-1], np.uint8)
            stream[starts[:-1][~missing]] = 1
            stream[np.arange(len(data)) + np.repeat(starts[:-1] + 1 - (bounds[:-1] - bounds[0]), lengths)] = data
            yield stream.tobytes()


def marked(text: str | None) -> bytes:
    """One text as `Texts.marked` writes it."""
    return b"\0" if text is None else b"\1" + text.encode(errors="backslashreplace") + b"\0"


class Coded(Column[T], Generic[T]):
    """M values, with few different ones. Example: Coded(["maths", None], [0, 0, 1]) is "maths", "maths", None."""

    __slots__ = ("codes", "values")

    def __init__(self, values: Sequence[T], codes: np.ndarray):
        """values: each at least once, and hashable or not. codes: [M] integers, the places in `values`."""
        self.values, self.codes = list(values), codes

    @classmethod
    def of(cls, values: Iterable[Any]) -> Self:
        """From hashable values, in the order in which they come first."""
        seen: dict[Any, int] = {}
        codes = np.fromiter((seen.setdefault(value, len(seen)) for value in values), np.int32)
        return cls(list(seen), codes)

    def __len__(self) -> int:
        return len(self.codes)

    def _at(self, row: int) -> T:
        return self.values[self.codes[row]]

    def __iter__(self) -> Iterator[T]:
        for begin in range(0, len(self), ROWS):
            yield from (self.values[code] for code in self.codes[begin : begin + ROWS].tolist())

    def take(self, rows: np.ndarray) -> Coded[T]:
        """The values of these rows [m]."""
        codes = self.codes[rows]
        there = np.bincount(codes, minlength=len(self.values)) > 0
        places = (np.cumsum(there) - 1).astype(np.int32)
        return Coded([value for value, is_there in zip(self.values, there, strict=True) if is_there], places[codes])

    def each(self, function: Callable[[T], S]) -> Coded[S]:
        """The function's result for every row; it is called once for each value."""
        return Coded([function(value) for value in self.values], self.codes)

    def where(self, condition: Callable[[T], Any]) -> np.ndarray:
        """[M] bool: rows whose value meets the condition."""
        return np.array([bool(condition(value)) for value in self.values], bool)[self.codes]


class Picked(Column[T], Generic[T]):
    """What a function makes of some rows, when it is asked for."""

    def __init__(self, function: Callable[[int], T], rows: np.ndarray):
        """rows: [M]."""
        self._function, self._rows = function, rows

    def __len__(self) -> int:
        return len(self._rows)

    def _at(self, row: int) -> T:
        return self._function(int(self._rows[row]))


def many_rows(values: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`ragged_rows` of any number of rows; its indices take eight bytes for each value, so only some rows are taken at a time."""
    if len(rows) <= ROWS:
        return ragged_rows(values, offsets, rows)
    found = np.empty(int((offsets[rows + 1] - offsets[rows]).sum()), values.dtype)
    end = 0
    for begin in range(0, len(rows), ROWS):
        some = ragged_rows(values, offsets, rows[begin : begin + ROWS])
        found[end : end + len(some)] = some
        end += len(some)
    return found
