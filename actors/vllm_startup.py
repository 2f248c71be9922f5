"""Making a vLLM engine in this process: quickly, and on machines without a GPU too."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from actors.errors import UserError
from actors.heartbeat import beat

CPU_KV_CACHE_BYTES = 256 << 20
"""Without a size of its own, vLLM would take 92% of the machine's memory for each engine."""


@contextmanager
def importing_vllm() -> Iterator[None]:
    """Within the block vLLM is imported for the first time.

    That makes millions of objects that stay; collecting them again and again would take seconds of the start.
    """
    import torch

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not torch.cuda.is_available():
        # The first request with log-probs would otherwise compile for ten seconds, and need a C++ compiler.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        # Tensor-parallel workers of several actors would all be bound to the first core.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def build_llm(options: dict[str, Any], more: dict[str, Any], key: str) -> Any:
    """A vllm.LLM without a tokenizer. `more` are the user's own options, of the configuration key `key`, and win.

    UserError: vLLM does not know one of them.
    """
    import torch

    with importing_vllm():
        from vllm import LLM
    options = {"skip_tokenizer_init": True, "disable_log_stats": True, **options}
    if options["tensor_parallel_size"] > 1:
        # In an actor with a placement group vLLM would ask Ray for more actors; the GPUs are this actor's own.
        options["distributed_executor_backend"] = "mp"
    if not torch.cuda.is_available():
        options |= {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES, "enforce_eager": True}
        _skip_model_inspection(options["model"])
        _look_into_dictionaries_alone()
    gc.disable()
    try:
        llm: Any = LLM(**options | more)
        llm.llm_engine.step = _counted(llm.llm_engine.step)
        return llm
    except TypeError as error:
        raise UserError(key, ", ".join(more), f"options of vLLM's engine ({error})") from error
    finally:
        gc.enable()


def _counted(step: Callable[[], Any]) -> Callable[[], Any]:
    """An engine's step that tells that it was taken."""

    def counted() -> Any:
        beat()
        return step()

    return counted


def _look_into_dictionaries_alone() -> None:
    """vLLM's CPU kernels are put in place wherever modules hold others, in the `vars` of all that they hold.

    Where numba was loaded before, as it is by a delta, that meets llvmlite's library, which answers to any name, `__dict__`
    too, with a function. The names are private to vLLM: without them, nothing is changed.
    """
    with suppress(ImportError):
        from vllm.triton_utils import dispatcher

        dispatcher.vars = _dictionary  # type: ignore[attr-defined]


def _dictionary(value: Any) -> Mapping[str, Any]:
    found = vars(value)
    return found if isinstance(found, Mapping) else {}


def _skip_model_inspection(model: str) -> None:
    """On its first run on a machine vLLM inspects the model class in a subprocess, which imports vLLM again: 8 s.

    The class is inspected in this process instead. The names are private to vLLM: without them, it takes the 8 s.
    """
    try:
        from transformers import AutoConfig
        from vllm.model_executor.models.registry import ModelRegistry, _RegisteredModel

        for name in AutoConfig.from_pretrained(model).architectures:
            ModelRegistry.models[name] = _RegisteredModel.from_model_cls(ModelRegistry.models[name].load_model_cls())
    except (ImportError, AttributeError, KeyError, ValueError, TypeError, OSError):
        return
