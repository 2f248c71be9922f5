"""What a process has freed goes back to the operating system."""

import pytest
import torch

from actors import memory
from benchmarks.ranks import resident


@pytest.mark.skipif(memory._malloc_trim() is None, reason="the C library is not glibc")
def test_what_is_freed_below_memory_in_use_is_given_back() -> None:
    blocks = [torch.ones(4000) for _ in range(12_000)]  # 192 MB in blocks that malloc keeps in its heap
    last, full = blocks[-1], resident("VmRSS")
    blocks.clear()
    memory.give_back()
    assert resident("VmRSS") < full - 100e6 and last.sum() == 4000


def test_without_such_a_function_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    memory.give_back()
