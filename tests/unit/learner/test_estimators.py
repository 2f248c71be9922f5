"""Every estimator against exact enumeration: expectation, variance, behaviour policy, baselines.

S sequences as in tests/oracles/enumeration.py; an estimate is sum_t w_t A_t grad log pi(y_t).
"""

import inspect
from dataclasses import replace

import pytest
import torch

from learner.objective.divergences import extrapolated_teacher
from learner.objective.estimator_table import ESTIMATORS as ROWS
from learner.objective.policy_gradient import (
    ESTIMATORS,
    coefficient,
    discounted_suffix_sum,
    leave_one_out_mean,
    log_importance_weights,
    position_weights,
    reward_cost,
    surrogate,
)
from tests.oracles import enumeration
from tests.unit.learner.bias_variance import Case, estimates_of_pairs, make_case, support_kl

SMALL = [(3, 3), (4, 3), (5, 3), (3, 5)]


@pytest.fixture(params=SMALL, ids=lambda size: f"V{size[0]}T{size[1]}")
def case(request) -> Case:
    vocabulary, horizon = request.param
    return make_case(vocabulary, horizon)


def expected_gradient(
    case: Case, coefficient_ST: torch.Tensor, behaviour_F: torch.Tensor | None = None
) -> torch.Tensor:
    """The expectation of the surrogate's gradient without clipping, by autograd through the code that trains."""
    behaviour_F = case.theta if behaviour_F is None else behaviour_F
    theta = case.theta.clone().requires_grad_()
    logprobs = case.world.along(case.world.logprobs(theta))
    old = case.world.along(case.world.logprobs(behaviour_F))
    cost, _ = surrogate(logprobs.flatten(), old.flatten(), coefficient_ST.flatten(), None, None)
    p_S = case.world.probabilities(behaviour_F)
    return torch.autograd.grad((p_S[:, None] * cost.view_as(logprobs) * case.world.mask_ST).sum(), theta)[0]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> bool:
    return (a - b).norm().item() <= tolerance * max(1.0, b.norm().item())


def test_the_oracle_agrees_with_finite_differences_and_sums_to_one():
    case = make_case(3, 3)
    assert torch.isclose(case.world.probabilities(case.theta).sum(), torch.ones((), dtype=torch.double))
    assert len(case.world.tokens_ST) == 1 + 2 + 4 + 8
    step = 1e-5 * torch.eye(len(case.theta), dtype=torch.double)
    numeric = torch.stack(
        [
            (
                enumeration.reverse_kl(case.world, case.theta + e, case.teacher)
                - enumeration.reverse_kl(case.world, case.theta - e, case.teacher)
            )
            / 2e-5
            for e in step
        ]
    )
    assert close(case.gradient, numeric, 1e-8)


@pytest.mark.parametrize("estimator", ["trajectory", "to_go", "to_go_expected"])
@pytest.mark.parametrize("baseline", ["none", "exact_kl"])
def test_unbiased_estimators_have_the_exact_gradient_as_expectation(case, estimator, baseline):
    assert close(expected_gradient(case, case.coefficient(estimator, baseline=baseline)), case.gradient)


@pytest.mark.parametrize("whose", ["teacher", "student"])
@pytest.mark.parametrize("close_support", ["tail", "renormalised"])
def test_the_kl_over_a_support_is_a_baseline_without_bias_and_a_bias_in_to_go_expected(whose, close_support):
    case = make_case(4, 3)
    kl_ST = case.world.at_contexts(support_kl(case, "reverse_kl", whose, close_support, case.theta))
    known = replace(case, kl_ST=kl_ST)
    for estimator in ("trajectory", "to_go"):
        assert close(expected_gradient(case, known.coefficient(estimator, baseline="exact_kl")), case.gradient)
    assert not close(expected_gradient(case, known.coefficient("to_go_expected")), case.gradient, 0.01)


