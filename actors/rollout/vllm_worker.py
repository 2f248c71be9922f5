"""What runs inside vLLM's own workers: a weight-transfer engine that loads a weight version from host memory.

vLLM finds the class through its registry (`weight_transfer_config={"backend": "understudy"}`); workers in other
processes import this module because it is named as `worker_extension_cls`.
"""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from actors.weights.buckets import WeightVersion, unpack

BACKEND = "understudy"


@dataclass
class HostInitInfo(WeightTransferInitInfo):
    """Nothing is set up beforehand: no process group, no fixed membership."""


@dataclass
class HostUpdateInfo(WeightTransferUpdateInfo):
    """A whole weight version, already verified."""

    manifest: Any
    """WeightVersion."""
    buckets: Any = None
    """uint8 arrays, when the engine lives in this process: read in place."""
    paths: Any = None
    """Files in shared memory, when it does not: mapped, not sent."""


class HostWeightTransferEngine(WeightTransferEngine[HostInitInfo, HostUpdateInfo]):
    """Loads Hugging Face names and shapes through the model's own `load_weights`, layer by layer."""

    init_info_cls = HostInitInfo
    update_info_cls = HostUpdateInfo

    def init_transfer_engine(self, init_info: HostInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Puts the layers back into the state in which a checkpoint can be loaded."""
        if current_platform.is_cpu():
            # The CPU backend packs experts only when it makes their kernel: without a new one they stay unpacked, and
            # are read as if they were packed.
            for module in self.model.modules():
                method: Any = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: HostUpdateInfo) -> None:
        """Copies every tensor into the model."""
        manifest: WeightVersion = update_info.manifest
        buckets = update_info.buckets or [_mapped(path) for path in update_info.paths]
        self.model.load_weights(  # type: ignore[operator]
            unpack(manifest, buckets)
        )

    def finish_weight_update(self) -> None:
        """Converts the layers to the form in which they compute."""
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            # The CPU backend computes from a packed copy, and a reload leaves that of a tied output head as it was.
            for module in self.model.modules():
                if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                    module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing to release."""


def _mapped(path: str) -> np.ndarray:
    """A file as a bucket, which is empty where a rank of the learner has no rows of anything in it."""
    return np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.empty(0, np.uint8)


class WorkerExtension:
    """Mixed into vLLM's workers; it exists so that they import this module."""


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, HostWeightTransferEngine)
