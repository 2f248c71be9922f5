"""The lock of a run directory: one process runs a campaign in it, and others can tell whether one does.

The lock is flock's on a file that is never removed: two processes could then hold locks on two files of this name. It ends
with the process, however that ends. Standard library only.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = ".lock"
TRIES, PAUSE_SECONDS = 5, 0.05
"""A reader that looks whether a campaign runs holds the lock for a moment, which is no other campaign."""


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Within the block no other process holds the directory. BlockingIOError: one does. OSError: it cannot be written to."""
    with (run_dir / LOCK_FILE).open("a") as lock:
        for left in reversed(range(TRIES)):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise
                time.sleep(PAUSE_SECONDS)
            except OSError:
                break  # the file system has no locks
        yield


def is_locked(run_dir: Path) -> bool | None:
    """Whether a process runs a campaign here; None: the file system does not say."""
    try:
        with (run_dir / LOCK_FILE).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False
