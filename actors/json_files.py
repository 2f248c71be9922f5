"""Reads JSON files that something may have damaged: whatever is wrong with one is one kind of error, in one line.

A full disk, a lost node or an editor leaves empty files, zeros, half a file, other bytes than UTF-8; or there is a directory,
a pipe or a device of the file's name, which a reader must not open: it would wait, or read for ever. `replace_content` leaves no
half file, of JSON or of anything else. Standard library only.
"""

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any


class DamagedError(ValueError):
    """A file, or a piece of JSON, cannot be read; the text says why, in one line."""


def bytes_of(path: Path) -> bytes:
    """The content of a regular file. FileNotFoundError: there is none. DamagedError: it is another thing, or cannot be read."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DamagedError("a directory")
        if not stat.S_ISREG(mode):
            raise DamagedError("no regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedError(error.strerror or str(error)) from error


def parsed(text: str | bytes) -> Any:
    """The value that a JSON text stands for. DamagedError: it is none."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode())
    except RecursionError as error:
        raise DamagedError("it is nested too deeply") from error
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise DamagedError(" ".join(str(error).split())) from error


def read_json(path: Path) -> Any:
    """The value in a JSON file. FileNotFoundError: there is no file. DamagedError: it holds no JSON, or cannot be read."""
    return parsed(bytes_of(path))


def replace_content(path: Path, content: bytes | memoryview) -> None:
    """Replaces a file's content: after a crash it is the old or the new one, never a mixture. OSError: the old one is left."""
    # In the same directory, since a rename is atomic only within a file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before the rename: after a power failure the name could stand for an empty file
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()  # on a full disk it would take up room
        raise
