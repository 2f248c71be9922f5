"""The table of bias and variance in docs/objective.md: `python -m tests.unit.learner.bias_variance` prints it.

Exact, by enumeration: a policy with 4 tokens and at most 4 steps writes 121 different sequences.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.estimators import coefficient
from tests.oracles import enumeration
from tests.oracles.enumeration import World


@dataclass(frozen=True)
class Case:
    """A student, a teacher and a behaviour policy in one world, with what the estimators are given."""

    world: World
    theta: Tensor
    teacher: Tensor
    behaviour: Tensor
    log_ratio_ST: Tensor
    kl_ST: Tensor
    scores_STF: Tensor
    gradient: Tensor

    def coefficient(self, estimator: str, *, baseline: str = "none", gamma: float = 1.0) -> Tensor:
        """[S, T] A_t of every sequence, each alone in its batch."""
        assert baseline in ("none", "exact_kl")
        return coefficient(
            estimator, self.log_ratio_ST, self.world.mask_ST, kl_BT=self.kl_ST, gamma=gamma, baseline_name=baseline
        )

    def estimates(self, coefficient_ST: Tensor) -> Tensor:
        """[S, F] the gradient estimate from each sequence."""
        return torch.einsum("st,stf->sf", coefficient_ST, self.scores_STF)

    def moments(self, coefficient_ST: Tensor) -> tuple[Tensor, Tensor]:
        """([F] mean, [] variance) of one on-policy sample's estimate."""
        return enumeration.moments(self.world.probabilities(self.theta), self.estimates(coefficient_ST))

    def kl_gradients(self) -> Tensor:
        """[S, T, F] grad KL_t at the visited contexts: what `full` adds up."""
        per_context = torch.func.jacrev(lambda theta: self._kl(theta))(self.theta)
        return per_context[self.world.contexts_ST] * self.world.mask_ST[..., None]

    def _kl(self, theta: Tensor) -> Tensor:
        student, teacher = self.world.logprobs(theta), self.world.logprobs(self.teacher)
        return (student.exp() * (student - teacher)).sum(1)


def make_case(vocabulary: int, horizon: int, parameters: int = 12, seed: int = 0) -> Case:
    """Policies from fixed seeds; the teacher differs from the student, and the behaviour policy a little."""
    world = enumeration.world(vocabulary, horizon, parameters, seed)
    theta, teacher = world.policy(1), world.policy(2, 1.5)
    student_CV, teacher_CV = world.logprobs(theta), world.logprobs(teacher)
    kl_C = (student_CV.exp() * (student_CV - teacher_CV)).sum(1)
    return Case(
        world,
        theta,
        teacher,
        theta + 0.3 * world.policy(3),
        world.along(student_CV - teacher_CV),
        world.at_contexts(kl_C),
        world.scores(theta),
        enumeration.reverse_kl_gradient(world, theta, teacher),
    )


def estimates_of_pairs(case: Case, estimator: str, baseline: str, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """([S S] probability, [S S, F] estimate) of every pair of sequences as a group, or as a batch, of two."""
    count = len(case.world.tokens_ST)
    first, second = torch.arange(count).repeat_interleave(count), torch.arange(count).repeat(count)
    p_S = case.world.probabilities(case.theta)
    rows = torch.stack([first, second], 1)
    if baseline == "group_mean":
        values = _of_rows(
            case, rows.flatten(), estimator, baseline, gamma, torch.arange(len(rows)).repeat_interleave(2)
        )
    else:
        values = torch.cat([_of_rows(case, pair, estimator, baseline, gamma, None) for pair in rows])
    estimates = torch.einsum("nt,ntf->nf", values, case.scores_STF[rows.flatten()]).view(len(rows), 2, -1).mean(1)
    return p_S[first] * p_S[second], estimates


def _of_rows(case: Case, rows: Tensor, estimator: str, baseline: str, gamma: float, group: Tensor | None) -> Tensor:
    return coefficient(
        estimator,
        case.log_ratio_ST[rows],
        case.world.mask_ST[rows],
        kl_BT=case.kl_ST[rows],
        gamma=gamma,
        baseline_name=baseline,
        group_B=group,
    )


ROWS = [
    ("trajectory", "none", 1.0),
    ("trajectory", "group_mean", 1.0),
    ("to_go", "none", 1.0),
    ("to_go", "group_mean", 1.0),
    ("to_go", "exact_kl", 1.0),
    ("to_go_expected", "none", 1.0),
    ("to_go_expected", "group_mean", 1.0),
    ("to_go_expected", "exact_kl", 1.0),
    ("discounted", "none", 0.9),
    ("discounted", "none", 0.5),
    ("to_go_expected", "none", 0.9),
    ("to_go_expected", "none", 0.5),
    ("immediate", "none", 1.0),
    ("immediate", "group_mean", 1.0),
    ("immediate", "exact_kl", 1.0),
]


def table(case: Case) -> str:
    """Markdown: relative bias |E g - grad J| / |grad J|, and the variance of one sample's estimate over |grad J|^2."""
    lines = ["| estimator | baseline | gamma | bias | variance |", "|---|---|---|---|---|"]
    norm = case.gradient.norm()

    def line(name: str, baseline: str, gamma: str, mean: Tensor, variance: Tensor) -> str:
        bias = ((mean - case.gradient).norm() / norm).item()
        return (
            f"| {name} | {baseline} | {gamma} | {bias if bias > 1e-9 else 0:.3g} | {(variance / norm**2).item():.3g} |"
        )

    for estimator, baseline, gamma in ROWS:
        if baseline == "group_mean":  # the mean of two estimates that share a baseline has half the variance of one
            mean, variance = enumeration.moments(*estimates_of_pairs(case, estimator, baseline, gamma))
            variance = 2 * variance
        else:
            mean, variance = case.moments(case.coefficient(estimator, baseline=baseline, gamma=gamma))
        shown = f"{gamma:g}" if gamma < 1 else ""
        lines.append(line(estimator, baseline, shown, mean, variance))
    mean, variance = enumeration.moments(case.world.probabilities(case.theta), case.kl_gradients().sum(1))
    lines.append(line("full", "", "", mean, variance))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(make_case(4, 4)))
