"""LoRA adapters in the vLLM engine, for `student.lora.publish: adapter`: versions hold the adapter, the model is constant.

vLLM adds the adapter to the output of each layer, W x + scale * B (A x), as the learner does. A new version replaces the
last one under the same id, between two steps; running requests continue with the new version.
Shapes: O and I are rows and columns of a layer's weight, r is the rank; A [r, I], B [O, r].
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from actors.config import LoraConfig
from actors.errors import WeightError
from actors.weights.buckets import WeightVersion, shapes, unpack

BEFORE, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
"""Parts of the tensor names in peft's files and in a published adapter."""


def adapter_options(lora: LoraConfig) -> dict[str, Any]:
    """Options of vLLM's engine that reserve memory for the adapter. vLLM reserves for certain ranks only."""
    from vllm.config.lora import MaxLoRARanks

    room = min(rank for rank in get_args(MaxLoRARanks) if rank >= lora.rank)
    # load_format: the model's weights come from its files, since a version holds the adapter alone.
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room, "load_format": "auto"}


def adapter_request() -> Any:
    """The LoRARequest of every request, which selects the adapter."""
    from vllm.lora.request import LoRARequest

    # vLLM looks the adapter up by the id 1 and reads the path only if it is not loaded. `load_adapter` runs before any
    # request, so the path need not exist.
    return LoRARequest("student", 1, "published")


def load_adapter(engine: Any, lora: LoraConfig, manifest: WeightVersion, buckets: Sequence[np.ndarray]) -> None:
    """Replaces the adapter in all of vLLM's workers, and sets the version that vLLM records for new tokens.

    vLLM reads adapters from directories only, so this writes one in shared memory. WeightError: vLLM refused it.
    """
    from safetensors.torch import save_file
    from vllm.lora.request import LoRARequest

    tensors = dict(unpack(manifest, buckets))
    layers = {name.removesuffix(DOWN).rpartition(".")[2] for name in tensors if name.endswith(DOWN)}
    described = {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilised,
        "target_modules": sorted(layers),
    }
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, Path(folder, "adapter_model.safetensors")
        )
        Path(folder, "adapter_config.json").write_text(json.dumps(described))
        # load_inplace: without it vLLM keeps the adapter that it already has under this id.
        if not engine.add_lora(LoRARequest("student", 1, folder, load_inplace=True)):
            raise WeightError(f"vLLM has not taken the adapter of version {manifest.version}")
    engine.set_weight_version(str(manifest.version))


def check_adapter(manifest: WeightVersion, model: Mapping[str, tuple[int, ...]], rank: int) -> None:
    """WeightError unless the version is an adapter of this rank: matrices [r, I] and [O, r] for some of the model's layers.

    model: tensor name -> shape of the model, with [O, I] for each layer's weight.
    """
    found = shapes(manifest)
    expected: dict[str, tuple[int, ...]] = {}
    for name in found:
        layer = name.removeprefix(BEFORE).removesuffix(DOWN).removesuffix(UP)
        rows, columns = model.get(f"{layer}.weight", (0, 0))[:2]
        expected |= {BEFORE + layer + DOWN: (rank, columns), BEFORE + layer + UP: (rows, rank)}
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong or not found:
        name = wrong[0] if wrong else "an adapter"
        raise WeightError(
            f"version {manifest.version} does not fit the model in {len(wrong)} tensors, first {name}: "
            f"found {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        )
