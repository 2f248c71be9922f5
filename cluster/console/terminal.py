"""Output that outlasts its reader: a terminal that is closed, a pipe whose reader ends, a log on a full disk."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)
"""Errors of a terminal or pipe that does not come back. On a full disk (ENOSPC) later lines may be written again."""


class LastingStream:
    """A text stream that drops what cannot be written."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes the text, or drops it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
        except UnicodeError:
            raise
        except ValueError:  # the stream is closed
            pass
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes each line, or drops it."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes the stream, if there is still somebody to read it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)
        except ValueError:
            pass

    def _drop(self, error: OSError) -> None:
        """Points the descriptor at /dev/null if its reader is gone, for everything else that writes to it."""
        if error.errno in GONE:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
                self._stream.flush()  # what is left in its buffer would fail when Python ends


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within the block, nothing fails because output cannot be written."""
    before = sys.stdout, sys.stderr
    ours = LastingStream(sys.stdout), LastingStream(sys.stderr)
    sys.stdout, sys.stderr = ours
    try:
        yield
    finally:
        for stream in ours:
            stream.flush()
        sys.stdout, sys.stderr = before
