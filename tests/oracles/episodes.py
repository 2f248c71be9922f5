"""Episodes small enough to enumerate: a policy that writes in turns, and an environment that answers at random.

Independent: imports nothing of the project. The policy is as in enumeration.py, over V tokens of which 0 ends a turn; a turn
has at most L tokens. After a turn the environment ends the episode, or writes one of two observations, (1,) or (2, 0), with
probabilities that depend on everything written before. After the last turn the episode ends. Tokens alone tell the history:
observations are a prefix code.

Shapes: C contexts, V vocabulary, S episodes, N tokens of the longest (padded), F parameters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

STOP = 0
OBSERVATIONS = ((1,), (2, 0))


@dataclass(frozen=True)
class Episodes:
    """Every episode, with the probability that the environment answers as it does there."""

    tokens_SN: Tensor
    """[S, N] int64, 0 (also) after the end."""
    contexts_SN: Tensor
    """[S, N] int64: the context each token was written in, whoever wrote it."""
    own_SN: Tensor
    """[S, N] bool: the policy wrote the token."""
    exists_SN: Tensor
    """[S, N] bool."""
    turns_SN: Tensor
    """[S, N] int64: the policy's turn, from 0; -1 elsewhere."""
    environment_S: Tensor
    """[S] float64: log of the product of the environment's probabilities along the episode."""
    features_CVF: Tensor
    """[C, V, F] float64."""
    place: dict[tuple[int, ...], int]
    """Tokens so far -> context."""

    def policy(self, seed: int, scale: float = 1.0) -> Tensor:
        """[F] parameters of a policy, from a seed."""
        generator = torch.Generator().manual_seed(seed)
        return scale * torch.randn(self.features_CVF.shape[2], generator=generator, dtype=torch.float64)

    def logprobs(self, theta_F: Tensor) -> Tensor:
        """[C, V] log pi(. | c) at every context, also where the environment writes next."""
        return torch.log_softmax(self.features_CVF @ theta_F, -1)

    def along(self, values_CV: Tensor) -> Tensor:
        """[C, V] -> [S, N]: the entries of all tokens, the environment's too; 0 after the end."""
        return values_CV[self.contexts_SN, self.tokens_SN] * self.exists_SN

    def own(self, theta_F: Tensor) -> Tensor:
        """[S, N] log pi of the tokens that the policy wrote, 0 elsewhere."""
        return self.along(self.logprobs(theta_F)) * self.own_SN

    def joint(self, theta_F: Tensor) -> Tensor:
        """[S] log-probability of each episode: of what the policy wrote and of what the environment answered."""
        return self.own(theta_F).sum(1) + self.environment_S

    def kl(self, theta_F: Tensor, teacher_F: Tensor) -> Tensor:
        """[C] KL(pi(. | c) || q(. | c))."""
        student, teacher = self.logprobs(theta_F), self.logprobs(teacher_F)
        return (student.exp() * (student - teacher)).sum(1)


def episodes(vocabulary: int, turn_tokens: int, turns: int, parameters: int = 10, seed: int = 0) -> Episodes:
    """Enumerates the episodes; the environment's probabilities and the features come from the seed."""
    assert vocabulary > max(map(max, OBSERVATIONS))
    generator = torch.Generator().manual_seed(seed)
    place: dict[tuple[int, ...], int] = {}
    found: list[tuple[tuple[int, ...], tuple[int, ...], float]] = []

    def write(history: tuple[int, ...], turn_of: tuple[int, ...], turn: int, length: int, answered: float) -> None:
        place.setdefault(history, len(place))
        for token in range(vocabulary):
            after, by = (*history, token), (*turn_of, turn)
            if token != STOP and length + 1 < turn_tokens:
                write(after, by, turn, length + 1, answered)
            elif turn + 1 == turns:
                found.append((after, by, answered))
            else:
                answer(after, by, turn, answered)

    def answer(history: tuple[int, ...], turn_of: tuple[int, ...], turn: int, answered: float) -> None:
        place.setdefault(history, len(place))
        logs = torch.randn(1 + len(OBSERVATIONS), generator=generator, dtype=torch.float64).log_softmax(0).tolist()
        found.append((history, turn_of, answered + logs[0]))
        for log, observation in zip(logs[1:], OBSERVATIONS, strict=True):
            for length in range(1, len(observation)):
                place.setdefault((*history, *observation[:length]), len(place))
            by = (*turn_of, *[-1] * len(observation))
            write((*history, *observation), by, turn + 1, 0, answered + log)

    write((), (), 0, 0, 0.0)
    longest = max(len(history) for history, _, _ in found)
    tokens, contexts = (torch.zeros(len(found), longest, dtype=torch.long) for _ in range(2))
    turn_SN, exists = torch.full(tokens.shape, -1), torch.zeros(tokens.shape, dtype=torch.bool)
    for s, (history, by, _) in enumerate(found):
        for n, (token, turn) in enumerate(zip(history, by, strict=True)):
            tokens[s, n], contexts[s, n], turn_SN[s, n], exists[s, n] = token, place[history[:n]], turn, True
    features = torch.randn(len(place), vocabulary, parameters, generator=generator, dtype=torch.float64)
    environment = torch.tensor([log for _, _, log in found], dtype=torch.float64)
    return Episodes(tokens, contexts, turn_SN >= 0, exists, turn_SN, environment, features / parameters**0.5, place)


def reverse_kl(world: Episodes, theta_F: Tensor, teacher_F: Tensor) -> Tensor:
    """[] J = E[sum over the policy's tokens of log pi - log q], differentiable."""
    cost_S = (world.own(theta_F) - world.own(teacher_F).detach()).sum(1)
    return (world.joint(theta_F).exp() * cost_S).sum()


def gradient(world: Episodes, theta_F: Tensor, teacher_F: Tensor) -> Tensor:
    """[F] the exact gradient of J, by autograd through the enumerated objective."""
    theta_F = theta_F.clone().requires_grad_()
    return torch.autograd.grad(reverse_kl(world, theta_F, teacher_F), theta_F)[0]


def by_distance(world: Episodes, theta_F: Tensor, teacher_F: Tensor) -> dict[tuple[int, int], Tensor]:
    """(d, k) -> [F] E[sum of r_t' grad log pi(y_t)] over the pairs t <= t' of the policy's tokens that are d of its tokens
    and k of its turns apart. The exact gradient is their sum."""
    scores_SNF = torch.func.jacrev(lambda theta: world.own(theta))(theta_F)
    r_SN = world.own(theta_F) - world.own(teacher_F)
    found: dict[tuple[int, int], Tensor] = {}
    for s, p in enumerate(world.joint(theta_F).exp()):
        own = world.own_SN[s].nonzero()[:, 0].tolist()
        for i, t in enumerate(own):
            for d, later in enumerate(own[i:]):
                key = (d, int(world.turns_SN[s, later] - world.turns_SN[s, t]))
                found[key] = found.get(key, 0) + p * r_SN[s, later] * scores_SNF[s, t]
    return found


def at_visits(world: Episodes, theta_F: Tensor, teacher_F: Tensor, weight_SN: Tensor | None = None) -> Tensor:
    """[F] E[sum over the policy's tokens of w_t grad KL_t], the visits held fixed. weight_SN: w; None: 1."""
    p_SN = world.joint(theta_F).exp()[:, None] * world.own_SN * (1 if weight_SN is None else weight_SN)
    theta = theta_F.clone().requires_grad_()
    return torch.autograd.grad((p_SN.detach() * world.kl(theta, teacher_F)[world.contexts_SN]).sum(), theta)[0]
