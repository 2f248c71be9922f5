"""The learner's settings of memory and speed leave the numbers of an update as they are, for models of many families."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.errors import UserError
from actors.teacher.local import LocalTeacher
from learner.config import ObjectiveConfig
from learner.student import build
from tests.tiny_architectures import ARCHITECTURES, REFUSED, make_architecture
from tests.tiny_updates import make_learner, random_trajectories, teacher_config

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layers computed again": {"gradient_checkpointing": True},
    "a pass for each trajectory": {"microbatch_tokens": 1},
    "all at once": {"gradient_checkpointing": True, "offload_optimizer": True, "microbatch_tokens": 30},
}


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Path]:
    """A student and a teacher of one architecture."""
    config, arguments, *_ = {**ARCHITECTURES, **REFUSED}[request.param]
    return {
        name: make_architecture(tmp_path / name, config, arguments, seed=seed)
        for seed, name in enumerate(("student", "other"))
    }


@pytest.mark.parametrize("pair", ARCHITECTURES, indirect=True)
def test_the_first_update_is_the_same_under_all_settings_and_on_policy(pair: dict[str, Path]) -> None:
    rng = np.random.default_rng(0)
    ids = [(0, i // 2, i % 2) for i in range(4)]
    written = random_trajectories(rng, ids, np.full(4, 4), rng.integers(3, 9, 4))
    # Not by the learner: its own passes could all be wrong in the same way.
    model = LocalTeacher(teacher_config(pair, "student", "sampled"))
    written.behaviour_logprobs[:] = model.score(written.ids, written)[1].logprobs
    scores = LocalTeacher(teacher_config(pair, "other", "full")).score(written.ids, written)[1]
    found = {}
    for name, changes in SETTINGS.items():
        learner = make_learner(pair, objective=ObjectiveConfig(estimator="full"), **changes)
        metrics = learner.update(written.ids, written, scores)
        gradient = torch.cat([p.grad.flatten() for p in learner._model.parameters() if p.grad is not None])
        found[name] = (metrics, gradient)
        assert metrics["clip_fraction"] == 0 and metrics["forward_kl_old"] < 1e-9
        assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
        assert not any(module.training for module in learner._model.modules())
    (metrics, gradient), *others = found.values()
    assert metrics["grad_norm"] > 0.1
    for other, its in others:
        for name in ("loss", "reverse_kl", "entropy", "grad_norm"):
            assert other[name] == pytest.approx(metrics[name], rel=1e-5), name
        torch.testing.assert_close(its, gradient, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pair", REFUSED, indirect=True)
def test_what_cannot_be_computed_exactly_is_refused(pair: dict[str, Path], request: pytest.FixtureRequest) -> None:
    *_, part = REFUSED[request.node.callspec.params["pair"]]
    with pytest.raises(UserError, match=part):
        make_learner(pair)


@pytest.mark.parametrize("pair", ["gpt2"], indirect=True)
def test_a_model_that_drops_in_evaluation_mode_too_is_refused(
    pair: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = torch.nn.Dropout.forward
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: torch.nn.functional.dropout(x, self.p))
    with pytest.raises(UserError, match=r"student\.model: .* differ from pass to pass, expected .* without dropout"):
        make_learner(pair)
    monkeypatch.setattr(torch.nn.Dropout, "forward", plain)
    monkeypatch.setattr(build, "decoder_layers", lambda model: [])
    with pytest.raises(UserError, match=r"learner\.gradient_checkpointing: found true and GPT2LMHeadModel"):
        make_learner(pair, gradient_checkpointing=True)
