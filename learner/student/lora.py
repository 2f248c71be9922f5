"""Adds low-rank adapters (LoRA, arXiv 2106.09685) to the student through peft, and merges them for publishing.

Beside each linear layer's frozen weight W [O, I] two matrices are trained: `down` A [r, I] and `up` B [O, r].

    LoRA   W' = W + s B A                      s = alpha / r, or alpha / sqrt(r) with rank_stabilised
    DoRA   W'_o = m_o (W + s B A)_o / |(W + s B A)_o|    for each row o, m [O] trained (arXiv 2402.09353, eq. 5)

Unless engines load the adapter itself, W' is published, one merged layer at a time. A checkpoint's model holds W', and its
directory `adapter/` holds the adapter alone, in the format of `PeftModel.from_pretrained`.
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
"""peft's name of the only adapter."""
ADAPTER_FILE = "adapter_model.safetensors"
NAME_PREFIX = "base_model.model."
"""Prefix of the parameter names in peft's files."""


@dataclass(frozen=True, slots=True)
class Merged:
    """A weight with its adapter added, computed on request: holding all merged weights would take the model's size again."""

    weight_OI: Tensor
    down_rI: Tensor
    up_Or: Tensor
    scale: float
    magnitudes_O: Tensor | None = None
    """DoRA's trained norms of the rows; None for LoRA."""

    @property
    def shape(self) -> torch.Size:
        """(O, I)."""
        return self.weight_OI.shape

    def own_rows(self) -> "Merged":
        """This rank's rows of the merged weight."""
        magnitudes = None if self.magnitudes_O is None else own_rows(self.magnitudes_O)[0]
        # `down` stays sharded: every row of B A needs all of A, which `full_tensor` gathers.
        return replace(
            self, weight_OI=own_rows(self.weight_OI)[0], up_Or=own_rows(self.up_Or)[0], magnitudes_O=magnitudes
        )

    @torch.no_grad()
    def full_tensor(self) -> Tensor:
        """[O, I] float32: W', by the formulas above. A collective: with several ranks, all must call it."""
        sum_OI = (
            full_tensor(self.weight_OI)
            .float()
            .addmm(full_tensor(self.up_Or), full_tensor(self.down_rI), alpha=self.scale)
        )
        if self.magnitudes_O is None:
            return sum_OI
        return sum_OI * (full_tensor(self.magnitudes_O) / torch.linalg.norm(sum_OI, dim=1))[:, None]


def add_adapters(model: PreTrainedModel, lora: LoraConfig, stored: Path | None) -> Any:
    """Injects adapters into the model and makes them its only trainable parameters, in float32. Returns peft's config.

    stored: a checkpoint's directory `adapter/` to load. None: new adapters with B = 0, which change nothing yet.
    UserError: peft is not installed, or `target_modules` names no layer or the output layer.
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
    # All ranks must draw the same A. The fork restores the process's own random state afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            peft.inject_adapter_in_model(config, model)
        except ValueError as error:
            raise UserError("student.lora.target_modules", lora.target_modules, "names of linear layers") from error
    # The learner applies the head's weight itself, in chunks, and would miss an adapter there.
    if any(name.startswith("lm_head.") and "lora_" in name for name, _ in model.named_parameters()):
        raise UserError("student.lora.target_modules", "the output layer", "layers of the decoder")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # in half precision small updates would round to nothing
    modules: list[Any] = list(model.modules()) if lora.dora else []
    for layer in modules:
        if magnitudes := getattr(layer, "lora_magnitude_vector", None):
            # In float32: peft has rounded the norms to the weight's dtype, and a new adapter (B = 0) must change nothing.
            magnitudes[ADAPTER].weight.data = torch.linalg.norm(layer.base_layer.weight.detach().float(), dim=1)
    if stored is not None:
        file = StoredTensors(stored / ADAPTER_FILE)
        for name, tensor in adapter_tensors(model).items():
            tensor.copy_(file.like(name, tensor))
    return config


def import_peft() -> Any:
    """The module peft. UserError: it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError("student.lora", "no library peft", "pip install peft accelerate") from error
    return peft


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The trained tensors by their names in peft's file."""
    named = ((name, parameter) for name, parameter in model.named_parameters() if "lora_" in name)
    return {NAME_PREFIX + name.replace(f".{ADAPTER}.", "."): parameter.detach() for name, parameter in named}


def merged_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor | Merged]]:
    """(name, weight) of the model without adapters, in the model's order; adapted weights are `Merged`."""
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
            adapted = modules[layer]
            down, up = adapted.lora_A[ADAPTER].weight, adapted.lora_B[ADAPTER].weight
            scale, vectors = adapted.scaling[ADAPTER], adapted.lora_magnitude_vector
            magnitudes = vectors[ADAPTER].weight.detach() if vectors else None
            yield f"{layer}.weight", Merged(parameter.detach(), down.detach(), up.detach(), scale, magnitudes)
