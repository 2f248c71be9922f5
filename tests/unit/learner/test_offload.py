"""Offloaded moments take no device memory between steps, and the results are bit-equal to those without offloading."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.learner import Learner
from learner.student.optimizer import MOMENTS, OffloadedAdamW
from tests.tiny_updates import make_learner, sampled


def published(learner: Learner) -> list[bytes]:
    return [part.tobytes() for part in learner.publish() if isinstance(part, np.ndarray)]


def save(learner: Learner, folder: Path) -> Path:
    learner.save(str(folder))
    while not learner.saved():
        time.sleep(0.001)
    return folder


def on_device(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the moments on the device."""
    states = optimizer.state.values()
    return sum(state[name].untyped_storage().nbytes() for state in states for name in MOMENTS)


def test_the_same_weights_to_the_bit_and_nothing_left_on_the_device(models: dict[str, Path]) -> None:
    written, scores = sampled(models, "other")
    plain, offloaded = (make_learner(models, offload_optimizer=offload) for offload in (False, True))
    for _ in range(3):
        assert plain.update(written.ids, written, scores)["grad_norm"] == pytest.approx(
            offloaded.update(written.ids, written, scores)["grad_norm"], abs=0
        )
        assert published(plain) == published(offloaded)
        assert on_device(offloaded._optimizer) == 0 < on_device(plain._optimizer)


def test_one_parameters_moments_at_a_time_are_on_the_device() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (10, 1000, 100)]
    optimizer, highest = OffloadedAdamW(parameters, lr=0.1), []
    optimizer.register_step_post_hook(lambda *_: highest.append(on_device(optimizer)))
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert max(highest) == 2 * 4 * 1000 and on_device(optimizer) == 0
    assert [len(group["params"]) for group in optimizer.param_groups] == [3]


@pytest.mark.parametrize("first", [False, True])
def test_a_checkpoint_goes_on_to_the_same_bits_with_the_moments_elsewhere(
    first: bool, models: dict[str, Path], tmp_path: Path
) -> None:
    written, scores = sampled(models, "other")
    whole = make_learner(models, offload_optimizer=first)
    whole.update(written.ids, written, scores)
    resumed = make_learner(models, offload_optimizer=not first, checkpoint=save(whole, tmp_path))
    assert (on_device(resumed._optimizer) == 0) == (not first)
    for learner in (whole, resumed):
        learner.update(written.ids, written, scores)
    assert published(whole) == published(resumed)


def test_a_parameter_without_a_gradient_stays_as_it_is() -> None:
    moved, still = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = OffloadedAdamW([moved, still], lr=0.1)
    moved.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(still, torch.ones(3)) and not torch.equal(moved, torch.ones(3))
    assert still not in optimizer.state and all(
        optimizer.host_values(optimizer.state[moved][n]) is not None for n in MOMENTS
    )
