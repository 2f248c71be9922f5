"""Returns memory that a process has freed to the operating system."""

import ctypes
from functools import cache
from typing import Any


def give_back() -> None:
    """Gives the pages of freed memory back, where the C library can (glibc's malloc_trim); otherwise does nothing.

    malloc keeps freed blocks below 32 MiB for later, and a block in use at the end of a heap holds all of it. Gradients,
    activations and copies for a checkpoint come and go in other sizes and threads each time: without this, a process holds
    up to twice what it uses, and more after each checkpoint (`python -m benchmarks.memory`).
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
