"""AdamW whose moments lie in host memory, so that a device holds 8 bytes a parameter less between steps and in passes.

One parameter's moments at a time come to the device, where its step is taken as ever, and go back: the result is that of
AdamW to the bit, and what it costs is their way there and back, once a step.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

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
