"""Builds the student: loads the model, adds adapters, compiles the layers and shards them over the ranks, in this order.

The student stays in evaluation mode: in training mode some models drop activations, layers or experts at random, under
many names. The policy that is trained must be the one that was sampled.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import PreTrainedModel

from actors.config import StudentConfig
from actors.data.models import load_model, response_head
from actors.errors import UserError
from actors.forward.packing import attend_uncompiled, hidden_states, use_packed_attention
from actors.forward.slices import KEY, check_slices
from learner.config import LearnerConfig
from learner.memory_items import Item, LearnerNumbers, ModelNumbers, learner_items, peak
from learner.student.lora import add_adapters
from learner.student.sharding import Ranks, decoder_layers

ROOM = 0.85
"""Share of a device's memory that a copy of the weights for each node may fill, by the formula. The rest is for the
allocator's gaps, for NCCL, and for scores of the update, whose size the lengths of its responses decide."""


class Student(NamedTuple):
    """The model that the learner trains."""

    model: PreTrainedModel
    body: torch.nn.Module
    """The model without its output layer."""
    pass_tokens: int
    """Tokens of one forward pass. 1 if the model cannot take packed sequences: every sequence then has its own pass."""
    adapter: Any
    """peft's configuration of the adapters; None if all weights are trained."""


