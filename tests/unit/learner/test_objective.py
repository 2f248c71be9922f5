"""Weights, ratio and clip by hand-computed numbers; importance weights and aggregation by enumeration."""

import inspect
import math

import pytest
import torch
from torch import Tensor

from learner.config import ObjectiveConfig
from learner.objective.estimator_table import reads_distribution
from learner.objective.policy_gradient import (
    ESTIMATORS,
    corrected_weights,
    effective_sample_size,
    log_importance_weights,
    surrogate,
    token_weights,
)
from tests.unit.learner.bias_variance import make_case
from tests.unit.learner.test_estimators import close

LENGTHS = torch.tensor([4, 0, 2, 3])
MASK = torch.tensor([True, True, False, True, True, True, False, False, False])


def test_weights_by_hand():
    """Four trajectories: three tokens left of four, none of none, two of two, none of three."""
    expected = {
        "token_mean": [0.2, 0.2, 0, 0.2, 0.2, 0.2, 0, 0, 0],
        "sequence_mean": [1 / 6, 1 / 6, 0, 1 / 6, 1 / 4, 1 / 4, 0, 0, 0],
        "sequence_sum": [0.5, 0.5, 0, 0.5, 0.5, 0.5, 0, 0, 0],
        "constant": [0.05, 0.05, 0, 0.05, 0.05, 0.05, 0, 0, 0],
    }
    for aggregation, weights in expected.items():
        found = token_weights(MASK, LENGTHS, aggregation, 10.0 if aggregation == "constant" else None)
        assert found.tolist() == pytest.approx(weights), aggregation
        assert found.dtype == torch.float32


def test_an_update_without_a_valid_token_weighs_nothing():
    for aggregation in ("token_mean", "sequence_mean", "sequence_sum"):
        assert not token_weights(torch.zeros(9, dtype=torch.bool), LENGTHS, aggregation).any()


def test_the_weights_of_many_tokens_add_up_to_one():
    lengths = torch.full((1000,), 777)
    mask = torch.ones(777_000, dtype=torch.bool)
    for aggregation in ("token_mean", "sequence_mean"):
        assert token_weights(mask, lengths, aggregation).double().sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
def test_any_cut_into_micro_batches_gives_the_same_gradient(aggregation):
    generator = torch.Generator().manual_seed(0)
    parameter, inputs = torch.randn(2, 9, dtype=torch.double, generator=generator)
    parameter.requires_grad_()
    old, coefficient = torch.randn(2, 9, dtype=torch.double, generator=generator)
    weights = token_weights(MASK, LENGTHS, aggregation, 7.0).double()
    gradients = []
    for cut in ([9], [4, 2, 3], [3, 3, 3], [1] * 9):
        parameter.grad = None
        for rows in torch.arange(9).split(cut):
            cost, _ = surrogate((parameter * inputs)[rows], old[rows], coefficient[rows])
            (weights[rows] * cost).sum().backward()
        gradients.append(parameter.grad)
    assert all(torch.allclose(g, gradients[0], rtol=1e-14) for g in gradients)


CLIP_CASES = [
    # ratio, A, cost, gradient of the cost with respect to log pi, clipped
    (1.0, 2.0, 2.0, 2.0, False),
    (1.5, 2.0, 3.0, 3.0, False),  # a cost, and made likelier: pays in full
    (1.5, -2.0, -2.6, 0.0, True),  # a gain, beyond 1 + 0.3: no more of it
    (0.5, 2.0, 1.6, 0.0, True),  # a cost, avoided beyond 1 - 0.2: no more of it
    (0.5, -2.0, -1.0, -1.0, False),  # a gain, made rarer: pays in full
    (1.25, -2.0, -2.5, -2.5, False),
    (0.9, 2.0, 1.8, 1.8, False),
    (1.5, 0.0, 0.0, 0.0, False),
]


@pytest.mark.parametrize(("ratio", "a", "cost", "slope", "clipped"), CLIP_CASES)
def test_the_clip_by_hand(ratio, a, cost, slope, clipped):
    found, found_slope, found_clipped = one_token(ratio, a, 0.2, 0.3)
    assert (found, found_slope, found_clipped) == (pytest.approx(cost), pytest.approx(slope), clipped)


def one_token(ratio: float, a: float, *bounds: float | None, **options) -> tuple[float, float, bool]:
    logprob = torch.tensor([math.log(ratio) - 1.0], dtype=torch.double, requires_grad=True)
    old, a_n = torch.tensor([-1.0], dtype=torch.double), torch.tensor([a], dtype=torch.double)
    cost, clipped = surrogate(logprob, old, a_n, *bounds, **options)
    return cost.item(), torch.autograd.grad(cost.sum(), logprob)[0].item(), bool(clipped)


