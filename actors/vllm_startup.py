"""Builds vLLM's `LLM` in this process, for the rollout engine and the vLLM teacher: fast, also without a GPU."""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from actors.accelerator import torch_device
from actors.errors import UserError
from actors.heartbeat import beat
from actors.vllm_options import refuse_samplers

CPU_KV_CACHE_BYTES = 256 << 20
"""KV cache of an engine on a CPU. By default each engine would reserve 92% of the machine's memory."""


@contextmanager
def importing_vllm() -> Iterator[None]:
    """Context of the first import of vLLM: sets its environment variables and pauses the garbage collector.

    The import creates millions of objects that are never freed; the collector would scan them for seconds.
    """
    import torch

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not torch.cuda.is_available():
        # Otherwise the first request with log-probs compiles for ten seconds, and needs a C++ compiler.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        if "torch._dynamo" in sys.modules:  # it has read that already, but reads this with every call of torch.compile
            os.environ.setdefault("TORCHDYNAMO_DISABLE", os.environ["TORCH_COMPILE_DISABLE"])
        # Otherwise the tensor-parallel workers of all actors are bound to the first core.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # In this process the engine reads weights in place, starts 5 s sooner and leaves no shared memory behind when killed.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    gc.disable()
    try:
        yield
        gc.freeze()  # vLLM calls gc.collect() when it starts; frozen objects are not scanned
    finally:
        gc.enable()


def build_llm(options: dict[str, Any], more: dict[str, Any], key: str) -> Any:
    """Builds a vllm.LLM without a tokenizer.

    more: the user's own options, which take precedence. key: the configuration key of these options.
    UserError: vLLM does not know one of them.
    """
    refuse_samplers(more, key)
    device = torch_device()
    with importing_vllm():
        from vllm import LLM
    options = {"skip_tokenizer_init": True, "disable_log_stats": True, **options}
    if options["tensor_parallel_size"] > 1:
        # In an actor with a placement group vLLM would start its workers as Ray actors. This actor already has all GPUs.
        options["distributed_executor_backend"] = "mp"
    if device == "cpu":
        options |= {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES, "enforce_eager": True}
        _skip_model_inspection(options["model"])
        _skip_objects_without_dictionary()
    gc.disable()
    try:
        llm: Any = LLM(**options | more)
        llm.llm_engine.step = _counted(llm.llm_engine.step)
        return llm
    except (TypeError, ValueError) as error:  # a wrong value, or one that does not fit the model or the machine
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:3])[:300]
        found = ", ".join(f"{name}: {value}" for name, value in more.items()) or "vLLM's defaults"
        raise UserError(key, found, f"options that vLLM's engine takes ({reason})") from error
    finally:
        gc.enable()


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
