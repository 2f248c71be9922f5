"""Builds AdamW, and lists the optimiser's state for checkpoints.

With `learner.offload_optimizer` the two moments of AdamW, 8 bytes a parameter, stay in host memory between steps.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from learner.config import OptimizerConfig
from learner.student.sharding import own_rows

MOMENTS = ("exp_avg", "exp_avg_sq")
"""torch's names of AdamW's running means of the gradient and of its square."""


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose moments are in host memory between steps; the result is bit-equal to torch.optim.AdamW.

    Between steps a moment in `state` is a shell: a tensor with shape and layout, whose storage is freed. A step restores
    the moments of one parameter at a time.
    """

    def __init__(self, *arguments: Any, **keywords: Any):
        """Takes the arguments of torch.optim.AdamW."""
        super().__init__(*arguments, **keywords)
        self._host: dict[int, Tensor] = {}
        """id of a shell -> its values: this rank's rows, in pinned memory where the device is a GPU."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient. closure: not supported."""
        assert closure is None
        # AdamW updates each parameter from its own state alone, so one step of a group is the same as one of each of its
        # parameters. The base class reads `param_groups`, which therefore holds a single parameter at a time.
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    for moment in self._moments(parameter):
                        self._restore(moment)
                    self.param_groups = [{**group, "params": [parameter]}]
                    super().step()
                    self.offload(parameter)
        finally:
            self.param_groups = groups

    def offload(self, parameter: Tensor) -> None:
        """Copies the parameter's moments to host memory and frees their storage: after a step or a load."""
        for moment in self._moments(parameter):
            local, _ = own_rows(moment)
            host = self._host.get(id(moment))
            if host is None:
                host = self._host[id(moment)] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
            host.copy_(local)
            # The tensor object stays: torch's state and `_host` refer to it.
            local.untyped_storage().resize_(0)

    def host_values(self, moment: Tensor) -> Tensor | None:
        """This rank's rows of an offloaded moment; None if the tensor is not offloaded."""
        return self._host.get(id(moment))

    def _moments(self, parameter: Tensor) -> Iterator[Tensor]:
        state = self.state.get(parameter, {})
        return (state[name] for name in MOMENTS if name in state)

    def _restore(self, moment: Tensor) -> None:
        """Allocates the storage of a shell again and copies the values back."""
        local, _ = own_rows(moment)
        host = self._host[id(moment)]
        local.untyped_storage().resize_(host.nbytes)
        local.copy_(host)


def build_optimizer(
    model: torch.nn.Module, config: OptimizerConfig, *, offload: bool = False, fused: bool = True
) -> torch.optim.AdamW:
    """AdamW over all trainable parameters. offload: moments in host memory.

    fused: one kernel that writes in place. Otherwise torch computes lists of tensors on a GPU, with 4 bytes of temporaries a
    parameter, and one parameter after the other on a CPU or where they are sharded, with eight passes over each.

    Weight decay acts on matrices only: it would pull the scales of norms, which are near 1, towards 0.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    kind = OffloadedAdamW if offload else torch.optim.AdamW
    betas = (config.beta1, config.beta2)
    return kind(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=fused or None)


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's state by parameter name: `<name>.exp_avg`, `<name>.exp_avg_sq`, `<name>.step`.

    Names, not torch's parameter indices, so that a checkpoint does not depend on the order of the parameters. Offloaded
    moments are shells (`OffloadedAdamW.host_values`).
    """
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, read: Callable[[str, torch.Tensor], torch.Tensor]
) -> None:
    """The inverse of `optimizer_tensors`.

    read: (name, template) -> the stored tensor of that name, on the template's device and sharded like it.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            moments = {key: read(f"{name}.{key}", parameter.detach()) for key in MOMENTS}
            # The fused kernel counts the steps on the device.
            where = parameter.device if optimizer.defaults["fused"] else "cpu"
            step = read(f"{name}.step", torch.zeros(())).to(where)
            if isinstance(optimizer, OffloadedAdamW):
                # A tensor read from a file may be a view of the mapped file, whose storage cannot be resized.
                moments = {key: value.clone() for key, value in moments.items()}
            optimizer.state[parameter] = {"step": step, **moments}
            if isinstance(optimizer, OffloadedAdamW):
                optimizer.offload(parameter)