@pytest.mark.parametrize("baseline", ["none", "exact_kl"])
def test_immediate_has_the_discount_0_gradient_as_expectation_and_not_the_exact_one(case, baseline):
    visits = enumeration.context_probabilities(case.world, case.theta)
    myopic = enumeration.per_context_gradient(case.world, case.theta, case.teacher, visits)
    found = expected_gradient(case, case.coefficient("immediate", baseline=baseline))
    assert close(found, myopic)
    assert (myopic - case.gradient).norm() > 0.05 * case.gradient.norm()


@pytest.mark.parametrize("estimator", ["discounted", "to_go_expected"])
def test_discounting_is_a_polynomial_in_gamma_between_immediate_and_to_go(case, estimator):
    """The bias of gamma is exactly what the terms at distance d lose: sum_d (1 - gamma^d) G_d."""
    horizon = case.world.mask_ST.shape[1]
    at = {d: case.log_ratio_ST.roll(-d, 1).clone() for d in range(horizon)}
    distance = []
    for d in range(horizon):
        at[d][:, horizon - d :] = 0
        distance.append(expected_gradient(case, at[d] * case.world.mask_ST))
    assert close(sum(distance), case.gradient)
    for gamma in (0.0, 0.3, 0.9, 1.0):
        documented = sum(gamma**d * g for d, g in enumerate(distance))
        assert close(expected_gradient(case, case.coefficient(estimator, gamma=gamma)), documented)
    assert torch.equal(case.coefficient(estimator, gamma=0.0), case.coefficient("immediate"))
    assert torch.allclose(case.coefficient("discounted", gamma=1.0), case.coefficient("to_go"))


@pytest.mark.parametrize("estimator", ["trajectory", "to_go", "to_go_expected"])
def test_leave_one_out_baselines_are_unbiased_over_all_pairs(estimator):
    case = make_case(3, 3)
    for baseline in ("batch_mean", "group_mean"):
        p_pairs, estimates = estimates_of_pairs(case, estimator, baseline)
        mean, _ = enumeration.moments(p_pairs, estimates)
        assert close(mean, case.gradient)


def test_a_mean_that_includes_the_own_trajectory_would_be_caught():
    case = make_case(3, 3)
    values = case.coefficient("to_go")
    own = values - 0.5 * values  # a group of two whose other half is worth nothing: the own half alone
    assert not close(expected_gradient(case, own), case.gradient)


def test_the_suffix_sum_of_kl_is_caught_as_no_baseline(case):
    """It depends on y_t through the later contexts: what is left is `immediate`, with its bias."""
    later = discounted_suffix_sum(case.kl_ST, 1.0) - case.kl_ST
    pseudo = case.coefficient("to_go_expected") - (later + case.kl_ST)
    assert torch.allclose(pseudo, case.coefficient("immediate", baseline="exact_kl"))
    assert not close(expected_gradient(case, pseudo), case.gradient, 0.05)


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_off_policy_the_ratio_of_the_token_gives_the_ppo_surrogates_gradient(case, estimator):
    """sum over contexts of p_old(c) grad pi(. | c) Q(c, .), Q with the continuation of the behaviour policy."""
    w, old = case.world, case.behaviour
    probabilities, values = w.probabilities(old), case.coefficient(estimator)
    shape = (len(w.prefixes), w.features_CVF.shape[1])
    pairs = (w.contexts_ST * shape[1] + w.tokens_ST)[w.mask_ST]
    each = probabilities[:, None].expand_as(values)[w.mask_ST]
    mass = torch.zeros(shape, dtype=torch.double).flatten().index_add(0, pairs, each)
    q_CV = (torch.zeros_like(mass).index_add(0, pairs, each * values[w.mask_ST]) / mass).view(shape)
    theta = case.theta.clone().requires_grad_()
    visits = enumeration.context_probabilities(w, old)
    documented = torch.autograd.grad((visits[:, None] * w.logprobs(theta).exp() * q_CV).sum(), theta)[0]
    assert close(expected_gradient(case, values, old), documented)
    assert not close(documented, case.gradient, 1e-3)


@pytest.mark.parametrize("estimator", ["trajectory", "to_go", "to_go_expected"])
def test_off_policy_sequence_weights_restore_the_exact_gradient(case, estimator):
    for baseline in ("none", "exact_kl"):
        values = case.coefficient(estimator, baseline=baseline) * importance(case, "sequence")
        assert close(weighted_gradient(case, values), case.gradient)


