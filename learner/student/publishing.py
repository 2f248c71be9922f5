"""What the learner publishes: weights as buckets in the dtype that engines load, whole or as what changed.

Each rank lays out the rows that it has, and says what changed in them, without a word to the others: nothing is gathered.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from actors.weights.buckets import Buffer, Version, WeightVersion, pack, pack_all
from actors.weights.delta import DeltaVersion, encode_delta
from learner.student.lora import Merged
from learner.student.sharding import own_rows

MOST_OF_DENSE = 0.8
"""A delta of more than this share of the weights does not travel: decoding it costs more than it saves."""

Named = Sequence[tuple[str, torch.Tensor | Merged]]
"""Names and tensors, in rows over the ranks where there are several."""


class Publisher:
    """Lays out this rank's rows of tensors. An engine puts those of all ranks together (actors/weights/buckets.py, `join`)."""

    def __init__(self, bucket_bytes: int, *, keep: bool):
        """keep: holds on to what `full_or_delta` published, so that a delta can be taken."""
        self._bucket_bytes, self._keep = bucket_bytes, keep
        self._published: Version | None = None
        self._buffer = Buffer()

    def full(self, version: int, named: Named, dtype: str) -> Iterator[np.ndarray | WeightVersion]:
        """Buckets, each when it is filled, to be copied before the next is asked for; then the manifest."""
        return pack(version, _rows(named), dtype, self._bucket_bytes, self._buffer)

    def full_or_delta(
        self, version: int, named: Named, dtype: str, *, delta: bool
    ) -> Iterator[np.ndarray | WeightVersion | DeltaVersion]:
        """delta: what changed since the version that was published before, as one bucket, unless that saves nothing."""
        if not self._keep:
            yield from self.full(version, named, dtype)
            return
        manifest, buckets = pack_all(version, _rows(named), dtype, self._bucket_bytes)
        base, self._published = self._published, (manifest, buckets)
        if delta and base is not None:
            change, payload = encode_delta(*base, manifest, buckets)
            if change.nbytes < MOST_OF_DENSE * manifest.nbytes:
                yield payload
                yield change
                return
        # Not `yield from`: Ray sends into generators, and what they delegate to must take it.
        for bucket in buckets:  # noqa: UP028
            yield bucket
        yield manifest


def _rows(named: Named) -> list[tuple[str, torch.Tensor | Merged]]:
    """What this rank has of each: all of it, where there is one rank."""
    return [
        (name, tensor.rows() if isinstance(tensor, Merged) else own_rows(tensor.detach())[0]) for name, tensor in named
    ]


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
