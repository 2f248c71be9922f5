"""Builds vLLM's `LLM` in this process, for the rollout engine and the vLLM teacher: fast, also without a GPU."""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from actors.accelerator import card_bytes, require_batch_invariance, torch_device
from actors.errors import UnavailableError, UserError
from actors.gpu_share import is_share
from actors.heartbeat import beat, phase
from actors.quick_imports import quick_imports
from actors.vllm_options import refuse_samplers, share_options

CPU_KV_CACHE_BYTES = 256 << 20
"""KV cache of an engine on a CPU. By default each engine would reserve 92% of the machine's memory."""
FREE_SECONDS = 60.0
"""How long the memory of an engine's share is waited for."""


@contextmanager
def importing_vllm() -> Iterator[None]:
    """Context of the first import of vLLM: sets its environment variables and pauses the garbage collector."""
    import torch

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # on GPUs vLLM would send what it runs to its makers
    if not torch.cuda.is_available():
        # Otherwise the first request with log-probs compiles for ten seconds, and needs a C++ compiler.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        if "torch._dynamo" in sys.modules:  # it has read that already, but reads this with every call of torch.compile
            os.environ.setdefault("TORCHDYNAMO_DISABLE", os.environ["TORCH_COMPILE_DISABLE"])
        # Otherwise the tensor-parallel workers of all actors are bound to the first core.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # In this process the engine reads weights in place, starts 5 s sooner and leaves no shared memory behind when killed.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with quick_imports():
        yield
        gc.freeze()  # vLLM calls gc.collect() when it starts; frozen objects are not scanned


def build_llm(options: dict[str, Any], more: dict[str, Any], key: str, gpus: float | None = None) -> Any:
    """Builds a vllm.LLM without a tokenizer.

    more: the user's own options, which take precedence. key: the configuration key of these options. gpus: of the actor;
    with a share of one, the engine keeps to that share. UserError: vLLM does not know an option, or the share or the GPU is
    too small. UnavailableError: others hold the memory of the share at the moment.
    """
    refuse_samplers(more, key)
    device = torch_device()
    require_batch_invariance(device, key.removesuffix(".engine"))
    phase("imports vLLM")
    with importing_vllm():
        from torch import OutOfMemoryError
        from vllm import LLM
    options = {"skip_tokenizer_init": True, "disable_log_stats": True, **options}
    if options["tensor_parallel_size"] > 1:
        # In an actor with a placement group vLLM would start its workers as Ray actors. This actor already has all GPUs.
        options["distributed_executor_backend"] = "mp"
    if device == "cpu":
        options |= {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES, "enforce_eager": True}
        _skip_model_inspection(options["model"])
        _skip_objects_without_dictionary()
    if device == "cuda" and is_share(gpus):
        options |= share_options(more, gpus, card_bytes(), key)
        _wait_for_memory((options | more)["gpu_memory_utilization"], key)
    phase("starts vLLM's engine")
    gc.disable()
    try:
        llm: Any = LLM(**options | more)
        llm.llm_engine.step = _counted(llm.llm_engine.step)
        return llm
    except (
        TypeError,
        ValueError,
        AssertionError,
        OutOfMemoryError,
    ) as error:  # a wrong value, or one that does not fit the model or the machine
        if isinstance(error, AssertionError) and "memory profiling" not in str(error):
            raise
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:3])[:300]
        found = ", ".join(f"{name}: {value}" for name, value in more.items()) or "vLLM's defaults"
        if is_share(gpus) and "memory" in reason.lower():
            expected = f"room for the engine in this share of the GPU ({reason})"
            raise UnavailableError(f"{_section(key)}.gpus_per_replica", f"{gpus:g}", expected) from error
        raise UserError(key, found, f"options that vLLM's engine takes ({reason})") from error
    finally:
        gc.enable()


def _section(key: str) -> str:
    """The section that the options are in: `rollout` for `rollout.engine`."""
    return key.rpartition(".")[0]


def _wait_for_memory(fraction: float, key: str) -> None:
    """Waits until this fraction of the GPU is free: vLLM refuses to start otherwise, and the driver frees the memory of a
    process that was killed a moment after its end. UnavailableError: others still hold it after a minute."""
    import torch

    deadline = time.monotonic() + FREE_SECONDS
    while True:
        free, total = torch.cuda.mem_get_info()
        if free >= fraction * total:
            return
        if time.monotonic() > deadline:
            found = f"{free / 1e9:.1f} of the {total / 1e9:.1f} GB of its GPU free"
            expected = (
                f"{fraction * total / 1e9:.1f} GB: other roles hold more than their shares, or another program uses it"
            )
            raise UnavailableError(f"{_section(key)}.gpus_per_replica", found, expected)
        beat()
        time.sleep(0.5)


def _counted(step: Callable[[], Any]) -> Callable[[], Any]:
    """vLLM's step with a heartbeat."""

    def counted() -> Any:
        beat()
        return step()

    return counted


def _skip_objects_without_dictionary() -> None:
    """Makes vLLM's patching of CPU kernels skip objects whose `vars` are not a dictionary.

    vLLM reads the `vars` of every object in every loaded module. Once numba is loaded (deltas load it), one of these
    objects is llvmlite's library, which returns a function for any attribute, also for `__dict__`. The names are
    private to vLLM: if they are missing, nothing is changed.
    """
    with suppress(ImportError):
        from vllm.triton_utils import dispatcher

        dispatcher.vars = _dictionary  # type: ignore[attr-defined]


def _dictionary(value: Any) -> Mapping[str, Any]:
    found = vars(value)
    return found if isinstance(found, Mapping) else {}


def _skip_model_inspection(model: str) -> None:
    """Inspects the model's class in this process. By default vLLM starts a subprocess, which imports vLLM again (8 s).

    vLLM caches the result on disk, so only the first run on a machine pays. The names are private to vLLM: if they are
    missing, vLLM inspects the class in its own way.
    """
    try:
        from transformers import AutoConfig
        from vllm.model_executor.models.registry import ModelRegistry, _RegisteredModel

        for name in AutoConfig.from_pretrained(model).architectures:
            ModelRegistry.models[name] = _RegisteredModel.from_model_cls(ModelRegistry.models[name].load_model_cls())
    except (ImportError, AttributeError, KeyError, ValueError, TypeError, OSError):
        return
