"""A policy small enough to enumerate every sequence it can write. Independent: imports nothing of the project.

The policy has V tokens, of which 0 stops, and at most T steps. Its logits at each context (a prefix without a stop) are
a random linear function of F shared parameters, fewer than a table would have, so contexts influence each other as in a
network. Everything is float64 and exact.

Shapes: C contexts, V vocabulary, S sequences, T steps, F parameters.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

STOP = 0


@dataclass(frozen=True)
class World:
    """All sequences of a vocabulary and a horizon, and the features that make parameters into logits."""

    tokens_ST: Tensor
    """[S, T] int64, 0 (also) after the end."""
    contexts_ST: Tensor
    """[S, T] int64: the context each token was written in, 0 after the end."""
    mask_ST: Tensor
    """[S, T] bool: the token exists; the stop token does."""
    features_CVF: Tensor
    """[C, V, F] float64."""
    prefixes: list[tuple[int, ...]]
    """The C contexts."""

    def policy(self, seed: int, scale: float = 1.0) -> Tensor:
        """[F] parameters of a policy, from a seed."""
        generator = torch.Generator().manual_seed(seed)
        return scale * torch.randn(self.features_CVF.shape[2], generator=generator, dtype=torch.float64)

    def logprobs(self, theta_F: Tensor) -> Tensor:
        """[C, V] log pi(. | c) at every context."""
        return torch.log_softmax(self.features_CVF @ theta_F, -1)

    def along(self, values_CV: Tensor) -> Tensor:
        """[C, V] -> [S, T]: the entries of the tokens that were written, 0 after the end."""
        return values_CV[self.contexts_ST, self.tokens_ST] * self.mask_ST

    def at_contexts(self, values_C: Tensor) -> Tensor:
        """[C] -> [S, T]: the entries of the contexts that were visited, 0 after the end."""
        return values_C[self.contexts_ST] * self.mask_ST

    def probabilities(self, theta_F: Tensor) -> Tensor:
        """[S] probability of each sequence."""
        return self.along(self.logprobs(theta_F)).sum(1).exp()

    def scores(self, theta_F: Tensor) -> Tensor:
        """[S, T, F] grad log pi(y_t | c_t), by autograd."""
        return torch.func.jacrev(lambda theta: self.along(self.logprobs(theta)))(theta_F)


def world(vocabulary: int, horizon: int, parameters: int, seed: int = 0) -> World:
    """Enumerates the sequences: they end with the stop token, or at the horizon without one."""
    going = range(1, vocabulary)
    prefixes = [p for length in range(horizon) for p in itertools.product(going, repeat=length)]
    place = {prefix: i for i, prefix in enumerate(prefixes)}
    sequences = [(*p, STOP) for p in prefixes] + list(itertools.product(going, repeat=horizon))
    shape = (len(sequences), horizon)
    tokens, contexts, mask = (
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape, dtype=torch.long),
        torch.zeros(shape),
    )
    for s, sequence in enumerate(sequences):
        for t, token in enumerate(sequence):
            tokens[s, t], contexts[s, t], mask[s, t] = token, place[sequence[:t]], 1
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(prefixes), vocabulary, parameters, generator=generator, dtype=torch.float64)
    return World(tokens, contexts, mask.bool(), features / parameters**0.5, prefixes)


def reverse_kl(world: World, theta_F: Tensor, teacher_F: Tensor) -> Tensor:
    """[] KL(pi(y) || q(y)) over whole sequences, differentiable: sum over y of pi(y) log(pi(y) / q(y))."""
    student, teacher = (world.along(world.logprobs(x)).sum(1) for x in (theta_F, teacher_F))
    return (student.exp() * (student - teacher.detach())).sum()


def reverse_kl_gradient(world: World, theta_F: Tensor, teacher_F: Tensor) -> Tensor:
    """[F] the exact gradient, by autograd through the enumerated objective."""
    theta_F = theta_F.clone().requires_grad_()
    return torch.autograd.grad(reverse_kl(world, theta_F, teacher_F), theta_F)[0]


def context_probabilities(world: World, theta_F: Tensor) -> Tensor:
    """[C] probability that the policy visits each context."""
    p_S = world.probabilities(theta_F)
    visited = torch.zeros(len(world.prefixes), dtype=torch.float64)
    return visited.index_add(0, world.contexts_ST[world.mask_ST], p_S[:, None].expand_as(world.mask_ST)[world.mask_ST])


def per_context_gradient(world: World, theta_F: Tensor, teacher_F: Tensor, visits_C: Tensor) -> Tensor:
    """[F] sum over contexts of visits_C grad KL(pi(. | c) || q(. | c)), the visits held fixed: the discount-0 gradient."""
    theta_F = theta_F.clone().requires_grad_()
    p = world.logprobs(theta_F)
    kl_C = (p.exp() * (p - world.logprobs(teacher_F).detach())).sum(1)
    return torch.autograd.grad((visits_C.detach() * kl_C).sum(), theta_F)[0]


def moments(p_S: Tensor, estimates_SF: Tensor) -> tuple[Tensor, Tensor]:
    """([F] mean, [] trace of the covariance) of one sample's gradient estimate."""
    mean = (p_S[:, None] * estimates_SF).sum(0)
    return mean, (p_S[:, None] * (estimates_SF - mean).square()).sum()
