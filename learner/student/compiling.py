"""torch.compile of the decoder layers: what is left to it are the many small operations between the products of matrices."""

import os
import shutil

import torch
from transformers import PreTrainedModel

from actors.errors import UserError
from actors.forward.packing import attend_uncompiled
from learner.student.sharding import decoder_layers


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles the forward pass of each layer, once for batches of all sizes; before the layers are sharded.

    Attention stays as it is: where sequences begin and end is another in each pass, and would be compiled in. What is
    around a layer, gathering its weights and computing it again, stays outside. UserError: compilation is turned off in
    this process, or, without a GPU, there is no C++ compiler.
    """
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1" or torch._dynamo.config.disable:
        raise UserError("learner.compile", "true, and TORCH_COMPILE_DISABLE", "false, or an environment without it")
    if not torch.cuda.is_available() and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise UserError("learner.compile", "true, and no C++ compiler", "false, or g++ where the learner runs")
    layers = decoder_layers(model)
    if not layers:
        raise UserError("learner.compile", f"true and {type(model).__name__}", "false, or a model of known layers")
    attend_uncompiled()
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
