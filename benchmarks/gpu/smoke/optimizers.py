"""(c) AdamW in its forms over the parameters of a real shape: seconds and memory of a step, and moments in host memory."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.smoke.report import Report
from benchmarks.gpu.smoke.timing import free, peak_bytes, seconds_of
from learner.config import OptimizerConfig
from learner.student.optimizer import build_optimizer

FORMS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "one by one": {"foreach": False, "fused": False},
}


def adamw(report: Report, options: argparse.Namespace) -> None:
    """Each form: time, memory above what it holds, and how far its weights are from those of a step one by one."""
    shape = options.shape
    forms: dict[str, Callable[[torch.nn.Module], torch.optim.Optimizer]] = {
        name: (lambda model, how=how: torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, **how))
        for name, how in FORMS.items()
    }  # fmt: skip
    config = OptimizerConfig(learning_rate=1e-3)
    forms |= {
        "as the learner has it": lambda model: build_optimizer(model, config),
        "the learner's, moments in host memory": lambda model: build_optimizer(model, config, offload=True),
    }
    after: dict[str, list[torch.Tensor]] = {}
    for name, make in forms.items():
        model = network(shape, options.device)
        count = sum(p.numel() for p in model.parameters())
        optimizer = make(model)
        optimizer.step()  # makes the moments
        peak, before = peak_bytes(optimizer.step)
        optimizer.step()
        after[name] = [p.detach().cpu() for p in model.parameters()]
        report.figure(f"{name}: a step", seconds_of(optimizer.step, 3) * 1e3, "ms")
        report.figure(f"{name}: held", round(before / count, 2), "bytes a parameter")
        report.figure(f"{name}: more during a step", round((peak - before) / count, 2), "bytes a parameter")
        del model, optimizer
        free()
    exact = after["one by one"]
    for name, weights in after.items():
        # Three steps of 1e-3 each.
        error = max((a - b).abs().max().item() for a, b in zip(weights, exact, strict=True)) / 3e-3
        report.check(f"{name}: largest difference of the weights, in steps", error, 1e-3)
    pairs = zip(after["as the learner has it"], after["the learner's, moments in host memory"], strict=True)
    report.check("tensors that moments in host memory change", sum(not torch.equal(a, b) for a, b in pairs), 0)


def network(shape: str, device: str) -> torch.nn.Module:
    """The shape's parameters in float32, with gradients, from a seed."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPES[shape]), dtype=torch.float32)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    return model