def build_student(
    student: StudentConfig,
    config: LearnerConfig,
    checkpoint: str | None,
    ranks: Ranks,
    device: str,
    *,
    averages: int = 0,
) -> Student:
    """Builds the student with the weights of `student.model`, or of the directory `checkpoint`.

    averages: moving averages of the weights that the learner will keep.

    Trained weights are float32. With adapters the frozen weights have the compute dtype: they are never updated, so more
    precision would be lost in every pass. Until a layer is sharded, its weights stay in the mapped files, where the ranks
    of a node share them. UserError: see load_model, add_adapters, compile_layers, check_slices and Ranks.shard; or ranks
    cannot share the rows of this model.
    """
    # Checks by forward passes come before compiling and sharding, which would make them slow or collective. Adapters come
    # before sharding, so that they are sharded, too.
    lora = student.lora
    # A checkpoint's model.safetensors holds merged weights. With adapters the frozen weights are those of `student.model`.
    model = load_model(
        student.model if lora or checkpoint is None else checkpoint,
        config.compute_dtype if lora else None,
        "cpu" if ranks.sharded else device,  # with several ranks a device may only have room for its shard
        trust_remote_code=student.trust_remote_code,
        key="student.model",
    )
    sizes = partial(_rank_items, model, config, averages)
    if device != "cpu":  # whose memory is not the rank's alone
        _demand_room(sizes(ranks.size, adapter=0 if lora else None), ranks.size, device)
    cast = partial(_as_trained, device=device, dtype=None if lora else torch.float32)
    if not ranks.sharded:
        cast(model)
    body, _, _ = response_head(model, "student.model")
    # In the dtype of the masters, which shows the weakest influence between sequences.
    with nullcontext() if lora or not ranks.sharded else computed_in_float32(model):
        packed = use_packed_attention(model)
    check_slices(model.config, config.sequence_parallel)
    if config.sequence_parallel > 1 and not packed:
        found = (
            f"{config.sequence_parallel} and {type(model).__name__}, in which more than attention passes between tokens"
        )
        raise UserError(KEY, found, "1, or a model whose attention can be replaced (docs/scaling.md)")
    model.requires_grad_(True)
    stored = Path(checkpoint, "adapter") if checkpoint else None
    adapter = add_adapters(model, lora, stored) if lora else None
    model.eval()  # new modules, of adapters for example, are in training mode
    check_repeatable(model)
    if config.compile:
        compile_layers(model)
    if config.gradient_checkpointing:
        recompute_layers(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if lora else None

    def fits(size: int) -> bool:
        return peak(sizes(size, adapter=trained))[0] <= ROOM * device_bytes(device)

    ranks.shard(model, device, getattr(torch, config.compute_dtype), fits, cast)
    return Student(model, body, config.microbatch_tokens if packed else 1, adapter)


def device_bytes(device: str) -> int:
    """Memory of a rank's device; 0 for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device != "cpu" else 0


def _rank_items(
    model: PreTrainedModel, config: LearnerConfig, averages: int, ranks: int, *, adapter: int | None
) -> list[Item]:
    """The memory of a rank, where so many share the weights. adapter: trained parameters beside the model's own."""
    total = sum(p.numel() for p in model.parameters()) - (adapter or 0)
    numbers = ModelNumbers.of(model.config.get_text_config(), total)
    run = LearnerNumbers.of(config, ranks=ranks, averages=averages, adapter_parameters=adapter)
    return learner_items(numbers, run)


def _demand_room(items: list[Item], ranks: int, device: str) -> None:
    """UserError: the device is too small for what this rank will hold for certain. Moments come with the first step."""
    there, (least, parts) = device_bytes(device), peak(items, certain=True)
    if least > there:
        listed = ", ".join(f"{part.name} {part.nbytes / 1e9:.1f}" for part in parts if part.nbytes > 5e7)
        expected = f"at most the {there / 1e9:.1f} GB of {torch.cuda.get_device_name(device)}: more ranks, or "
        raise UserError(
            "learner.replicas",
            f"{ranks}, with which each rank holds {least / 1e9:.1f} GB at least ({listed})",
            expected + "learner.offload_optimizer: true",
        )


def _as_trained(module: torch.nn.Module, device: str, dtype: torch.dtype | None) -> None:
    """Moves a module to its device and dtype, one tensor at a time. dtype: None leaves it as it is."""
    module.to(device=device, dtype=dtype)


@contextmanager
def computed_in_float32(model: torch.nn.Module) -> Iterator[None]:
    """Within the block, modules compute with float32 copies of their 16-bit weights, which they drop after the pass."""
    kept: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(module: torch.nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            kept[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = kept.pop(parameter)

    modules = [module for module in model.modules() if any(p.dtype.itemsize == 2 for p in module.parameters(False))]
    hooks = [module.register_forward_pre_hook(widen) for module in modules]
    hooks += [module.register_forward_hook(restore, always_call=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_repeatable(model: PreTrainedModel) -> None:
    """UserError: two passes over the same tokens differ, as with dropout that is on in evaluation mode.

    The ratio of such a model is not 1 before the first step, and its gradient is that of another policy.
    """
    tokens = np.arange(32) % model.config.get_text_config().vocab_size
    device = str(model.get_input_embeddings().weight.device)
    with torch.no_grad():
        first, second = (hidden_states(model.base_model, tokens, np.array([32]), device) for _ in range(2))
    # Kernels of GPUs may add in another order; what is dropped at random makes a much larger difference. NaN is not
    # random: an update names the trajectory that meets it.
    if (first - second).nan_to_num().abs().max() > 0.01 * first.nan_to_num().abs().max():
        found = f"{type(model).__name__}, whose hidden states of the same tokens differ from pass to pass"
        raise UserError("student.model", found, "a model without dropout or noise in evaluation mode")


def recompute_layers(model: PreTrainedModel) -> None:
    """Drops the activations inside each decoder layer, and computes them again in the backward pass.

    Not by transformers' `gradient_checkpointing_enable`, which needs the training mode. Call it after compiling and
    before sharding: a layer's weights are then gathered once for the recomputation and the backward pass.
    UserError: the model does not name its layer classes.
    """
    layers = decoder_layers(model)
    if not layers:
        found = f"true and {type(model).__name__}"
        raise UserError("learner.gradient_checkpointing", found, "false, or a model of known layers")
    for layer in layers:
        layer.forward = partial(_forward_recomputed, layer.forward)


def _forward_recomputed(forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **keywords)
    return recomputed(forward, *arguments, use_reentrant=False, **keywords)


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles the forward of each decoder layer with torch.compile, with dynamic shapes for batches of any size.

    Compiling fuses the small operations between the matrix products. Call it before sharding, so that gathering weights
    and recomputing activations stay outside the compiled code.
    UserError: torch.compile is disabled in this process, or there is neither a GPU nor a C++ compiler.
    """
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1" or torch._dynamo.config.disable:
        raise UserError("learner.compile", "true, and TORCH_COMPILE_DISABLE", "false, or an environment without it")
    if not torch.cuda.is_available() and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise UserError("learner.compile", "true, and no C++ compiler", "false, or g++ where the learner runs")
    layers = decoder_layers(model)
    if not layers:
        raise UserError("learner.compile", f"true and {type(model).__name__}", "false, or a model of known layers")
    # Sequence boundaries differ from pass to pass, and would become constants in the compiled code.
    attend_uncompiled()
    for layer in layers:
        # The method, not the module: compiling the module would add `_orig_mod` to every parameter's name.
        layer.forward = torch.compile(layer.forward, dynamic=True)
