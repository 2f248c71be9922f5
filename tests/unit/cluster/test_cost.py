"""Hours by role, and tokens for each of them."""

from types import SimpleNamespace

import pytest

from cluster.records.utilisation import cost_of

HALF_HOUR = {"busy": 1000.0, "waiting": 500.0, "away": 300.0}


def test_hours_are_those_of_all_actors_of_a_role_whatever_they_did() -> None:
    reserved = {
        "rollout": SimpleNamespace(cpus=2.0, gpus=1.0),
        "teacher.default": SimpleNamespace(cpus=1.0, gpus=4.0),
        "learner": SimpleNamespace(cpus=1.0, gpus=0.5),
        "environment": SimpleNamespace(cpus=1.0, gpus=0.0),
    }
    seconds = {
        "rollout-0": HALF_HOUR,
        "rollout-1": HALF_HOUR,
        "teacher.default-0": {"busy": 3600.0},
        "learner-0": {"away": 0.0},
    }
    found = cost_of(seconds, reserved, 100_000)
    assert found["gpu_hours"] == pytest.approx({"rollout": 1.0, "teacher.default": 4.0, "learner": 0.0})
    # Those of environment actors are not known.
    assert found["cpu_hours"] == pytest.approx({"rollout": 2.0, "teacher.default": 1.0, "learner": 0.0})
    assert found["tokens_per_gpu_hour"] == pytest.approx(20_000)


def test_without_gpus_there_is_no_rate() -> None:
    reserved = {"rollout": SimpleNamespace(cpus=1.0, gpus=0.0)}
    assert cost_of({"rollout-0": HALF_HOUR}, reserved, 5)["tokens_per_gpu_hour"] is None
