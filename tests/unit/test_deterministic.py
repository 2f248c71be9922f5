"""`deterministic: true`: what every actor is started with, and that the learner has no operation that GPUs refuse then."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from actors import accelerator
from actors.errors import CampaignError, UserError
from actors.teacher.base import REPEATS, check_probe
from actors.teacher.local import LocalTeacher, repeats_of
from cluster.config_file import load_config
from cluster.fleet.ray_cluster import role_resources
from learner.config import MismatchConfig, ObjectiveConfig, TrustRegionConfig
from learner.objective.estimator_table import ESTIMATORS
from learner.objective.policy_gradient import running_sum
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import make_learner, sampled, teacher_config, weights_of

REFUSED = {"aten::cumsum", "aten::nll_loss_forward", "aten::histc", "aten::bincount", "aten::median", "aten::put_",
           "aten::kthvalue", "aten::grid_sampler_2d", "aten::embedding_bag", "aten::ctc_loss"}  # fmt: skip
"""Operations that torch refuses on a GPU with deterministic algorithms (torch.use_deterministic_algorithms), as far as a
language model could meet them. `cumsum` of integers is allowed."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    seeds = {"student": 0, "other": 7}
    return {name: make_tiny_model(folder / name, hidden=32, layers=1, seed=seed) for name, seed in seeds.items()}


@pytest.fixture
def switched_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(accelerator.SWITCH, "1")
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills


@pytest.mark.parametrize(("gpus", "private"), [(0.0, True), (0.0, False), (8.0, True), (8.0, False)])
def test_every_actor_is_started_with_the_switches_of_cublas_and_vllm(
    tmp_path: Path, gpus: float, private: bool
) -> None:
    path = tmp_path / "campaign.yaml"
    path.write_text("name: x\nstudent: {model: m}\nprompts: {path: p}\nteachers: {wise: {model: t}}\n")
    for exact in (False, True):
        needed = role_resources(load_config(path, [f"deterministic={exact}"]), gpus, private=private)
        assert needed.keys() == {"rollout", "teacher.wise", "learner"}
        for _, resources in needed.values():
            assert (resources.environment.items() >= accelerator.DETERMINISTIC.items()) == exact
            # On a CPU the mode has no kernels, and an engine does not start.
            assert (resources.environment.get("VLLM_BATCH_INVARIANT") == "1") == (exact and gpus > 0)
    assert "CUBLAS_WORKSPACE_CONFIG" in accelerator.DETERMINISTIC


@pytest.mark.usefixtures("switched_on")
def test_learner_and_teacher_turn_torchs_algorithms_on_and_find_the_same(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    assert torch.are_deterministic_algorithms_enabled()  # by the teacher
    torch.use_deterministic_algorithms(False)
    learner = make_learner(models)
    assert torch.are_deterministic_algorithms_enabled()
    learner.update(written.ids, written, scores)
    torch.use_deterministic_algorithms(False)
    again = make_learner(models)
    again.update(written.ids, written, scores)
    assert torch.equal(weights_of(learner), weights_of(again))


def test_nothing_is_turned_on_without_the_switch(models: dict[str, Path]) -> None:
    make_learner(models)
    assert not torch.are_deterministic_algorithms_enabled()


class Recorded(TorchDispatchMode):
    """The names of the operations on floating-point tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if any(isinstance(one, torch.Tensor) and one.is_floating_point() for one in arguments):
            self.names.add(function._schema.name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_update_has_no_operation_that_a_gpu_refuses(models: dict[str, Path], estimator: str) -> None:
    row = ESTIMATORS[estimator]
    written, scores = sampled(models, "other")
    written = replace(written, rewards=np.arange(6, dtype=np.float32))
    with Recorded() as seen:
        if row.text_by == "student":
            mismatch, region = MismatchConfig("truncate", "prefix"), TrustRegionConfig("exact", beta=0.1)
            weight = 0.5 if row.samples_action and not row.needs_reward else 0.0
            objective = ObjectiveConfig(
                estimator=estimator, mismatch=mismatch, trust_region=region, position_weight=weight
            )
            make_learner(models, objective=objective).update(written.ids, written, scores)
        make_learner(models, objective=ObjectiveConfig(estimator=estimator)).update(written.ids, written, scores)
    assert not seen.names & REFUSED and "aten::_log_softmax" in seen.names


def test_running_sums_are_those_of_cumsum() -> None:
    values = torch.randn(3, 37, dtype=torch.float64)
    torch.testing.assert_close(running_sum(values), values.cumsum(1))
    assert running_sum(values[:, :0]).shape == (3, 0)


def test_a_gpu_without_vllms_batch_invariant_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L40S")
    accelerator.require_batch_invariance("cuda", "rollout")
    monkeypatch.setenv(accelerator.SWITCH, "1")
    accelerator.require_batch_invariance("cpu", "rollout")
    with pytest.raises(
        UserError, match=r"^deterministic: found true, and NVIDIA L40S of compute capability 8\.9 for ro"
    ):
        accelerator.require_batch_invariance("cuda", "rollout")


def test_a_probe_repeats_to_the_bit_except_on_a_gpu_that_is_not_told_to(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert repeats_of("cpu") == 0 and repeats_of("cuda") == REPEATS
    monkeypatch.setenv(accelerator.SWITCH, "1")
    assert repeats_of("cuda") == 0
    first = np.linspace(-3, -1, 8, dtype=np.float32)
    check_probe("wise", first, first + REPEATS / 2, 40, repeats=REPEATS)
    with pytest.raises(CampaignError, match="differ when asked twice"):
        check_probe("wise", first, first + np.float32(1e-6), 40)
    monkeypatch.delenv(accelerator.SWITCH)
    asked: list[float] = []
    own = LocalTeacher.self_test
    monkeypatch.setattr(
        LocalTeacher, "self_test", lambda self, **options: asked.append(options["repeats"]) or own(self)
    )
    LocalTeacher(teacher_config(models, "other", "sampled"))
    assert asked == [0.0]
