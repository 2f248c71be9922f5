"""A learner holds no copies of its weights."""

import gc
import time
from pathlib import Path

import numpy as np

from benchmarks.memory import live_bytes
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import make_learner, received, sampled


def test_a_learner_holds_weights_moments_and_a_bucket_once_it_has_published_and_saved(
    tmp_path: Path, models: dict[str, Path]
) -> None:
    large = make_tiny_model(tmp_path / "large", hidden=256, layers=2)
    written, scores = sampled(models, "other", "sampled")
    gc.collect()
    before = live_bytes()
    learner = make_learner({"student": large}, bucket_bytes=1 << 16)
    parameters = sum(p.numel() for p in learner._model.parameters())
    for _ in range(2):
        learner.update(written.ids, written, scores)
        received(learner.publish())
        learner.save(str(tmp_path / "saved"))
        while not learner.saved():
            time.sleep(0.001)
    learner._write._thread.shutdown()  # its thread may hold the copies for a moment longer
    gc.collect()
    bucket = max(p.nbytes for p in learner._model.parameters())
    assert parameters > 1e6 and np.isclose(live_bytes() - before, 12 * parameters + bucket, rtol=0.03)
