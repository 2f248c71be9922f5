"""What the learner publishes: weights as buckets in the dtype that engines load, whole or as what changed."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from actors.delta import DeltaVersion, encode_delta
from actors.weights import Deferred, WeightVersion, gathered, pack, pack_whole
from learner.sharding import Ranks

MOST_OF_DENSE = 0.8
"""A delta of more than this share of the weights does not travel: decoding it costs more than it saves."""

Named = Sequence[tuple[str, torch.Tensor | Deferred]]
"""Names and tensors, in rows over the ranks where there are several. One at a time is put together."""


class Publisher:
    """Lays out tensors on the first rank; the other ranks only have a part in putting each together, and yield nothing."""

    def __init__(self, ranks: Ranks, bucket_bytes: int, *, keep: bool):
        """keep: holds on to what `whole_or_delta` published, so that a delta can be taken."""
        self._ranks, self._bucket_bytes, self._keep = ranks, bucket_bytes, keep
        self._published: tuple[WeightVersion, list[np.ndarray]] | None = None

    def whole(self, version: int, named: Named, dtype: str) -> Iterator[np.ndarray | WeightVersion]:
        """Buckets, each when it is filled, then the manifest."""
        if self._ranks.rank == 0:
            yield from pack(version, named, dtype, self._bucket_bytes)
        else:
            for _, tensor in named:
                gathered(tensor, dtype)

    def whole_or_delta(
        self, version: int, named: Named, dtype: str, *, delta: bool
    ) -> Iterator[np.ndarray | WeightVersion | DeltaVersion]:
        """delta: what changed since the version that was published before, as one bucket, unless that saves nothing."""
        if not self._keep or self._ranks.rank:
            yield from self.whole(version, named, dtype)
            return
        manifest, buckets = pack_whole(version, named, dtype, self._bucket_bytes)
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
