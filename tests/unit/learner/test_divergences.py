"""Divergences over a support: values by hand, limits, bounds, gradients against enumeration."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from learner.objective import divergences as d
from learner.objective.policy_gradient import to_go
from tests.oracles import enumeration
from tests.unit.learner.bias_variance import make_case
from tests.unit.learner.test_estimators import close, expected_gradient

DIVERGENCES = {
    "reverse_kl": d.reverse_kl,
    "forward_kl": d.forward_kl,
    "jsd": partial(d.jsd, beta=0.3),
    "skewed_forward_kl": partial(d.skewed_forward_kl, skew=0.1),
    "skewed_reverse_kl": partial(d.skewed_reverse_kl, skew=0.1),
    "entropy_gated_kl": partial(d.entropy_gated_kl, threshold=0.8),
}
P = torch.tensor([[0.5, 0.5]], dtype=torch.double).log()
Q = torch.tensor([[0.25, 0.75]], dtype=torch.double).log()


def rows(n: int, width: int, seed: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, width, dtype=torch.double, generator=generator)).log_softmax(-1)


def gradient(cost, student: Tensor) -> Tensor:
    logits = student.clone().requires_grad_()
    return torch.autograd.grad(cost(logits.log_softmax(-1)).sum(), logits)[0]


def test_values_by_hand():
    reverse = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    forward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert d.reverse_kl(P, Q).item() == pytest.approx(reverse)
    assert d.forward_kl(P, Q).item() == pytest.approx(forward)
    m = (0.3 * 0.25 + 0.7 * 0.5, 0.3 * 0.75 + 0.7 * 0.5)
    to_teacher = 0.25 * math.log(0.25 / m[0]) + 0.75 * math.log(0.75 / m[1])
    to_student = 0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])
    assert d.jsd(P, Q, 0.3).item() == pytest.approx(0.3 * to_teacher + 0.7 * to_student)
    m = (0.1 * 0.25 + 0.9 * 0.5, 0.1 * 0.75 + 0.9 * 0.5)
    assert d.skewed_forward_kl(P, Q, 0.1).item() == pytest.approx(
        0.25 * math.log(0.25 / m[0]) + 0.75 * math.log(0.75 / m[1])
    )
    m = (0.9 * 0.25 + 0.1 * 0.5, 0.9 * 0.75 + 0.1 * 0.5)
    assert d.skewed_reverse_kl(P, Q, 0.1).item() == pytest.approx(
        0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])
    )
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert d.entropy_gated_kl(P, Q, entropy - 1e-6).item() == pytest.approx(reverse + forward)
    assert d.entropy_gated_kl(P, Q, entropy + 1e-6).item() == pytest.approx(reverse)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_positive_and_zero_with_zero_gradient_at_the_teacher(name):
    student, teacher = rows(50, 7, 0), rows(50, 7, 1)
    assert (DIVERGENCES[name](student, teacher) > 0).all()
    assert DIVERGENCES[name](teacher, teacher).abs().max() < 1e-14
    assert gradient(lambda s: DIVERGENCES[name](s, teacher), teacher).abs().max() < 1e-14
    assert gradient(lambda s: DIVERGENCES[name](s, teacher), student).abs().max() > 1e-2


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_agree_with_finite_differences(name):
    student, teacher = rows(3, 4, 2), rows(3, 4, 3)
    assert torch.autograd.gradcheck(
        lambda x: DIVERGENCES[name](x.log_softmax(-1), teacher), student.clone().requires_grad_()
    )


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl"])
def test_a_token_that_is_impossible_for_the_student_leaves_finite_gradients(name):
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    teacher = torch.tensor([[0.3, 0.7, 1e-9]]).log()
    cost = DIVERGENCES[name](logits.log_softmax(-1), teacher)
    assert cost.isfinite().all()
    assert torch.autograd.grad(cost.sum(), logits)[0][:, :2].isfinite().all()


def test_the_jsd_tends_to_both_kl_and_is_symmetric_in_the_middle():
    student, teacher = rows(20, 5, 4), rows(20, 5, 5)
    assert torch.allclose(d.jsd(student, teacher, 1e-6) / 1e-6, d.forward_kl(student, teacher), rtol=1e-4)
    assert torch.allclose(d.jsd(student, teacher, 1 - 1e-6) / 1e-6, d.reverse_kl(student, teacher), rtol=1e-4)
    assert torch.allclose(d.jsd(student, teacher, 0.5), d.jsd(teacher, student, 0.5))
    assert (d.jsd(student, teacher, 0.5) < math.log(2)).all()


def test_skewed_divergences_are_bounded_and_tend_to_the_plain_ones():
    certain, other = torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]])
    assert d.reverse_kl(certain, other).item() == pytest.approx(200.0)
    assert d.skewed_reverse_kl(certain, other, 0.1).item() == pytest.approx(-math.log(0.1))
    assert d.skewed_forward_kl(certain, other, 0.1).item() == pytest.approx(-math.log(0.1))
    student, teacher = rows(20, 5, 6), rows(20, 5, 7)
    assert torch.allclose(d.skewed_reverse_kl(student, teacher, 1e-9), d.reverse_kl(student, teacher), rtol=1e-5)
    assert torch.allclose(d.skewed_forward_kl(student, teacher, 1 - 1e-9), 0 * student.sum(-1), atol=1e-6)


def test_jsd_agrees_with_trl():
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer", exc_type=ImportError)
    student, teacher = rows(6, 9, 8), rows(6, 9, 9)
    for beta in (0.1, 0.5, 0.9):
        theirs = trainer.GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="none")
        assert torch.allclose(theirs[0].sum(-1), d.jsd(student, teacher, beta))
    for beta, ours in ((0.0, d.forward_kl), (1.0, d.reverse_kl)):
        theirs = trainer.GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="none")
        assert torch.allclose(theirs[0].sum(-1), ours(student, teacher))


def top(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = teacher.topk(k, -1)
    return student.gather(-1, ids), values


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"entropy_gated_kl"}))  # the gate depends on the support
def test_the_tail_bucket_completes_to_one_and_bounds_the_full_divergence_from_below(name):
    student, teacher = rows(100, 12, 10), rows(100, 12, 11)
    previous = torch.zeros(100, dtype=torch.double)
    for k in range(1, 12):
        s, t = (d.with_tail(x) for x in top(student, teacher, k))
        assert torch.allclose(s.exp().sum(-1), torch.ones(100, dtype=torch.double))
        now = DIVERGENCES[name](s, t)
        assert (now >= previous - 1e-12).all()
        previous = now
    assert torch.allclose(previous, DIVERGENCES[name](student, teacher))  # eleven tokens of twelve and the rest


def test_the_tail_bucket_sees_mass_outside_of_the_support_and_renormalising_does_not():
    teacher = torch.tensor([[0.6, 0.3]]).log()
    leaking = torch.tensor([[0.06, 0.03]]).log()
    assert d.reverse_kl(d.renormalised(leaking), d.renormalised(teacher)).abs().item() < 1e-7
    assert d.reverse_kl(d.with_tail(leaking), d.with_tail(teacher)).item() > 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_support_that_holds_everything_to_rounding_has_finite_gradients(name, dtype):
    full = torch.zeros(4, 6, dtype=dtype)
    full[:, 0] = torch.tensor([5.0, 20.0, 60.0, 200.0])
    teacher = d.with_tail(full.log_softmax(-1)[:, :3])

    def cost(student: Tensor) -> Tensor:
        return DIVERGENCES[name](d.with_tail(student[:, :3]), teacher)

    assert cost(full.log_softmax(-1)).abs().max() < 1e-6
    assert gradient(cost, full).abs().max() < 1e-6
    assert gradient(cost, full.flip(0)).isfinite().all()


def test_full_is_the_expectation_over_the_action_of_the_sampled_estimator():
    case = make_case(4, 3)
    theta = case.theta.clone().requires_grad_()
    student, teacher = case.world.logprobs(theta), case.world.logprobs(case.teacher)
    visits = enumeration.context_probabilities(case.world, case.theta)
    found = torch.autograd.grad((visits * d.reverse_kl(student, teacher)).sum(), theta)[0]
    assert close(found, expected_gradient(case, case.coefficient("immediate")))


@pytest.mark.parametrize("bound", [{}, {"clip": 0.3}, {"power": 0.5}, {"power": 2.0, "clip": 0.2}])
def test_expected_cost_is_what_the_sampled_estimator_has_in_expectation(bound):
    case = make_case(4, 3)
    w, theta = case.world, case.theta.clone().requires_grad_()
    teacher = w.logprobs(case.teacher)
    cost_CV = d.bounded_cost(w.logprobs(theta), teacher, **bound)
    visits = enumeration.context_probabilities(w, case.theta)
    found = torch.autograd.grad((visits * d.expected_cost(w.logprobs(theta), cost_CV)).sum(), theta)[0]
    assert close(found, expected_gradient(case, w.along(cost_CV)))
    live = d.expected_cost(w.logprobs(theta), cost_CV * (1 + w.logprobs(theta) - w.logprobs(theta).detach()))
    assert torch.equal(torch.autograd.grad((visits * live).sum(), theta)[0], found)  # no gradient through the cost
    if not bound:
        assert torch.allclose(d.expected_cost(w.logprobs(theta), cost_CV), d.reverse_kl(w.logprobs(theta), teacher))


def test_the_power_form_is_bounded_keeps_the_sign_and_tends_to_the_log_ratio():
    student, teacher = rows(1000, 5, 12, scale=20.0), rows(1000, 5, 13, scale=20.0)
    plain = d.bounded_cost(student, teacher)
    for power in (0.1, 1.0, 5.0):
        found = d.bounded_cost(student, teacher, power=power)
        assert found.abs().max() <= 1
        assert (found * plain >= 0).all()
    assert torch.allclose(d.bounded_cost(student, teacher, power=1e-8) / 1e-8, plain, rtol=1e-4, atol=1e-6)
    assert torch.allclose(d.bounded_cost(student, teacher, power=1.0), student.exp() - teacher.exp())


def test_the_clip_bounds_both_tails_and_nothing_else():
    student = torch.tensor([0.0, -1.0, -30.0, -3.0])
    teacher = torch.tensor([-30.0, -1.5, 0.0, -torch.inf])
    assert torch.equal(d.bounded_cost(student, teacher, clip=5.0), torch.tensor([5.0, 0.5, -5.0, 5.0]))


def test_bounded_costs_carry_no_gradient():
    x = torch.zeros(3, requires_grad=True)
    assert not d.bounded_cost(x, x, power=1.0).requires_grad


def test_the_proximal_teacher_bounds_the_cost_and_has_no_gradient_of_its_own():
    student, teacher = torch.tensor([0.0, -1.0]), torch.tensor([-200.0, -1.0])
    cost = student - d.proximal_teacher(student, teacher, 0.2)
    assert cost.tolist() == pytest.approx([-math.log(0.8), 0.0], abs=1e-6)
    assert torch.equal(d.proximal_teacher(student, teacher, 1.0), teacher)
    assert not d.proximal_teacher(student.requires_grad_(), teacher, 0.2).requires_grad
    full_student, full_teacher = rows(9, 5, 14), rows(9, 5, 15)
    mixed = d.proximal_teacher(full_student, full_teacher, 0.2)
    assert torch.allclose(mixed.exp().sum(-1), torch.ones(9, dtype=torch.double))
    assert torch.allclose(
        d.reverse_kl(full_student, mixed), d.skewed_reverse_kl(full_student, full_teacher, 0.8)
    )  # the same value; another gradient, since the skewed divergence differentiates the mixture


def test_extrapolation_is_the_g_opd_objective_at_sequence_level():
    """min KL(pi || pi_ref) - strength E[log(q / pi_ref)], by autograd through the enumerated sequences."""
    case, strength = make_case(3, 3), 1.25
    w, reference = case.world, case.world.policy(9)
    theta = case.theta.clone().requires_grad_()
    student, teacher, ref = (w.along(w.logprobs(x)).sum(1) for x in (theta, case.teacher, reference))
    exact = torch.autograd.grad((student.exp() * (student - ref - strength * (teacher - ref))).sum(), theta)[0]
    beyond = d.extrapolated_teacher(w.logprobs(case.teacher), w.logprobs(reference), strength)
    log_ratio = w.along(w.logprobs(case.theta) - beyond)
    assert close(expected_gradient(case, to_go(log_ratio, w.mask_ST)), exact)
    assert not close(expected_gradient(case, case.coefficient("to_go")), exact, 0.05)
    teacher_CV = w.logprobs(case.teacher)
    assert torch.equal(d.extrapolated_teacher(teacher_CV, w.logprobs(reference), 1.0), teacher_CV)
    renormalised = d.renormalised(beyond)
    assert torch.allclose(
        gradient(lambda s: d.reverse_kl(s, renormalised), w.logprobs(case.theta)),
        gradient(lambda s: d.reverse_kl(s, beyond), w.logprobs(case.theta)),
    )  # the normaliser is invisible at discount 0
