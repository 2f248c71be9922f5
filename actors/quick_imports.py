"""Imports of large libraries without the garbage collector."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Within the block the garbage collector pauses. It is for imports, and for work that makes no large tensors.

    torch, transformers and vLLM make a million objects that live to the end. The collector would scan them again and
    again while they are made, which is a fifth of the time of the import.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
