"""Memory of this process: gives back what is freed, and says why the system refuses more."""

import ctypes
import errno
import re
import resource
from functools import cache
from pathlib import Path
from typing import Any

REFUSED = re.compile(r"(cannot|can't|unable to) allocate", re.IGNORECASE)
"""What torch and safetensors write in errors that have no kind of their own."""
ROOM = (
    "room for the whole file: more memory, `ulimit -v unlimited`, sysctl vm.overcommit_memory=1, or the weights in several "
    "files (`save_pretrained` with max_shard_size)"
)
"""Expected where a model cannot be mapped or read for want of memory."""
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def is_refused(error: BaseException) -> bool:
    """Whether the system has refused memory or address space: whatever was read or computed is not at fault."""
    if isinstance(error, MemoryError):
        return True
    return REFUSED.search(str(error)) is not None or getattr(error, "errno", None) == errno.ENOMEM


def limits() -> str:
    """What bounds the memory of this process, in a few words."""
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    space = "unlimited" if most == resource.RLIM_INFINITY else f"{most / 1e9:.1f} GB"
    kind = OVERCOMMIT.read_text("ascii").strip() if OVERCOMMIT.exists() else "unknown"
    return f"address space (ulimit -v) {space}, vm.overcommit_memory {kind}"


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
