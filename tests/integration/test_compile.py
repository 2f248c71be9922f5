"""A learner whose layers are compiled takes the steps of one whose layers are not, also where the model has dropout."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.errors import UserError
from learner.config import OptimizerConfig
from tests import clean_process
from tests.tiny_architectures import ARCHITECTURES, make_architecture
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import make_learner, sampled
from tests.waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.integration


def compare(models: dict[str, Path]) -> None:
    """Updates of other compositions each; in a process in which compilation is not turned off, as vLLM does."""
    written, scores = sampled(models, "other")
    # With a larger epsilon: AdamW would make a whole step of a gradient that is rounding alone (the bias of the keys).
    steady = OptimizerConfig(learning_rate=1e-3, warmup_updates=0, epsilon=1e-5)
    plain, compiled = (
        make_learner(models, compile=on, gradient_checkpointing=on, optimizer=steady) for on in (False, True)
    )
    graphs: list[int] = []
    for count in (6, 2, 5, 3):
        ids = written.ids[np.random.default_rng(count).permutation(len(written))[:count]]
        ours, its = (learner.update(ids, written, scores) for learner in (plain, compiled))
        for name in ("loss", "grad_norm", "entropy", "reverse_kl"):
            assert abs(ours[name] - its[name]) < 1e-4 * max(1.0, abs(ours[name])), name
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[-1], f"compiled once, and not for each composition: {graphs}"
    for a, b in zip(plain._model.parameters(), compiled._model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)  # of steps of 1e-3


def test_compiled_layers_take_the_same_steps_and_are_compiled_once(tmp_path: Path) -> None:
    models = {name: make_architecture(tmp_path / name, *ARCHITECTURES["gpt2"], seed=seed)
              for seed, name in enumerate(("student", "other"))}  # fmt: skip
    process = clean_process.start(compare, models, log=tmp_path / "log")
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-3000:]


def test_where_compilation_is_turned_off_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TORCH_COMPILE_DISABLE", "1")
    models = {"student": make_tiny_model(tmp_path / "student", hidden=32, layers=1)}
    with pytest.raises(UserError, match=r"^learner\.compile: found true, and TORCH_COMPILE_DISABLE"):
        make_learner(models, compile=True)
