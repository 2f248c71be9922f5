"""Seconds and bytes on the device."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.shapes import PEAK_FLOPS


def wait() -> None:
    """Until the GPU has done what it was asked to."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(do: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds, after one run that is not counted."""
    do()
    found = []
    for _ in range(repeats):
        wait()
        begun = time.perf_counter()
        do()
        wait()
        found.append(time.perf_counter() - begun)
    return sorted(found)[len(found) // 2]


def peak_bytes(do: Callable[[], Any]) -> tuple[int, int]:
    """(highest, before) allocated bytes on the GPU during a run; (0, 0) on a CPU."""
    if not torch.cuda.is_available():
        do()
        return 0, 0
    wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    do()
    wait()
    return torch.cuda.max_memory_allocated(), before


def peak_flops() -> float | None:
    """Dense bfloat16 operations a second of this card by its data sheet; None: unknown, or a CPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def free() -> None:
    """Gives cached memory back to the card."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
