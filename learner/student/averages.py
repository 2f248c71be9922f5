"""Moving averages of the student's weights, from which teachers are made that follow it.

The learner keeps them: it alone sees every version once and in order, and what it keeps is saved with the optimiser's
state, so that a campaign that is taken up again has the same averages to the bit.
"""

from collections.abc import Callable, Mapping

import torch


class MovingAverages:
    """One average, in float32, for each teacher that follows: after each update, decay x average + (1 - decay) x weights."""

    def __init__(self, model: torch.nn.Module, decays: Mapping[str, float]):
        """Starts with the weights as they are; decays: teacher -> decay, 0 < decay < 1."""
        self._model, self._decays = model, decays
        self._averages = {
            teacher: {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            for teacher in decays
        }

    @torch.no_grad()
    def follow(self) -> None:
        """Takes one step towards the model's weights."""
        parameters = dict(self._model.named_parameters())
        for teacher, average in self._averages.items():
            for name, tensor in average.items():
                tensor.lerp_(parameters[name], 1 - self._decays[teacher])

    def of(self, teacher: str) -> list[tuple[str, torch.Tensor]]:
        """(name, tensor) of a teacher's weights."""
        return list(self._averages[teacher].items())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, for a checkpoint."""
        return {f"{teacher}/{name}": tensor for teacher in self._averages for name, tensor in self.of(teacher)}

    def load(self, read: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """The inverse of `tensors`. read: (name, a tensor) -> what was stored, laid out as the tensor is."""
        for name, tensor in self.tensors().items():
            tensor.copy_(read(name, tensor))
