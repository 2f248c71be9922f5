"""Signals that released systems have shipped and that are wrong: what is wrong with each, and that ours is not it.

One context (or few) with the action summed over, so that every statement is exact.
"""

import pytest
import torch
from torch import Tensor

from learner.objective.divergences import forward_kl, renormalised, reverse_kl, with_tail
from learner.objective.policy_gradient import coefficient, surrogate, token_weights
from tests.unit.learner.bias_variance import make_case
from tests.unit.learner.test_estimators import close, expected_gradient


def one_context(seed: int = 0) -> tuple[Tensor, Tensor]:
    """([V] logits that want a gradient, [V] teacher's log-probs)."""
    student, teacher = torch.randn(2, 6, dtype=torch.double, generator=torch.Generator().manual_seed(seed))
    return student.requires_grad_(), teacher.log_softmax(0)


def on_policy(per_action: Tensor, logits: Tensor, logprobs: Tensor) -> Tensor:
    """Expected gradient of a loss whose action was sampled from pi: the probabilities are held fixed."""
    return torch.autograd.grad((logprobs.detach().exp() * per_action).sum(), logits, retain_graph=True)[0]


def kl_gradient(kl, logits: Tensor, teacher: Tensor) -> Tensor:
    return torch.autograd.grad(kl(logits.log_softmax(0)[None], teacher[None]).sum(), logits)[0]


def test_a_scalar_over_a_top_k_support_as_a_detached_coefficient_has_no_gradient():
    """It is the same for every action, so it multiplies E[grad log pi] = 0 (miles#2362). Differentiated, it has one."""
    logits, teacher = one_context()
    logprobs = logits.log_softmax(0)
    ids = teacher.topk(3).indices

    def over_support(x: Tensor) -> Tensor:
        return reverse_kl(with_tail(x[ids][None]), with_tail(teacher[ids][None]))[0]

    detached = over_support(logprobs).detach().expand(6)
    cost, _ = surrogate(logprobs, logprobs.detach(), detached, None, None)
    assert on_policy(cost, logits, logprobs).abs().max() < 1e-15
    assert torch.autograd.grad(over_support(logprobs), logits)[0].abs().max() > 0.01


