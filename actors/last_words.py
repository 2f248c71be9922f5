"""The last error in the log of a process that has failed or died. Standard library only."""

import os
import re
from pathlib import Path

TAIL_BYTES = 16 << 10
"""So much of the end of a log is looked at: an error before it is not why a process has ended."""
PREFIX = re.compile(r"^(\(\w+( pid=\d+)?\) )?((ERROR|CRITICAL) [\d:. -]+ \[[^\]]*\] )?\s*")
"""What vLLM puts before a line."""
ERROR = re.compile(
    r"[\w.]*(Error|Exception)(:|$)|\*\*\* SIG\w+|Fatal Python error: |terminate called |what\(\): |.* died unexpectedly"
)
"""The line of an exception or of a signal."""


def last_error(log: str | Path) -> str:
    """The last line that tells an error at the end of a log; "" where there is none, or no such file."""
    try:
        with open(log, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    told = (PREFIX.sub("", line).strip() for line in reversed(lines))
    return next((line for line in told if ERROR.match(line)), "")


def own_log() -> str:
    """The file that this process writes its errors to; "" where that is no file."""
    try:
        path = os.readlink("/proc/self/fd/2")
    except OSError:
        return ""
    return path if os.path.isfile(path) else ""