def test_either_side_of_the_clip_can_be_left_open():
    assert one_token(1.5, -2.0, 0.2, None) == (pytest.approx(-3.0), pytest.approx(-3.0), False)
    assert one_token(0.5, 2.0, 0.2, None) == (pytest.approx(1.6), 0.0, True)
    assert one_token(0.5, 2.0, None, 0.3) == (pytest.approx(1.0), pytest.approx(1.0), False)
    assert one_token(1.5, -2.0, None, None) == (pytest.approx(-3.0), pytest.approx(-3.0), False)


def test_the_dual_clip_caps_a_cost_and_never_a_gain():
    assert one_token(5.0, 2.0, 0.2, 0.3, dual_clip=3.0) == (pytest.approx(6.0), 0.0, True)
    assert one_token(2.5, 2.0, 0.2, 0.3, dual_clip=3.0) == (pytest.approx(5.0), pytest.approx(5.0), False)
    assert one_token(0.2, -2.0, 0.2, 0.3, dual_clip=3.0) == (pytest.approx(-0.4), pytest.approx(-0.4), False)
    assert one_token(5.0, 0.0, 0.2, 0.3, dual_clip=3.0) == (0.0, 0.0, False)


def test_the_clip_is_pessimistic_for_a_cost():
    """Never below the unclipped cost: min instead of max would reward running away."""
    generator = torch.Generator().manual_seed(0)
    logprobs, old, a = torch.randn(3, 1000, generator=generator)
    clipped, _ = surrogate(logprobs, old, a)
    plain, _ = surrogate(logprobs, old, a, None, None)
    assert (clipped >= plain).all()
    assert (clipped > plain).any()


def test_a_wild_ratio_is_large_and_not_infinite():
    cost, _ = surrogate(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([-1e4] * 3), torch.tensor([0.0, 1.0, -1.0]))
    assert cost.isfinite().all()
    assert cost[1] > 1e8


def test_the_coefficient_is_held_fixed():
    a = torch.ones(1, requires_grad=True)
    cost, _ = surrogate(torch.zeros(1), torch.zeros(1), a)
    assert not cost.requires_grad


def through_gradient(case, values_ST: Tensor, behaviour_F: Tensor, through: bool, clip: float | None) -> Tensor:
    theta = case.theta.clone().requires_grad_()
    logprobs = case.world.along(case.world.logprobs(theta))
    old = case.world.along(case.world.logprobs(behaviour_F))
    flat = (logprobs.flatten(), old.flatten(), values_ST.flatten())
    cost, _ = surrogate(*flat, clip, clip, through_log_ratio=through)
    p_S = case.world.probabilities(behaviour_F)
    return torch.autograd.grad((p_S[:, None] * cost.view_as(logprobs) * case.world.mask_ST).sum(), theta)[0]


@pytest.mark.parametrize("estimator", ["immediate", "to_go"])
def test_differentiating_through_the_log_ratio_agrees_in_expectation_without_a_clip_only(estimator):
    case = make_case(3, 4)
    values = case.coefficient(estimator)
    for behaviour, clip, agree in (
        (case.theta, None, True),
        (case.behaviour, None, True),
        (case.theta, 0.1, True),  # at pi_theta = pi_old nothing is clipped
        (case.behaviour, 0.05, False),
    ):
        plain, through = (through_gradient(case, values, behaviour, x, clip) for x in (False, True))
        assert close(plain, through, 1e-9) == agree


