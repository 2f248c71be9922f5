"""A GPU that was reserved and that torch cannot use is one line with the build and the driver, for every role."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors import accelerator
from actors.accelerator import require_gpu, torch_device
from actors.config import StudentConfig, TeacherConfig
from actors.errors import UserError
from actors.teacher.local import LocalTeacher
from actors.vllm_startup import build_llm
from cluster.fleet.ray_actor import _keeping_its_error, _raise_kept_error
from learner.config import LearnerConfig
from learner.learner import Learner

TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by"


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine whose driver is older than torch's build needs."""

    def init() -> None:
        raise RuntimeError(TOO_OLD)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda="12.8", hip=None))
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13\nGCC version: 9\n")
    monkeypatch.setattr(accelerator, "DRIVER_FILE", driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


def student_of(tmp_path: Path) -> Any:
    return Learner(
        StudentConfig(model=str(tmp_path)), LearnerConfig(), total_updates=1, temperature=1.0, publish_dtype="float32",
        bucket_bytes=1 << 20,
    )  # fmt: skip


@pytest.mark.parametrize(
    "role",
    [
        student_of,
        lambda path: LocalTeacher(TeacherConfig(model=str(path))),
        lambda path: build_llm({"model": str(path), "tensor_parallel_size": 1}, {}, "rollout.engine"),
        lambda path: torch_device(),
    ],
    ids=["learner", "teacher", "engine", "device"],
)
def test_no_role_computes_on_the_cpu_in_place_of_a_gpu(old_driver: None, tmp_path: Path, role: Any) -> None:
    with pytest.raises(UserError) as told:
        role(tmp_path)
    said = str(told.value)
    assert "built for CUDA 12.8" in said and "driver: NVIDIA UNIX x86_64 Kernel Module 470.57.02" in said
    assert "too old (found version 11040)." in said and "Please" not in said and "\n" not in said


def test_a_build_for_cpus_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.version.cuda:
        pytest.skip("a build for GPUs")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    with pytest.raises(UserError, match=r"built for CPUs only, which cannot use .*\(CUDA_VISIBLE_DEVICES=1,0\)"):
        torch_device()


@pytest.mark.parametrize("visible", [None, "", "-1", "NoDevFiles"])
def test_without_a_gpu_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert torch_device() == "cpu"


def test_a_gpu_that_answers_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.tensor([1.0, 0.0]))
    with pytest.raises(UserError, match=r"1 \+ 1 is not 2 there"):
        require_gpu("one")


class Role:
    def __init__(self) -> None:
        self.built = True


def test_an_actor_with_a_reserved_gpu_asks_torch_before_it_is_built(old_driver: None) -> None:
    with pytest.raises(UserError, match=r"reserved for it \(0\.5 by Ray\)"):
        _raise_kept_error(_keeping_its_error(Role, 0.5)())
    _raise_kept_error(_keeping_its_error(Role, 0.0)())
