"""How much memory a process may allocate on a shared GPU (`gpus_per_replica` below 1). Standard library only.

Ray divides a GPU in name only: nothing keeps a process from taking all of it. Each process therefore limits itself: torch's
allocator (actors/accelerator.py), and vLLM by `gpu_memory_utilization`.
"""

PROCESS_BYTES = 768 << 20
"""What a process holds on its GPU beside what it allocates: the CUDA context, the loaded kernels, buffers of libraries.
Neither torch's limit nor vLLM's `gpu_memory_utilization` counts it."""
ENGINE_SPARE_BYTES = 256 << 20
"""vLLM measures what it needs a little too low (its own remark: by 150 MiB), so its budget ends before torch's limit."""

LARGEST_CARD_BYTES = 288_000_000_000
"""Of the largest GPUs that are sold (NVIDIA B300, AMD MI355X): what does not fit these fits no GPU."""


def is_share(gpus: float | None) -> bool:
    """Whether an actor with this many GPUs has one together with others."""
    return gpus is not None and 0 < gpus < 1


def torch_fraction(gpus: float, card_bytes: int) -> float:
    """The fraction of the GPU that torch's allocator may take in a process with this share; 0 or less: none is left."""
    return gpus - PROCESS_BYTES / card_bytes


def engine_fraction(gpus: float, card_bytes: int) -> float:
    """vLLM's `gpu_memory_utilization` for an engine with this share, rounded down; 0 or less: none is left."""
    return int((torch_fraction(gpus, card_bytes) - ENGINE_SPARE_BYTES / card_bytes) * 1000) / 1000
