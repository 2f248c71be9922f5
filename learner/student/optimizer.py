"""AdamW, its schedule, and the state of it that a checkpoint keeps."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from learner.config import OptimizerConfig
from learner.student.sharding import own_rows

MOMENTS = ("exp_avg", "exp_avg_sq")


class OffloadedAdamW(torch.optim.AdamW):
    """Between steps the moments in `state` are shells: their shape and layout, but no memory."""

    def __init__(self, *arguments: Any, **keywords: Any):
        """As torch.optim.AdamW."""
        super().__init__(*arguments, **keywords)
        self._host: dict[int, Tensor] = {}
        """By the id of the shell."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        assert closure is None
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    for moment in self._moments(parameter):
                        self._bring(moment)
                    self.param_groups = [{**group, "params": [parameter]}]
                    super().step()
                    self.rest(parameter)
        finally:
            self.param_groups = groups

    def rest(self, parameter: Tensor) -> None:
        """Sends the parameter's moments to host memory: after its step, and when they have been loaded."""
        for moment in self._moments(parameter):
            local, _ = own_rows(moment)
            host = self._host.get(id(moment))
            if host is None:
                host = self._host[id(moment)] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
            host.copy_(local)
            local.untyped_storage().resize_(0)

    def in_host(self, moment: Tensor) -> Tensor | None:
        """The values behind a shell, this rank's rows of them; None for what is no shell."""
        return self._host.get(id(moment))

    def _moments(self, parameter: Tensor) -> Iterator[Tensor]:
        state = self.state.get(parameter, {})
        return (state[name] for name in MOMENTS if name in state)

    def _bring(self, moment: Tensor) -> None:
        local, _ = own_rows(moment)
        host = self._host[id(moment)]
        local.untyped_storage().resize_(host.nbytes)
        local.copy_(host)


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig, *, offload: bool = False) -> torch.optim.AdamW:
    """AdamW over all trainable parameters; decay acts on matrices, not on norms and biases. offload: moments in host memory."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    kind = OffloadedAdamW if offload else torch.optim.AdamW
    return kind(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon)


def learning_rate(update: int, total_updates: int, config: OptimizerConfig) -> float:
    """Rate of the update with this number, counted from 1: linear warm-up, then the schedule.

    The last of `total_updates` is taken at `final_fraction` of the peak (unless the schedule is constant).
    """
    if update <= config.warmup_updates:
        return config.learning_rate * update / (config.warmup_updates + 1)
    progress = min(1.0, (update - config.warmup_updates) / max(1, total_updates - config.warmup_updates))
    remaining = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[config.schedule]
    floor = 1.0 if config.schedule == "constant" else config.final_fraction
    return config.learning_rate * (floor + (1 - floor) * remaining)


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state by parameter name: `<name>.exp_avg`, `<name>.exp_avg_sq`, `<name>.step`; shells, where its
    values are in host memory."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, read: Callable[[str, torch.Tensor], torch.Tensor]
) -> None:
    """The inverse of `optimizer_tensors`. read: (name, a tensor) -> that state, laid out as the tensor is."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moments = {key: read(f"{name}.{key}", parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
            step = read(f"{name}.step", torch.zeros(()))
            if isinstance(optimizer, OffloadedAdamW):  # whose memory is given back, which a file's cannot be
                moments = {key: value.clone() for key, value in moments.items()}
            optimizer.state[parameter] = {"step": step, **moments}
            if isinstance(optimizer, OffloadedAdamW):
                optimizer.rest(parameter)