@pytest.mark.parametrize("seed", range(3))
def test_k1_differentiated_directly_does_not_know_the_teacher(seed):
    """grad (log pi - log q) = grad log pi: zero in expectation, and the same for every teacher."""
    logits, teacher = one_context(seed)
    logprobs = logits.log_softmax(0)
    assert on_policy(logprobs - teacher, logits, logprobs).abs().max() < 1e-15
    ours, _ = surrogate(logprobs, logprobs.detach(), logprobs - teacher, None, None)
    assert close(on_policy(ours, logits, logprobs), kl_gradient(reverse_kl, logits, teacher), 1e-12)
    literal, _ = surrogate(logprobs, logprobs.detach(), logprobs - teacher, None, None, through_log_ratio=True)
    assert close(on_policy(literal, logits, logprobs), kl_gradient(reverse_kl, logits, teacher), 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_k2_has_the_reverse_kl_gradient_on_policy_and_k3_without_its_score_term_the_forward_one(seed):
    logits, teacher = one_context(seed)
    logprobs = logits.log_softmax(0)
    difference = teacher - logprobs
    assert close(on_policy(difference.square() / 2, logits, logprobs), kl_gradient(reverse_kl, logits, teacher), 1e-12)
    third = on_policy(difference.exp() - difference - 1, logits, logprobs)
    assert close(third, kl_gradient(forward_kl, logits, teacher), 1e-12)
    assert not close(third, kl_gradient(reverse_kl, logits, teacher), 1e-2)


def test_k2_is_no_longer_the_reverse_kl_off_policy_and_the_ratio_is():
    logits, teacher = one_context()
    logprobs, behaviour = logits.log_softmax(0), one_context(7)[1]
    exact = kl_gradient(reverse_kl, logits, teacher)
    second = torch.autograd.grad((behaviour.exp() * (teacher - logprobs).square() / 2).sum(), logits, retain_graph=True)
    assert not close(second[0], exact, 1e-2)
    ours, _ = surrogate(logprobs, behaviour, logprobs - teacher, None, None)
    found = torch.autograd.grad((behaviour.exp() * ours).sum(), logits, retain_graph=True)[0]
    assert close(found, exact, 1e-12)


def test_a_renormalised_support_of_one_is_always_certain():
    """log 1 - log 1 (thunlp/OPD#15). With the rest as a bucket there is a signal even then."""
    logits, teacher = one_context()
    best = teacher.argmax()[None]

    def cost(close_support) -> Tensor:
        return reverse_kl(close_support(logits.log_softmax(0)[best][None]), close_support(teacher[best][None])).sum()

    assert cost(renormalised).item() == 0
    assert torch.autograd.grad(cost(renormalised), logits)[0].abs().max() == 0
    assert cost(with_tail).item() > 1e-3
    assert torch.autograd.grad(cost(with_tail), logits)[0].abs().max() > 1e-3


@pytest.mark.parametrize("estimator", ["trajectory", "to_go", "to_go_expected", "immediate", "discounted"])
def test_the_gradient_depends_on_the_teacher(estimator):
    """A joint loss R + (log pi - sg(log q)), differentiated, gives the same gradient whatever the teacher says."""
    logits, teacher = one_context()
    other = one_context(5)[1]
    logprobs = logits.log_softmax(0)
    joint = [on_policy(logprobs - q.detach(), logits, logprobs) for q in (teacher, other)]
    assert torch.equal(joint[0], joint[1])
    case = make_case(3, 3)
    ours = []
    for q in (case.teacher, case.behaviour):
        log_ratio = case.world.logprobs(case.theta) - case.world.logprobs(q)
        kl = case.world.at_contexts((case.world.logprobs(case.theta).exp() * log_ratio).sum(1))
        a = coefficient(estimator, case.world.along(log_ratio), case.world.mask_ST, kl_BT=kl, gamma=0.5)
        ours.append(expected_gradient(case, a))
    assert not close(ours[0], ours[1], 0.1)


def test_averaging_per_micro_batch_depends_on_the_cut_and_global_weights_do_not():
    """verl#7225: a mean of micro-batch means weighs the tokens of a short micro-batch more."""
    parameter = torch.zeros(9, requires_grad=True)
    a = torch.arange(1.0, 10.0)
    lengths = torch.tensor([4, 2, 3])
    weights = token_weights(torch.ones(9, dtype=torch.bool), lengths, "token_mean")

    def gradient(cut: list[int], ours: bool) -> Tensor:
        total = torch.zeros(9)
        for rows in torch.arange(9).split(cut):
            cost, _ = surrogate(parameter[rows], torch.zeros(len(rows)), a[rows])
            loss = (weights[rows] * cost).sum() if ours else cost.mean() / len(cut)
            total += torch.autograd.grad(loss, parameter)[0]
        return total

    assert not torch.allclose(gradient([9], False), gradient([4, 2, 3], False), rtol=0.1)
    assert torch.allclose(gradient([9], True), gradient([4, 2, 3], True))
    assert torch.allclose(gradient([9], True), a / 9)


def test_z_scoring_turns_the_sign_of_coefficients_and_ours_keeps_it():
    """Where the teacher dislikes every token, half of the z-scored costs are rewards (PowerOPD, arXiv 2606.17199)."""
    generator = torch.Generator().manual_seed(0)
    log_ratio = 0.5 + torch.rand(4, 8, generator=generator)
    mask = torch.ones(4, 8, dtype=torch.bool)
    z = (log_ratio - log_ratio.mean()) / log_ratio.std()
    assert (z < 0).float().mean() > 0.3
    for estimator in ("immediate", "to_go", "trajectory", "discounted", "to_go_expected"):
        assert (coefficient(estimator, log_ratio, mask, kl_BT=log_ratio, gamma=0.9) > 0).all()


def test_z_scoring_over_the_batch_is_not_the_exact_gradient_in_any_scale():
    """A batch of two: every pair of sequences enumerated; dividing by a deviation that depends on y_t is no baseline."""
    case = make_case(3, 3)
    count = len(case.world.tokens_ST)
    first, second = torch.arange(count).repeat_interleave(count), torch.arange(count).repeat(count)
    pair = torch.stack([first, second], 1)
    values, mask = case.coefficient("to_go")[pair], case.world.mask_ST[pair]
    n = mask.sum((1, 2), keepdim=True)
    mean = values.sum((1, 2), keepdim=True) / n
    deviation = (((values - mean) * mask).square().sum((1, 2), keepdim=True) / n).sqrt().clamp(min=1e-6)
    z = (values - mean) / deviation * mask
    p_S = case.world.probabilities(case.theta)
    found = torch.einsum("n,nit,nitf->f", p_S[first] * p_S[second], z, case.scores_STF[pair])
    assert torch.nn.functional.cosine_similarity(found, case.gradient, dim=0) < 0.99
