"""Output that outlasts its reader: a terminal that is closed or hangs, a pipe whose reader ends, a log on a full disk."""

import errno
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)
"""Errors of a terminal or pipe that does not come back. On a full disk (ENOSPC) later lines may be written again."""
PATIENCE_SECONDS = 5.0
"""How long a reader may stand still (Ctrl-S, a connection that hangs) before what it does not take is dropped."""
PIECE_BYTES = 256
"""A terminal or pipe that can be written to takes this much at once."""


class LastingStream:
    """A text stream that drops what cannot be written. It keeps nothing in a buffer, which would fail when Python ends."""

    def __init__(self, stream: Any):
        self._stream, self._stalled = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes the text, or drops what is left of it when the reader does not take it."""
        with suppress(ValueError):  # the stream is closed
            self.flush()
            content = text.encode(self._stream.encoding or "utf-8", "backslashreplace")
            for start in range(0, len(content), PIECE_BYTES):
                if not self._written(content[start : start + PIECE_BYTES]):
                    break
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes each line, or drops it."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes what was written before this object was made."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def _written(self, piece: bytes) -> bool:
        descriptor = self._stream.fileno()
        self._stalled = not select.select([], [descriptor], [], 0 if self._stalled else PATIENCE_SECONDS)[1]
        if self._stalled:
            return False
        try:
            return os.write(descriptor, piece) == len(piece)
        except OSError as error:
            if error.errno in GONE:  # for everything else that writes to it, too
                with suppress(OSError):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, descriptor)
                    os.close(nowhere)
            return False


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within the block, nothing fails or waits for long because output cannot be written."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (LastingStream(stream) if _has_descriptor(stream) else stream for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _has_descriptor(stream: Any) -> bool:
    """A notebook's stream, or that of a test, has none: it is somebody's own."""
    try:
        return stream.fileno() >= 0
    except (AttributeError, OSError, ValueError):
        return False