def test_differentiating_through_the_log_ratio_is_the_literal_surrogate_and_a_baseline_of_minus_one():
    case = make_case(3, 3)
    theta = case.theta.clone().requires_grad_()
    logprobs = case.world.along(case.world.logprobs(theta))
    old, teacher = (case.world.along(case.world.logprobs(x)) for x in (case.behaviour, case.teacher))
    cost, _ = surrogate(logprobs, old, case.log_ratio_ST, None, None, through_log_ratio=True)
    literal = (logprobs - old).exp() * (logprobs - teacher)
    shifted, _ = surrogate(logprobs, old, case.log_ratio_ST + 1, None, None)
    weights = torch.rand(cost.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    found, wanted, baseline = (
        torch.autograd.grad((weights * x).sum(), theta, retain_graph=True)[0] for x in (cost, literal, shifted)
    )
    assert torch.allclose(found, wanted)
    assert torch.allclose(found, baseline)
    variance = [case.moments(x)[1] for x in (case.log_ratio_ST, (case.log_ratio_ST + 1) * case.world.mask_ST)]
    assert variance[1] > variance[0]


def test_a_mean_over_the_response_biases_an_unbiased_estimator_and_a_sum_does_not():
    case = make_case(4, 4)
    mask, lengths = case.world.mask_ST, case.world.mask_ST.sum(1)
    for aggregation, exact in (("sequence_sum", True), ("constant", True), ("sequence_mean", False)):
        # One trajectory an update: its own weights, as the learner computes them.
        weights = torch.zeros_like(case.log_ratio_ST)
        for s in range(len(mask)):
            own = torch.ones(int(lengths[s]), dtype=torch.bool)
            weights[s, mask[s]] = token_weights(own, lengths[s : s + 1], aggregation, 1.0).double()
        mean, _ = case.moments(weights * case.coefficient("to_go"))
        direction = torch.nn.functional.cosine_similarity(mean, case.gradient, dim=0)
        assert (direction > 1 - 1e-9) == exact
        assert close(mean, case.gradient) == exact


def test_importance_weights_by_hand():
    log_ratio = torch.tensor([[0.1, 0.2, -0.5, 9.0], [1.0, torch.nan, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, True, True]])
    expected = {
        "token": [[0.1, 0.2, -0.5, 0], [1, 0, 1, 0]],
        "prefix": [[0.1, 0.3, -0.2, 0], [1, 0, 2, 2]],
        "before": [[0, 0.1, 0.3, 0], [0, 0, 1, 2]],
        "sequence": [[-0.2, -0.2, -0.2, 0], [2, 0, 2, 2]],
    }
    for level, values in expected.items():
        assert torch.allclose(log_importance_weights(log_ratio, mask, level), torch.tensor(values), atol=1e-6), level


def test_truncation_bounds_and_masking_drops():
    log_weights = torch.tensor([0.1, 1.0, 3.0, 5.0, 1e4]).log()
    assert corrected_weights(log_weights, "truncate", 0.5, 4.0).tolist() == pytest.approx([0.1, 1, 3, 4, 4])
    assert corrected_weights(log_weights, "mask", 0.5, 4.0).tolist() == pytest.approx([0, 1, 3, 0, 0])
    assert corrected_weights(torch.tensor([500.0]), "truncate", 0.0, math.inf).isfinite()


def test_the_effective_sample_size_is_one_for_equal_weights_and_one_token_of_n_for_one_that_rules():
    mask = torch.tensor([True, True, False, True, True])
    assert effective_sample_size(torch.full((5,), -700.0), mask).item() == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([0.0, 200.0, 900.0, 0.0, 0.0]), mask).item() == pytest.approx(0.25)
    by_hand = (1 + 2 + 3 + 4) ** 2 / (4 * (1 + 4 + 9 + 16))
    assert effective_sample_size(torch.tensor([1.0, 2.0, 99.0, 3.0, 4.0]).log(), mask).item() == pytest.approx(by_hand)


def test_decoupled_weights_and_ratio_together_are_exact_without_clip_and_truncation():
    """pi_behaviour sampled, pi_old is the learner before the step, pi_theta has moved: the weights cover all of the way
    to pi_old, the ratio the token's own from there."""
    case = make_case(3, 3)
    w = case.world
    old = case.theta + 0.1 * w.policy(5)
    theta = case.theta.clone().requires_grad_()
    logprobs = w.along(w.logprobs(theta))
    behaviour_logprobs, old_logprobs = (w.along(w.logprobs(x)) for x in (case.behaviour, old))
    weights = corrected_weights(
        log_importance_weights(old_logprobs - behaviour_logprobs, w.mask_ST, "prefix"), "truncate", 0.0, math.inf
    )
    cost, _ = surrogate(logprobs, old_logprobs, case.coefficient("immediate"), None, None)

    def gradient(p_S: Tensor, weights_ST: Tensor | float) -> Tensor:
        total = (p_S[:, None] * weights_ST * cost * w.mask_ST).sum()
        return torch.autograd.grad(total, theta, retain_graph=True)[0]

    as_if_old_had_sampled = gradient(w.probabilities(old), 1.0)
    assert close(gradient(w.probabilities(case.behaviour), weights), as_if_old_had_sampled, 1e-9)
    assert not close(gradient(w.probabilities(case.behaviour), 1.0), as_if_old_had_sampled, 1e-3)


def test_what_needs_a_distribution_is_said_once():
    for estimator, function in ESTIMATORS.items():
        assert reads_distribution(ObjectiveConfig(estimator=estimator)) == (
            "kl_BT" in inspect.signature(function).parameters
        )
