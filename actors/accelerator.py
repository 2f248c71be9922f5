"""Which device torch computes on in this process. A GPU that was reserved and cannot be used is an error, never a CPU."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from actors.errors import UserError
from actors.gpu_share import PROCESS_BYTES, torch_fraction

NO_GPU = ("", "-1", "none", "void", "nodevfiles")
"""First entries of CUDA_VISIBLE_DEVICES that name no GPU."""
SWITCH = "UNDERSTUDY_DETERMINISTIC"
DETERMINISTIC = {SWITCH: "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Environment of every actor with `deterministic: true`. cuBLAS reads its own when it starts."""
DETERMINISTIC_ON_GPU = {"VLLM_BATCH_INVARIANT": "1"}
"""And of an actor with a GPU: vLLM's batch-invariant mode takes kernels of Triton, without which an engine on a CPU fails."""
BATCH_INVARIANT = (9, 0)
"""Least compute capability of vLLM's batch-invariant mode (vllm/envs.py)."""
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def torch_device() -> str:
    """`cuda` or `cpu`. UserError: this process was given GPUs (CUDA_VISIBLE_DEVICES) that torch cannot use."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible.split(",")[0].strip().lower() not in NO_GPU:
        require_gpu(f"CUDA_VISIBLE_DEVICES={visible}")
    return "cpu"


class Card(NamedTuple):
    """A GPU as torch reports it."""

    name: str
    nbytes: int
    """Its memory."""

    def share(self, gpus: float) -> "Card":
        """What an actor with this many GPUs may allocate on one."""
        return self if gpus >= 1 else Card(f"{gpus:g} of {self.name}", int(gpus * self.nbytes) - PROCESS_BYTES)


def card_here() -> Card | None:
    """The GPU of this process; None without one."""
    import torch

    return Card(torch.cuda.get_device_name(), card_bytes()) if torch.cuda.is_available() else None


def deterministic() -> bool:
    """Whether this process was started by a campaign with `deterministic: true`."""
    return os.environ.get(SWITCH) == "1"


def settle_algorithms() -> None:
    """With `deterministic: true`, makes torch use kernels that repeat to the bit, and raise where there is none."""
    import torch

    if deterministic():
        torch.use_deterministic_algorithms(True)
        # For debugging only, and slow.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def require_batch_invariance(device: str, key: str) -> None:
    """UserError on a GPU that vLLM has no batch-invariant kernels for, with `deterministic: true`."""
    import torch

    if not deterministic() or device != "cuda":
        return
    found = torch.cuda.get_device_capability()
    if found < BATCH_INVARIANT:
        name = f"{torch.cuda.get_device_name()} of compute capability {found[0]}.{found[1]}"
        least = ".".join(map(str, BATCH_INVARIANT))
        raise UserError("deterministic", f"true, and {name} for {key}", f"false, or {least} for vLLM (H100 and later)")


def require_gpu(reserved: str) -> str:
    """Computes something on a GPU; returns the name of the GPU. UserError: torch cannot.

    reserved: what says that this process has a GPU, for the message.
    """
    import torch

    try:
        torch.cuda.init()  # says why it cannot; `is_available` would only say that it cannot
        if float(torch.ones(2, device="cuda").sum()) != 2.0:
            raise RuntimeError("1 + 1 is not 2 there")
        return torch.cuda.get_device_name()
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(" Please")[0]
        raise UserError(
            "torch",
            f"version {torch.__version__}, {_build(torch)}, which cannot use the GPU reserved for it ({reserved}): {reason}; "
            f"{_driver()}",
            "a build of torch for this driver, a newer driver, or no GPU (gpus_per_replica: 0, no CUDA_VISIBLE_DEVICES)",
        ) from error


def card_bytes() -> int:
    """Memory of this process's first GPU, as the driver counts it."""
    import torch

    return int(torch.cuda.mem_get_info()[1])


def describe_gpu(reserved: str) -> tuple[str, int]:
    """The GPU's name and its bytes. UserError: see `require_gpu`."""
    return require_gpu(reserved), card_bytes()


def keep_to_share(gpus: float) -> None:
    """Limits torch in this process to its share of the GPU: beyond it, an allocation is its own out-of-memory error.

    UserError: the share has no room for more than the process itself.
    """
    import torch

    if (fraction := torch_fraction(gpus, card_bytes())) <= 0:
        found = f"{gpus:g}, {gpus * card_bytes() / 1e9:.1f} of the {card_bytes() / 1e9:.1f} GB of the GPU"
        raise UserError("gpus_per_replica", found, f"more than the {PROCESS_BYTES / 1e9:.1f} GB of a process alone")
    torch.cuda.set_per_process_memory_fraction(fraction)


def _build(torch: Any) -> str:
    if torch.version.cuda:
        return f"built for CUDA {torch.version.cuda}"
    return f"built for ROCm {torch.version.hip}" if torch.version.hip else "built for CPUs only"


def _driver() -> str:
    """The driver of this machine in a few words."""
    try:
        return "driver: " + " ".join(DRIVER_FILE.read_text("utf-8").splitlines()[0].split()).removeprefix(
            "NVRM version: "
        )
    except (OSError, IndexError):
        return f"no NVIDIA driver is loaded ({DRIVER_FILE})"
