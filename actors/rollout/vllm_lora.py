"""A student's adapter in a vLLM engine: what is published is the adapter alone, and the model beside it stays as it is.

vLLM adds it to the output of each layer (`W x + scale * B (A x)`), as the learner does. A version replaces the one before
under the same number, between two steps; requests that run go on with it.
Shapes: O, I rows and columns of a layer's weight, r rank.
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
"""In the names of peft's files, which are those of a published adapter."""


def adapter_options(lora: LoraConfig) -> dict[str, Any]:
    """What vLLM must be told so that it can take the adapter."""
    from vllm.config.lora import MaxLoRARanks

    room = min(rank for rank in get_args(MaxLoRARanks) if rank >= lora.rank)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room, "load_format": "auto"}


def adapter_request() -> Any:
    """What a request carries to be answered with the adapter; one object serves all."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("student", 1, "published")


def load_adapter(engine: Any, lora: LoraConfig, manifest: WeightVersion, buckets: Sequence[np.ndarray]) -> None:
    """Puts the version in the place of the one before, in all of the engine's workers, and tells the engine its number."""
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
        if not engine.add_lora(LoRARequest("student", 1, folder, load_inplace=True)):
            raise WeightError(f"vLLM has not taken the adapter of version {manifest.version}")
    engine.set_weight_version(str(manifest.version))


def check_adapter(manifest: WeightVersion, model: Mapping[str, tuple[int, ...]], rank: int) -> None:
    """WeightError unless the version is an adapter of this rank: for some layers of the model, by their names and shapes
    [O, I], one matrix [r, I] and one [O, r] each."""
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
