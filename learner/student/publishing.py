"""Publishes the learner's weights as buckets in the engines' dtype, dense or as a delta, and keeps teachers' averages.

Each rank packs its own rows and encodes the delta of these rows, without communication: nothing is gathered. An engine
joins the rows of all ranks (`join` in actors/weights/buckets.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from actors.weights.buckets import Buffer, Version, WeightVersion, pack, pack_all
from actors.weights.delta import DeltaVersion, encode_delta
from learner.student.lora import Merged
from learner.student.sharding import own_rows

MAX_DELTA_SHARE = 0.8
"""A delta above this share of the dense weights' bytes is not sent: decoding it costs more time than it saves."""

Named = Sequence[tuple[str, torch.Tensor | Merged]]
"""(name, tensor) pairs; with several ranks the tensors are sharded by rows."""


class Publisher:
    """Packs this rank's rows of each tensor into buckets."""

    def __init__(self, bucket_bytes: int, *, keep: bool):
        """bucket_bytes: the size of a bucket. keep: keeps a copy of the last version, the base of the next delta."""
        self._bucket_bytes, self._keep = bucket_bytes, keep
        self._published: Version | None = None
        self._buffer = Buffer()

    def full(self, version: int, named: Named, dtype: str) -> Iterator[np.ndarray | WeightVersion]:
        """Yields each bucket as soon as it is full, then the manifest. dtype: of the published weights.

        The buckets share one buffer: copy a bucket before you ask for the next.
        """
        return pack(version, _rows(named), dtype, self._bucket_bytes, self._buffer)

    def full_or_delta(
        self, version: int, named: Named, dtype: str, *, delta: bool
    ) -> Iterator[np.ndarray | WeightVersion | DeltaVersion]:
        """Yields buckets and their manifest, or with `delta` the payload and manifest of the changes since the last version.

        It sends the dense weights when there is no last version, or when the delta is above MAX_DELTA_SHARE.
        """
        if not self._keep:
            yield from self.full(version, named, dtype)
            return
        manifest, buckets = pack_all(version, _rows(named), dtype, self._bucket_bytes)
        base, self._published = self._published, (manifest, buckets)
        if delta and base is not None:
            change, payload = encode_delta(*base, manifest, buckets)
            if change.nbytes < MAX_DELTA_SHARE * manifest.nbytes:
                yield payload
                yield change
                return
        # Not `yield from`: Ray calls send() on generators, which a list's iterator does not have.
        for bucket in buckets:  # noqa: UP028
            yield bucket
        yield manifest


def _rows(named: Named) -> list[tuple[str, torch.Tensor | Merged]]:
    """This rank's rows of each tensor; with one rank, all rows."""
    return [
        (name, tensor.own_rows() if isinstance(tensor, Merged) else own_rows(tensor.detach())[0])
        for name, tensor in named
    ]


class MovingAverages:
    """Float32 averages of the student's weights, one for each teacher with `ema_decay`.

    After each update: average <- decay * average + (1 - decay) * weights. Each rank averages its own rows.
    """

    def __init__(self, model: torch.nn.Module, decays: Mapping[str, float]):
        """Starts from the current weights. decays: teacher -> decay, 0 < decay < 1."""
        self._model, self._decays = model, decays
        self._averages = {
            teacher: {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            for teacher in decays
        }

    @torch.no_grad()
    def follow(self) -> None:
        """One step of every average, after an update."""
        parameters = dict(self._model.named_parameters())
        for teacher, average in self._averages.items():
            for name, tensor in average.items():
                # a + (1 - d) (w - a) is d a + (1 - d) w in one pass over memory.
                tensor.lerp_(parameters[name], 1 - self._decays[teacher])

    def weights_of(self, teacher: str) -> list[tuple[str, torch.Tensor]]:
        """(name, tensor) pairs of one teacher's weights."""
        return list(self._averages[teacher].items())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All averages, named `<teacher>/<parameter>`, for a checkpoint."""
        return {f"{teacher}/{name}": tensor for teacher in self._averages for name, tensor in self.weights_of(teacher)}

    def load(self, read: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """The inverse of `tensors`.

        read: (name, template) -> the stored tensor of that name, on the template's device and sharded like it.
        """
        for name, tensor in self.tensors().items():
            tensor.copy_(read(name, tensor))