@pytest.mark.parametrize("level", ["prefix", "sequence"])
def test_off_policy_prefix_weights_are_enough_at_discount_0(case, level):
    visits = enumeration.context_probabilities(case.world, case.theta)
    myopic = enumeration.per_context_gradient(case.world, case.theta, case.teacher, visits)
    assert close(weighted_gradient(case, case.coefficient("immediate") * importance(case, level)), myopic)
    assert not close(weighted_gradient(case, case.coefficient("immediate") * importance(case, "token")), myopic, 1e-3)
    if level == "prefix":
        assert not close(
            weighted_gradient(case, case.coefficient("to_go") * importance(case, level)), case.gradient, 1e-3
        )


def full_gradient(case: Case, weights_ST: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([F] mean, [] variance) of sum_t w_t grad KL_t over sequences of the behaviour policy."""
    estimates = (weights_ST[..., None] * case.kl_gradients()).sum(1)
    return enumeration.moments(case.world.probabilities(case.behaviour), estimates)


def test_off_policy_a_full_divergence_wants_the_weight_of_what_came_before(case):
    """No action is sampled at t: its own ratio has mean 1, adds variance, and a bias as soon as the product is cut."""
    visits = enumeration.context_probabilities(case.world, case.theta)
    myopic = enumeration.per_context_gradient(case.world, case.theta, case.teacher, visits)
    (before, small), (prefix, large) = (full_gradient(case, importance(case, x)) for x in ("before", "prefix"))
    assert close(before, myopic) and close(prefix, myopic)
    assert small < large
    uncorrected = full_gradient(case, case.world.mask_ST.double())[0]
    assert not close(uncorrected, myopic, 1e-3)
    highest = importance(case, "before").max().item()  # a bound at which no weight of what came before is cut
    cut = {x: full_gradient(case, importance(case, x).clamp(max=highest))[0] for x in ("before", "prefix")}
    assert close(cut["before"], myopic)
    assert not close(cut["prefix"], myopic, 1e-4)


def importance(case: Case, level: str) -> torch.Tensor:
    w = case.world
    log_ratio = w.along(w.logprobs(case.theta)) - w.along(w.logprobs(case.behaviour))
    return log_importance_weights(log_ratio, w.mask_ST, level).exp()


def weighted_gradient(case: Case, values_ST: torch.Tensor) -> torch.Tensor:
    """Decoupled: sampled by the behaviour policy, pi_old = pi_theta, the correction in the coefficient."""
    p_S = case.world.probabilities(case.behaviour)
    return torch.einsum("s,st,stf->f", p_S, values_ST, case.scores_STF)


def test_variance_falls_from_trajectory_to_to_go_to_expected_with_baseline():
    case = make_case(4, 4)
    trace = {
        (name, b): case.moments(case.coefficient(name, baseline=b))[1].item()
        for name, b in [
            ("trajectory", "none"),
            ("to_go", "none"),
            ("to_go_expected", "none"),
            ("immediate", "exact_kl"),
        ]
    }
    assert list(trace.values()) == sorted(trace.values(), reverse=True)


def test_to_go_expected_is_the_conditional_expectation_of_to_go_given_the_contexts():
    """Rao-Blackwell by hand: V = 2, T = 2. After y_1 the later log-ratio becomes its mean under pi."""
    log_ratio = torch.tensor([[1.0, 3.0], [1.0, -1.0]])
    kl = torch.tensor([[0.5, 2.0], [0.5, 2.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    assert torch.equal(
        coefficient("to_go_expected", log_ratio, mask, kl_BT=kl), torch.tensor([[3.0, 3.0], [3.0, -1.0]])
    )


def test_a_teacher_equal_to_the_student_gives_exactly_zero():
    case = make_case(3, 3)
    zero = torch.zeros_like(case.log_ratio_ST)
    for estimator in ESTIMATORS:
        for baseline in ("none", "batch_mean", "group_mean", "exact_kl"):
            values = coefficient(
                estimator,
                zero,
                case.world.mask_ST,
                kl_BT=zero,
                gamma=0.5,
                baseline_name=baseline,
                group_B=torch.arange(len(zero)) // 2,
            )
            assert torch.equal(values, zero)
            assert torch.equal(expected_gradient(case, values), torch.zeros_like(case.theta))


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_masked_tokens_count_nowhere_even_when_they_are_nan(estimator):
    mask = torch.tensor([[True, False, True, True], [True, True, False, False], [False] * 4])
    generator = torch.Generator().manual_seed(0)
    log_ratio, kl = torch.randn(2, 3, 4, generator=generator)
    options = {"gamma": 0.7, "group_B": torch.tensor([4, 4, 9])}
    for baseline in ("none", "batch_mean", "group_mean", "exact_kl"):
        clean = coefficient(estimator, log_ratio * mask, mask, kl_BT=kl * mask, baseline_name=baseline, **options)
        broken = coefficient(
            estimator,
            log_ratio.masked_fill(~mask, torch.nan),
            mask,
            kl_BT=kl.masked_fill(~mask, torch.nan),
            baseline_name=baseline,
            **options,
        )
        assert torch.equal(clean, broken)
        assert not broken[~mask].any()


def test_coefficients_carry_no_gradient():
    log_ratio = torch.ones(2, 3, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    for estimator in ESTIMATORS:
        assert not coefficient(estimator, log_ratio, mask, kl_BT=log_ratio, baseline_name="exact_kl").requires_grad


def test_each_function_has_a_row_and_takes_what_the_row_says():
    assert {name for name, row in ROWS.items() if row.is_coefficient} == set(ESTIMATORS)
    for name, function in ESTIMATORS.items():
        arguments = list(inspect.signature(function).parameters)[2:]
        expected = {"kl_BT": ROWS[name].needs_distribution, "gamma": ROWS[name].discounts}
        assert {key: key in arguments for key in expected} == expected, name


@pytest.mark.parametrize("gamma", [0.0, 1e-9, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("length", [1, 2, 7, 64])
def test_the_suffix_sum_is_that_of_a_loop_over_tokens(gamma, length):
    x = torch.randn(2, length, dtype=torch.double, generator=torch.Generator().manual_seed(length))
    expected = x.clone()
    for t in reversed(range(length - 1)):
        expected[:, t] += gamma * expected[:, t + 1]
    assert torch.allclose(discounted_suffix_sum(x, gamma), expected, atol=1e-12)


def test_a_long_response_neither_overflows_nor_takes_long():
    ones = torch.ones(1, 32768)
    assert torch.allclose(discounted_suffix_sum(ones, 0.5)[0, :-64], torch.full((32704,), 2.0))


def test_the_group_mean_leaves_the_own_trajectory_out():
    values = torch.tensor([[1.0, 10.0], [3.0, 0.0], [5.0, 20.0], [7.0, 1.0]])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    found = leave_one_out_mean(values, mask, torch.tensor([5, 5, 5, 2]))
    assert torch.equal(found[mask], torch.tensor([4.0, 20.0, 3.0, 2.0, 10.0, 0.0, 0.0]))


def test_the_cost_of_a_reward_by_hand():
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    found = reward_cost(torch.tensor([1.0, 0.0, 0.5, 3.0]), mask, torch.tensor([7, 7, 7, 8]))
    assert torch.equal(found, torch.tensor([[-0.75, -0.75], [0.75, 0.0], [0.0, 0.0], [-3.0, -3.0]]))


def test_the_reward_alone_gives_the_gradient_of_the_expected_reward():
    case = make_case(3, 3)
    reward_S = torch.randn(len(case.world.tokens_ST), dtype=torch.double, generator=torch.Generator().manual_seed(1))
    theta = case.theta.clone().requires_grad_()
    exact = torch.autograd.grad((case.world.probabilities(theta) * -reward_S).sum(), theta)[0]
    alone = reward_cost(reward_S, case.world.mask_ST, torch.arange(len(reward_S)))  # groups of one: no baseline
    assert close(expected_gradient(case, alone), exact)
    count = len(reward_S)
    first, second = torch.arange(count).repeat_interleave(count), torch.arange(count).repeat(count)
    rows = torch.stack([first, second], 1).flatten()
    values = reward_cost(reward_S[rows], case.world.mask_ST[rows], torch.arange(count * count).repeat_interleave(2))
    estimates = torch.einsum("nt,ntf->nf", values, case.scores_STF[rows]).view(count * count, 2, -1).mean(1)
    p_S = case.world.probabilities(case.theta)
    assert close(((p_S[first] * p_S[second])[:, None] * estimates).sum(0), exact)


def test_the_tilted_objective_is_the_reverse_kl_to_the_tilted_teacher():
    case, strength = make_case(3, 3), 0.7
    reward_S = torch.randn(len(case.world.tokens_ST), dtype=torch.double, generator=torch.Generator().manual_seed(2))
    theta = case.theta.clone().requires_grad_()
    student = case.world.along(case.world.logprobs(theta)).sum(1)
    tilted = (case.world.along(case.world.logprobs(case.teacher)).sum(1) + strength * reward_S).log_softmax(0)
    exact = torch.autograd.grad((student.exp() * (student - tilted)).sum(), theta)[0]
    cost = reward_cost(reward_S, case.world.mask_ST, torch.arange(len(reward_S)))
    assert close(expected_gradient(case, case.coefficient("to_go") + strength * cost), exact)


def test_position_weights_are_biased_and_the_bias_vanishes_with_their_strength(case):
    visits = enumeration.context_probabilities(case.world, case.theta)
    myopic = enumeration.per_context_gradient(case.world, case.theta, case.teacher, visits)
    values, mask = case.coefficient("immediate"), case.world.mask_ST
    bias = [
        (expected_gradient(case, values * position_weights(values, mask, strength)) - myopic).norm()
        for strength in (0.0, 0.25, 0.5)
    ]
    assert bias[0] < 1e-12 < 1e-3 * myopic.norm() < bias[1]
    assert bias[2].item() == pytest.approx(2 * bias[1].item())


@pytest.mark.parametrize("estimator", ["trajectory", "to_go", "to_go_expected"])
def test_an_extrapolated_teacher_maximises_the_scaled_log_ratio_less_the_kl_to_the_reference(case, estimator):
    """grad of E[-strength log(q / pi_ref)] + KL(pi || pi_ref) over whole sequences, by autograd, without a normaliser."""
    w, strength = case.world, 1.5
    theta = case.theta.clone().requires_grad_()
    student, teacher, reference = (w.along(w.logprobs(x)).sum(1) for x in (theta, case.teacher, case.behaviour))
    objective = (student.exp() * (student - reference - strength * (teacher - reference))).sum()
    exact = torch.autograd.grad(objective, theta)[0]
    beyond = extrapolated_teacher(w.logprobs(case.teacher), w.logprobs(case.behaviour), strength)
    own = w.logprobs(case.theta)
    kl_ST = w.at_contexts((own.exp() * (own - beyond)).sum(1))
    values = coefficient(estimator, w.along(own - beyond), w.mask_ST, kl_BT=kl_ST)
    assert close(expected_gradient(case, values), exact)
    renormalised = beyond.log_softmax(-1)
    normalised = coefficient("to_go", w.along(own - renormalised), w.mask_ST)
    assert not close(expected_gradient(case, normalised), exact, 1e-3)  # another objective, sequence by sequence
    normalised = coefficient("immediate", w.along(own - renormalised), w.mask_ST)
    immediate = coefficient("immediate", w.along(own - beyond), w.mask_ST)
    assert close(expected_gradient(case, normalised), expected_gradient(case, immediate))


def test_position_weights_fall_from_one_plus_strength_to_the_last_tokens_share():
    found = position_weights(torch.tensor([[1.0, -2.0, 1.0, 9.0]]), torch.tensor([[True, True, True, False]]), 0.5)
    assert torch.allclose(found[0, :3], torch.tensor([1.5, 1 + 0.5 * 0.75, 1 + 0.5 * 0.25]))
