"""The weights of a model directory as a weight version, for engines that no learner publishes to."""

from collections.abc import Iterator

import numpy as np

from actors.data.models import load_model
from actors.weights.buckets import Buffer, WeightVersion, pack


class SavedModel:
    """Publishes one model as a learner would. A plain class, values in and values out."""

    def __init__(self, model: str, dtype: str, bucket_bytes: int, trust_remote_code: bool, key: str):
        """model: a Hugging Face model directory or hub name, loaded on the CPU. dtype: of the published weights. UserError: see
        `load_model`."""
        self._model = load_model(model, None, "cpu", trust_remote_code, key)
        self._dtype, self._bucket_bytes, self._buffer = dtype, bucket_bytes, Buffer()

    def publish(self) -> Iterator[np.ndarray | WeightVersion]:
        """Yields the buckets, each as soon as it is filled, then the manifest of version 0."""
        yield from pack(0, list(self._model.named_parameters()), self._dtype, self._bucket_bytes, self._buffer)

    def status(self) -> dict[str, float]:
        """Nothing to say."""
        return {}
