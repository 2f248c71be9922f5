"""Checksums of a checkpoint at rest: xxh3-64, as weight versions in flight have them.

    training/checksums-<rank>.json   what each rank has written, hashed while it was in memory; removed by `seal`
    training/checksums.json          every file: {"format": 1, "files": {name: {"bytes": N, "spans": [[offset, bytes, hash]]}}}

The spans of a file cover it without gaps, so a flipped bit and a missing piece are found alike. A file that may be
replaced later, the campaign's state, has its checksum in itself (`with_checksum`).
"""

import json
import stat
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from actors.errors import CheckpointError, UserError
from actors.json_files import read_json

MANIFEST = Path("training", "checksums.json")
FORMAT = 1
CHUNK_BYTES = 16 << 20
THREADS = 8
"""Threads that read: xxhash and the kernel both work without the GIL."""
MARK = ', "checksum": "'
CHANGES_THE_MODEL = (".safetensors", ".index.json", ".py", ".jinja")
"""A file of these in a model directory changes what is loaded from it, also where nobody wrote it on purpose."""

Spans = Sequence[tuple[int, int, str]]
"""(offset, bytes, xxh3-64 in hexadecimal) of parts of a file."""


def hash_of(data: Any) -> str:
    """xxh3-64 of a buffer, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def write_part(directory: Path, rank: int, written: Mapping[str, Spans]) -> None:
    """Records what a rank has written into the files of a checkpoint; `seal` puts the ranks together."""
    (directory / MANIFEST).with_name(f"checksums-{rank}.json").write_text(json.dumps(written), "utf-8")


def seal(directory: Path, besides: Collection[str] = ()) -> None:
    """Writes the checksums of all files of a checkpoint that is complete, except those named in `besides`.

    CheckpointError: the learner's files are not there, or a rank's part of one is missing.
    """
    parts = sorted((directory / MANIFEST).parent.glob("checksums-*.json"))
    spans: dict[str, list[tuple[int, int, str]]] = {}
    for part in parts:
        for name, written in json.loads(part.read_text("utf-8")).items():
            spans.setdefault(name, []).extend(map(tuple, written))
        part.unlink()
    files = [name for name in _files(directory) if name not in besides and name != str(MANIFEST)]
    if not files or (missing := sorted(spans.keys() - set(files))):
        absent = missing[0] if files else "the learner's files"
        raise CheckpointError(f"{absent} not in {directory}: learner and campaign must see the same file system")
    found = {}
    for name in files:
        size = (directory / name).stat().st_size
        known = sorted(spans.get(name) or [(0, size, _hash_of_span(directory / name, 0, size))])
        if gap := _gap(known, size):
            raise CheckpointError(f"{name} is incomplete: {gap}")
        found[name] = {"bytes": size, "spans": known}
    (directory / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": found}), "utf-8")


def is_sealed(directory: Path) -> bool:
    """Whether the checkpoint has checksums. Those of earlier releases have none."""
    return (directory / MANIFEST).exists()


def damage(directory: Path, besides: Collection[str] = ()) -> str | None:
    """What is wrong with the files of a sealed checkpoint, in one line; None if nothing is. Reads all of them.

    UserError: a later release wrote it.
    """
    try:
        content = read_json(directory / MANIFEST)
        written, files = content["format"], content["files"]
        spans = [
            (name, int(offset), int(size), str(told))
            for name, entry in files.items()
            for offset, size, told in entry["spans"]
        ]
        sizes = {str(name): int(entry["bytes"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        return f"{MANIFEST}: {type(error).__name__}: {error}"
    if written != FORMAT:
        raise UserError(
            str(directory / MANIFEST), f"format {written}", f"{FORMAT}: a later release wrote this checkpoint"
        )
    try:
        for name, size in sizes.items():
            found = (directory / name).stat()
            if not stat.S_ISREG(found.st_mode):
                return f"{name} is no file"
            if found.st_size != size:
                return f"{name} has {found.st_size} bytes, and was written with {size}"
        for name in _files(directory):
            if name not in sizes and name not in besides and name.endswith(CHANGES_THE_MODEL):
                return f"{name} is not a file of this checkpoint"
        with ThreadPoolExecutor(THREADS) as pool:
            hashes = pool.map(lambda span: _hash_of_span(directory / span[0], span[1], span[2]), spans)
            for (name, offset, _, told), now in zip(spans, hashes, strict=True):
                if now != told:
                    return f"{name} is damaged: the checksum of the bytes from {offset} on is {now}, and was {told}"
    except OSError as error:
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    except (ValueError, OverflowError) as error:  # a name or a place that no file can have
        return f"{MANIFEST}: {error}"
    return None


def with_checksum(text: str) -> str:
    """A JSON object's text with the checksum of the text as its last key."""
    return f'{text.removesuffix("}")}{MARK}{hash_of(text.encode())}"}}'


def has_checksum(text: str) -> bool:
    """Whether the text has a checksum of its own, which is right. ValueError: it is wrong."""
    before, mark, told = text.rpartition(MARK)
    if not mark or '"' in told[:-2]:
        return False
    if told != hash_of((before + "}").encode()) + '"}':
        raise ValueError("its checksum is wrong")
    return True


def _files(directory: Path) -> list[str]:
    """Names of all files, relative, links to files included."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


def _gap(spans: Spans, size: int) -> str:
    """Where sorted spans leave a file uncovered; empty if they do not. What is not split, every rank writes."""
    end = 0
    for offset, length, _ in spans:
        if offset > end:
            return f"nobody wrote the bytes from {end} to {offset}"
        end = max(end, offset + length)
    return "" if end == size else f"it has {size} bytes, and {end} of them were written"


def _hash_of_span(path: Path, offset: int, size: int) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while size > 0 and (data := file.read(min(size, CHUNK_BYTES))):
            digest.update(data)
            size -= len(data)
    return digest.hexdigest()
