"""Estimators of KL(pi_old || pi_theta), the adaptive weight, and the back-off of a step."""

import math

import pytest
import torch

from learner.objective.trust_region import ESTIMATORS, adapted_beta, backed_off, exact, k1, k3


def distributions(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old, new = torch.randn(2, 5, dtype=torch.double, generator=generator)
    return old.log_softmax(0), new.clone().requires_grad_()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_sampled_estimators_have_the_exact_value_and_gradient_as_expectation(name):
    old, logits = distributions(0)
    new = logits.log_softmax(0)
    truth = exact(new[None], old[None])[0]
    assert truth.item() == pytest.approx((old.exp() * (old - new)).sum().item())
    found = (old.exp() * ESTIMATORS[name](new, old)).sum()  # the expectation over a token of pi_old
    assert found.item() == pytest.approx(truth.item(), abs=1e-12)
    wanted = torch.autograd.grad(truth, logits, retain_graph=True)[0]
    assert torch.allclose(torch.autograd.grad(found, logits)[0], wanted, atol=1e-12)


def test_k3_is_never_negative_and_varies_less_than_k1_near_the_old_policy():
    old, _ = distributions(1)
    new = (old + 0.1 * torch.randn(5, dtype=torch.double, generator=torch.Generator().manual_seed(2))).log_softmax(0)
    assert (k3(new, old) >= 0).all()
    assert (k1(new, old) < 0).any()
    mean = (old.exp() * (old - new)).sum()
    first, third = ((old.exp() * (k(new, old) - mean).square()).sum() for k in (k1, k3))
    assert third < 0.1 * first


def test_at_the_old_policy_value_and_gradient_of_k3_are_zero():
    """A penalty therefore has no effect in the first step of an on-policy update."""
    logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
    cost = k3(logprobs, logprobs.detach())
    assert torch.equal(cost, torch.zeros(2))
    assert torch.equal(torch.autograd.grad(cost.sum(), logprobs)[0], torch.zeros(2))


def test_k3_of_a_wild_token_is_large_and_finite():
    assert k3(torch.tensor([0.0]), torch.tensor([-500.0])).isfinite()
    assert k3(torch.tensor([-500.0]), torch.tensor([0.0])).item() == pytest.approx(499.0)
    tiny = k3(torch.tensor([-1.0 + 1e-4]), torch.tensor([-1.0]))
    assert tiny.item() == pytest.approx(
        0.5e-8, rel=0.01
    )  # 1e-4 squared over two: lost if exp - 1 were taken in float32


def test_beta_doubles_above_halves_below_and_rests_near_the_target():
    assert adapted_beta(0.4, 0.0151, 0.01) == 0.8
    assert adapted_beta(0.4, 0.0149, 0.01) == 0.4
    assert adapted_beta(0.4, 0.0068, 0.01) == 0.4
    assert adapted_beta(0.4, 0.0066, 0.01) == 0.2


def test_beta_steers_a_penalised_step_to_the_target():
    beta, target = 1.0, 0.01
    for _ in range(60):
        kl = 0.5 / (1 + 10 * beta) ** 2  # a quadratic KL, and a step that a penalty of beta shortens
        beta = adapted_beta(beta, kl, target)
    assert target / 2 <= kl <= 2 * target


def test_beta_neither_vanishes_nor_overflows():
    beta = 1.0
    for _ in range(2000):
        beta = adapted_beta(beta, 0.0, 0.01)
    assert beta > 0
    for _ in range(2000):
        beta = adapted_beta(beta, math.inf, 0.01)
    assert math.isfinite(beta)


def test_the_step_is_backed_off_to_the_first_scale_within_delta():
    asked = []

    def measure(scale: float) -> float:
        asked.append(scale)
        return 0.08 * scale**2

    assert backed_off(measure, 0.01) == (0.25, pytest.approx(0.005))
    assert asked == [1.0, 0.5, 0.25]
    assert backed_off(lambda scale: 0.01, 0.01) == (1.0, 0.01)
    assert backed_off(lambda scale: 0.5 * scale, 0.01, shrink=0.1, tries=3) == (
        pytest.approx(0.01),
        pytest.approx(0.005),
    )


def test_a_kl_that_is_no_number_is_never_within_delta():
    assert backed_off(lambda scale: math.nan if scale > 0.3 else 0.0, 0.01) == (0.25, 0.0)
    assert backed_off(lambda scale: math.inf, 0.01) == (0.0, math.inf)


def test_where_no_scale_helps_the_last_measurement_leaves_the_step_undone():
    asked = []
    assert backed_off(lambda scale: asked.append(scale) or 1.0, 0.01, tries=4) == (0.0, 1.0)
    assert asked == [1.0, 0.5, 0.25, 0.125, 0.0]
