"""The learning-rate schedule against numbers by hand, and the optimiser's state by parameter name."""

import pytest
import torch

from learner.config import OptimizerConfig
from learner.student.optimizer import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors


def test_the_rate_warms_up_and_then_follows_its_schedule() -> None:
    def rates(schedule: str) -> list[float]:
        config = OptimizerConfig(1.0, warmup_updates=3, schedule=schedule, final_fraction=0.2)  # type: ignore[arg-type]
        return [learning_rate(update, 11, config) for update in (1, 2, 3, 7, 11, 12)]

    assert rates("constant") == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert rates("linear") == pytest.approx([0.25, 0.5, 0.75, 0.6, 0.2, 0.2])
    assert rates("cosine") == pytest.approx([0.25, 0.5, 0.75, 0.6, 0.2, 0.2])  # halfway, both are in the middle
    config = OptimizerConfig(1.0, warmup_updates=0, schedule="cosine")
    assert learning_rate(1, 4, config) == pytest.approx((1 + 2**-0.5) / 2)


def make() -> tuple[torch.nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    return model, build_optimizer(model, OptimizerConfig(0.1, weight_decay=0.5))


def step(model: torch.nn.Module, optimizer: torch.optim.AdamW) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


def test_decay_acts_on_matrices_only() -> None:
    model, optimizer = make()
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model[0].weight)}  # type: ignore[index]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_a_restored_optimiser_goes_on_to_the_same_bits() -> None:
    model, optimizer = make()
    for _ in range(3):
        step(model, optimizer)
    other, restored = make()
    other.load_state_dict(model.state_dict())
    stored = {name: t.clone() for name, t in optimizer_tensors(model, optimizer).items()}
    load_optimizer_tensors(other, restored, lambda name, _: stored[name])
    for _ in range(2):
        step(model, optimizer)
        step(other, restored)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_missing_moment_is_an_error() -> None:
    model, optimizer = make()
    step(model, optimizer)
    tensors = optimizer_tensors(model, optimizer)
    del tensors["1.bias.exp_avg_sq"]
    with pytest.raises(KeyError, match=r"1\.bias\.exp_avg_sq"):
        load_optimizer_tensors(*make(), lambda name, _: tensors[name])
