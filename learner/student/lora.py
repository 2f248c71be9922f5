"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: two thin matrices beside each linear layer are trained, and
the model's own weights stay as they are.

What is published and what a checkpoint's model holds is the sum, merged one layer at a time: engines know nothing of
adapters. Beside it a checkpoint has the adapter alone, `adapter/`, as `PeftModel.from_pretrained` reads it.
With DoRA (arXiv 2402.09353, eq. 5) the sum's rows are given lengths that are trained too.
Shapes: O, I rows and columns of a layer's weight, r rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.config import LoraConfig
from actors.errors import UserError
from learner.student.sharding import full_tensor, own_rows
from learner.student.tensor_files import StoredTensors

ADAPTER = "default"
"""peft's name for the only one there is."""
ADAPTER_FILE = "adapter_model.safetensors"
BEFORE = "base_model.model."
"""What peft puts before the names in its files."""


@dataclass(frozen=True, slots=True)
class Merged:
    """A weight with its adapter added, which is not computed before it is asked for."""

    weight_OI: Tensor
    down_rI: Tensor
    up_Or: Tensor
    scale: float
    lengths_O: Tensor | None = None
    """With DoRA: of the rows of the sum."""

    @property
    def shape(self) -> torch.Size:
        """O, I."""
        return self.weight_OI.shape

    def rows(self) -> "Merged":
        """The rows that this rank has; what they need of the others, `down_rI`, is gathered when they are asked for."""
        lengths = None if self.lengths_O is None else own_rows(self.lengths_O)[0]
        return replace(self, weight_OI=own_rows(self.weight_OI)[0], up_Or=own_rows(self.up_Or)[0], lengths_O=lengths)

    @torch.no_grad()
    def full_tensor(self) -> Tensor:
        """[O, I] float32; with several ranks, all must ask."""
        sum_OI = (
            full_tensor(self.weight_OI)
            .float()
            .addmm(full_tensor(self.up_Or), full_tensor(self.down_rI), alpha=self.scale)
        )
        if self.lengths_O is None:
            return sum_OI
        return sum_OI * (full_tensor(self.lengths_O) / torch.linalg.norm(sum_OI, dim=1))[:, None]


def add_adapters(model: PreTrainedModel, lora: LoraConfig, stored: Path | None) -> Any:
    """Puts adapters beside the layers and leaves only them to be trained, in float32; returns peft's configuration.

    stored: a checkpoint's directory `adapter`, whose adapters they are to be; else new ones, which add nothing yet, the
    same on every rank. UserError: peft is not installed, or `target_modules` names no layer or the output layer.
    """
    peft = import_peft()
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.target_modules or "all-linear",
        use_rslora=lora.rank_stabilised,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            peft.inject_adapter_in_model(config, model)
        except ValueError as error:
            raise UserError("student.lora.target_modules", lora.target_modules, "names of linear layers") from error
    if any(name.startswith("lm_head.") and "lora_" in name for name, _ in model.named_parameters()):
        raise UserError("student.lora.target_modules", "the output layer", "layers of the decoder")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    modules: list[Any] = list(model.modules()) if lora.dora else []
    for layer in modules:
        if lengths := getattr(layer, "lora_magnitude_vector", None):
            # In float32: peft has rounded them to the weight's dtype.
            lengths[ADAPTER].weight.data = torch.linalg.norm(layer.base_layer.weight.detach().float(), dim=1)
    if stored is not None:
        file = StoredTensors(stored / ADAPTER_FILE)
        for name, tensor in adapter_tensors(model).items():
            tensor.copy_(file.like(name, tensor))
    return config


def import_peft() -> Any:
    """The library. UserError: it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError("student.lora", "no library peft", "pip install peft accelerate") from error
    return peft


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The trained matrices, by their names in peft's file."""
    named = ((name, parameter) for name, parameter in model.named_parameters() if "lora_" in name)
    return {BEFORE + name.replace(f".{ADAPTER}.", "."): parameter.detach() for name, parameter in named}


def merged_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor | Merged]]:
    """The model's weights by the names that they had without adapters, each once, in the same order."""
    modules: dict[str, Any] = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        layer, _, kind = name.rpartition(".base_layer.")
        if not layer:
            yield name, parameter.detach()
        elif kind != "weight":
            yield f"{layer}.{kind}", parameter.detach()
        else:
            beside = modules[layer]
            down, up = (beside.lora_A[ADAPTER].weight, beside.lora_B[ADAPTER].weight)
            scale, lengths = beside.scaling[ADAPTER], beside.lora_magnitude_vector
            rows = lengths[ADAPTER].weight.detach() if lengths else None
            yield f"{layer}.weight", Merged(parameter.detach(), down.detach(), up.detach(), scale, rows)
