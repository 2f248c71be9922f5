"""Loads weight versions inside vLLM's workers: a weight-transfer engine that reads from host memory.

`weight_transfer_config={"backend": "understudy"}` selects the class in vLLM's registry. Workers in other processes
register it when they import this module; they import it because `worker_extension_cls` names it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from actors.vllm_logits import WorkerExtension as LogitsExtension
from actors.weights.buckets import WeightVersion, unpack
from actors.weights.node_staging import Place, mapped

BACKEND = "understudy"


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """Empty: weights come from host memory, so workers join no process group with the learner."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """A complete weight version with verified checksums."""

    manifest: Any
    """WeightVersion."""
    buckets: Any = None
    """uint8 arrays, read in place, for a worker in the engine's process; else None."""
    places: Any = None
    """Places of the node's copy (actors/weights/node_staging.py), which workers in other processes map; else None."""


class HostWeightTransferEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """Loads Hugging Face names and shapes through the model's own `load_weights`, layer by layer."""

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Returns the layers to the state in which a checkpoint can be loaded."""
        if current_platform.is_cpu():
            # The CPU backend packs experts only when it builds their kernel. With the old kernel the new experts would
            # stay unpacked and be read as if they were packed.
            for module in self.model.modules():
                method: Any = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None
        # Not `model.load_weights` alone: vLLM has packed, fused or transposed the layers, and on a CPU freed the originals.
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        """Copies every tensor into the model. vLLM's `update_weights` synchronises after it, once."""
        manifest: WeightVersion = update_info.manifest
        buckets = update_info.buckets or [mapped(Place(*place)) for place in update_info.places]
        # A GPU gets rows from pinned memory without waiting for them, while vLLM prepares the next layer. On a CPU vLLM
        # reads the buckets in place.
        device = None if current_platform.is_cpu() else self.device
        self.model.load_weights(unpack(manifest, buckets, device))  # type: ignore[operator]

    def finish_weight_update(self) -> None:
        """Converts the layers to the form in which they compute (fused, transposed, packed)."""
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            # The CPU backend computes from packed copies, and a reload does not renew the copy of a tied output head.
            for module in self.model.modules():
                if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                    module.quant_method.process_weights_after_loading(module)
        else:
            torch.accelerator.synchronize()  # so that the seconds without a step are counted to their end

    def shutdown(self) -> None:
        """Nothing to release."""


class WorkerExtension(LogitsExtension):
    """A base class of vLLM's workers, so that they import this module."""


# vLLM raises if a name is registered twice, and has no public way to ask. The check makes a second import harmless.
if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, HostWeightTransferEngine)
