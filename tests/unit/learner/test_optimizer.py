"""The learning-rate schedule against numbers by hand, and the optimiser's state by parameter name."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learner.config import OptimizerConfig
from learner.schedule import learning_rate
from learner.student.optimizer import (
    OffloadedAdamW,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
)


def test_the_rate_warms_up_and_then_follows_its_schedule() -> None:
    def rates(schedule: str) -> list[float]:
        config = OptimizerConfig(1.0, warmup_updates=3, schedule=schedule, final_fraction=0.2)  # type: ignore[arg-type]
        return [learning_rate(update, 11, config) for update in (1, 2, 3, 7, 11, 12)]

    assert rates("constant") == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert rates("linear") == pytest.approx([0.25, 0.5, 0.75, 0.6, 0.2, 0.2])
    assert rates("cosine") == pytest.approx([0.25, 0.5, 0.75, 0.6, 0.2, 0.2])  # halfway, both are in the middle
    config = OptimizerConfig(1.0, warmup_updates=0, schedule="cosine")
    assert learning_rate(1, 4, config) == pytest.approx((1 + 2**-0.5) / 2)


def make(*, offload: bool = False, fused: bool = True) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    return model, build_optimizer(model, OptimizerConfig(0.1, weight_decay=0.5), offload=offload, fused=fused)


def step(model: torch.nn.Module, optimizer: torch.optim.AdamW) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


def test_decay_acts_on_matrices_only() -> None:
    model, optimizer = make()
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model[0].weight)}  # type: ignore[index]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_a_restored_optimiser_goes_on_to_the_same_bits(offload: bool, fused: bool) -> None:
    model, optimizer = make(offload=offload, fused=fused)
    for _ in range(3):
        step(model, optimizer)
    other, restored = make(offload=offload, fused=fused)
    other.load_state_dict(model.state_dict())
    elsewhere = optimizer.host_values if isinstance(optimizer, OffloadedAdamW) else lambda _: None
    found = [(name, t, elsewhere(t)) for name, t in optimizer_tensors(model, optimizer).items()]
    stored = {name: (t if values is None else values).clone() for name, t, values in found}
    load_optimizer_tensors(other, restored, lambda name, _: stored[name])
    for _ in range(2):
        step(model, optimizer)
        step(other, restored)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("offload", [False, True])
def test_the_fused_step_is_the_plain_one_to_rounding_and_allocates_nothing(offload: bool) -> None:
    (model, optimizer), (other, fused) = make(offload=offload, fused=False), make(offload=offload, fused=True)
    for _ in range(3):
        step(model, optimizer)
        step(other, fused)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert allocated(fused) < 0.1 * whole
    # By lists of tensors: 4 bytes a parameter, which learner/memory_items.py counts.
    for group in optimizer.param_groups:
        group["foreach"] = True
    assert allocated(optimizer) == pytest.approx(whole, rel=0.1)


def allocated(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the new tensors of one step, without numbers and what is copied to the host and back."""
    found = 0

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            nonlocal found
            result = function(*arguments, **(keywords or {}))
            given = {t.untyped_storage().data_ptr() for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)}
            for tensor in tree_leaves(result):
                if (
                    isinstance(tensor, torch.Tensor)
                    and tensor.ndim
                    and tensor.untyped_storage().data_ptr() not in given
                ):
                    found += tensor.nbytes
            return result

    with Counts():
        optimizer.step()
    return found


def test_the_step_is_fused_unless_told_otherwise() -> None:
    model, _ = make()
    assert build_optimizer(model, OptimizerConfig(0.1)).defaults["fused"] is True
    assert not make(fused=False)[1].defaults["fused"]


def test_a_missing_moment_is_an_error() -> None:
    model, optimizer = make()
    step(model, optimizer)
    tensors = optimizer_tensors(model, optimizer)
    del tensors["1.bias.exp_avg_sq"]
    with pytest.raises(KeyError, match=r"1\.bias\.exp_avg_sq"):
        load_optimizer_tensors(*make(), lambda name, _: tensors[name])
