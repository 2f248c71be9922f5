"""The tables of bias and variance in docs/objective.md: `python -m tests.unit.learner.bias_variance` prints them.

Exact, by enumeration: a policy with 4 tokens and at most 4 steps writes 121 different sequences. Two teachers: one that
is far from the student, as at the start of a campaign, and one that is near, as at its end.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.objective.divergences import (
    bounded_cost,
    expected_cost,
    forward_kl,
    proximal_teacher,
    renormalised,
    reverse_kl,
    with_tail,
)
from learner.objective.policy_gradient import coefficient, log_importance_weights, position_weights
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


def make_case(vocabulary: int, horizon: int, parameters: int = 12, seed: int = 0, near: bool = False) -> Case:
    """Policies from fixed seeds; the teacher differs from the student, and the behaviour policy a little."""
    world = enumeration.world(vocabulary, horizon, parameters, seed)
    theta, teacher = world.policy(1), world.policy(2, 1.5)
    teacher = theta + 0.2 * (teacher - theta) if near else teacher
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


def large_group_mean(case: Case, coefficient_ST: Tensor) -> Tensor:
    """[S, T] A_t less its mean over all sequences that reach the position: `group_mean` in the limit of many samples."""
    p_S1, mask = case.world.probabilities(case.theta)[:, None], case.world.mask_ST
    return (coefficient_ST - (p_S1 * coefficient_ST).sum(0) / (p_S1 * mask).sum(0)) * mask


ROWS = [
    ("trajectory", "none", 1.0),
    ("trajectory", "group of 2", 1.0),
    ("trajectory", "large group", 1.0),
    ("to_go", "none", 1.0),
    ("to_go", "group of 2", 1.0),
    ("to_go", "large group", 1.0),
    ("to_go", "exact_kl", 1.0),
    ("to_go_expected", "none", 1.0),
    ("to_go_expected", "group of 2", 1.0),
    ("to_go_expected", "large group", 1.0),
    ("to_go_expected", "exact_kl", 1.0),
    ("discounted", "none", 0.9),
    ("to_go_expected", "none", 0.9),
    ("discounted", "none", 0.5),
    ("to_go_expected", "none", 0.5),
    ("immediate", "none", 1.0),
    ("immediate", "group of 2", 1.0),
    ("immediate", "large group", 1.0),
    ("immediate", "exact_kl", 1.0),
    ("full", "", 1.0),
]


def row_moments(case: Case, estimator: str, baseline: str, gamma: float) -> tuple[Tensor, Tensor]:
    """([F] mean, [] variance per sample) of one row of the table."""
    if estimator == "full":
        return enumeration.moments(case.world.probabilities(case.theta), case.kl_gradients().sum(1))
    if baseline == "group of 2":  # the mean of two estimates that share a baseline has half the variance of one
        mean, variance = enumeration.moments(*estimates_of_pairs(case, estimator, "group_mean", gamma))
        return mean, 2 * variance
    if baseline == "large group":
        return case.moments(large_group_mean(case, case.coefficient(estimator, gamma=gamma)))
    return case.moments(case.coefficient(estimator, baseline=baseline, gamma=gamma))


def bounded_moments(case: Case, estimator: str, option: str, value: float) -> tuple[Tensor, Tensor]:
    """([F] mean, [] variance) of an estimator whose signal is bent: what a bound or a weight costs and saves."""
    student_CV, teacher_CV = case.world.logprobs(case.theta), case.world.logprobs(case.teacher)
    if option == "position_weight":
        values = case.coefficient(estimator)
        return case.moments(values * position_weights(values, case.world.mask_ST, value))
    if option == "proximal_weight":
        teacher_CV, bound = proximal_teacher(student_CV, teacher_CV, value), {}
    else:
        bound = {option.removeprefix("log_ratio_"): value}
    cost_CV = bounded_cost(student_CV, teacher_CV, **bound)
    if estimator == "full":
        per_context = torch.func.jacrev(lambda theta: expected_cost(case.world.logprobs(theta), cost_CV))(case.theta)
        estimates = (per_context[case.world.contexts_ST] * case.world.mask_ST[..., None]).sum(1)
        return enumeration.moments(case.world.probabilities(case.theta), estimates)
    return case.moments(replace(case, log_ratio_ST=case.world.along(cost_CV)).coefficient(estimator))


BOUNDED = [
    (estimator, option, value)
    for estimator in ("immediate", "full")
    for option, value in (("log_ratio_clip", 1.0), ("log_ratio_power", 0.5), ("proximal_weight", 0.2))
] + [("immediate", "position_weight", 0.5)]


def bounded_table() -> str:
    """Markdown. How far the expected direction is turned from that of the same estimator unbent, and the variance in
    units of the expectation's square: a bound also scales, which a learning rate undoes."""
    lines = [
        "| estimator | | cosine, far | variance, far | cosine, near | variance, near |",
        "|---|---|---|---|---|---|",
    ]
    cases = [make_case(4, 4), make_case(4, 4, near=True)]
    for estimator, option, value in [(e, "", 0.0) for e in ("immediate", "full")] + BOUNDED:
        cells = []
        for case in cases:
            plain = row_moments(case, estimator, "none", 1.0)
            mean, variance = bounded_moments(case, estimator, option, value) if option else plain
            turned = torch.nn.functional.cosine_similarity(mean, plain[0], dim=0).item()
            cells += [f"{turned:.3f}", f"{(variance / mean.square().sum()).item():.3g}"]
        lines.append(" | ".join([f"| {estimator}", f"`{option}: {value:g}`" if option else "", *cells]) + " |")
    return "\n".join(lines)


SUPPORTS = [(whose, close) for whose in ("teacher", "student") for close in ("tail", "renormalised")]


def support_kl(case: Case, divergence: str, whose: str, close: str, theta: Tensor) -> Tensor:
    """[C] a divergence at each context over the two tokens, of four, that are most likely to one of the two."""
    closed = {"tail": with_tail, "renormalised": renormalised}[close]
    teacher_CV, now_CV = case.world.logprobs(case.teacher), case.world.logprobs(theta)
    named = teacher_CV if whose == "teacher" else case.world.logprobs(case.theta)
    ids_CK = named.topk(2).indices
    pair = closed(now_CV.gather(1, ids_CK)), closed(teacher_CV.gather(1, ids_CK))
    return {"reverse_kl": reverse_kl, "forward_kl": forward_kl}[divergence](*pair)


def support_moments(case: Case, estimator: str, divergence: str, whose: str, close: str) -> tuple[Tensor, Tensor]:
    """([F] mean, [] variance) of an estimator that is given a support of two; `whose` all: the whole vocabulary."""

    def kl(theta: Tensor) -> Tensor:
        if whose != "all":
            return support_kl(case, divergence, whose, close, theta)
        pair = case.world.logprobs(theta), case.world.logprobs(case.teacher)
        return {"reverse_kl": reverse_kl, "forward_kl": forward_kl}[divergence](*pair)

    if estimator == "to_go_expected":
        known = replace(case, kl_ST=case.world.at_contexts(kl(case.theta)))
        return case.moments(known.coefficient(estimator))
    per_context = torch.func.jacrev(kl)(case.theta)[case.world.contexts_ST] * case.world.mask_ST[..., None]
    return enumeration.moments(case.world.probabilities(case.theta), per_context.sum(1))


def support_table() -> str:
    """Markdown. Bias from the same estimator with the whole vocabulary, in units of its expectation; variance of its square."""
    lines = [
        "| estimator | divergence | top 2 of | the rest | bias, far | variance, far | bias, near | variance, near |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases = [make_case(4, 4), make_case(4, 4, near=True)]
    kinds = [("full", "reverse_kl"), ("full", "forward_kl"), ("to_go_expected", "reverse_kl")]
    for estimator, divergence in kinds:
        for whose, close in [("all", ""), *SUPPORTS]:
            cells = []
            for case in cases:
                wanted, _ = support_moments(case, estimator, divergence, "all", "")
                mean, variance = support_moments(case, estimator, divergence, whose, close)
                bias = ((mean - wanted).norm() / wanted.norm()).item()
                cells += [f"{bias if bias > 1e-9 else 0:.3g}", f"{(variance / wanted.square().sum()).item():.3g}"]
            lines.append(" | ".join([f"| {estimator}", divergence, whose, close, *cells]) + " |")
    return "\n".join(lines)


def off_policy_moments(case: Case, estimator: str, level: str, high: float | None) -> tuple[Tensor, Tensor]:
    """([F] mean, [] variance) of an estimate from one sequence of the behaviour policy, weighed at a level, cut at high."""
    w = case.world
    weights = w.mask_ST.double()
    if level != "none":
        log_ratio = w.along(w.logprobs(case.theta)) - w.along(w.logprobs(case.behaviour))
        weights = log_importance_weights(log_ratio, w.mask_ST, level).exp()
        weights = weights if high is None else weights.clamp(max=high)
    if estimator == "full":
        estimates = (weights[..., None] * case.kl_gradients()).sum(1)
    else:
        estimates = case.estimates(weights * case.coefficient(estimator))
    return enumeration.moments(w.probabilities(case.behaviour), estimates)


OFF_POLICY = [
    *(
        ("immediate", level, high)
        for level, high in (("none", None), ("token", None), ("prefix", None), ("prefix", 1.5))
    ),
    *(("full", level, high) for level, high in (("none", None), ("before", None), ("prefix", None))),
    *(("full", level, 1.5) for level in ("before", "prefix")),
    *(
        ("to_go", level, high)
        for level, high in (("none", None), ("token", None), ("prefix", None), ("sequence", None))
    ),
    ("to_go", "sequence", 1.5),
    *(("to_go_expected", level, None) for level in ("none", "sequence")),
]


def off_policy_table() -> str:
    """Markdown. Bias from what the estimator has in expectation on-policy, in units of it; variance in units of its square."""
    lines = ["| estimator | weight | cut at | bias | variance |", "|---|---|---|---|---|"]
    case = make_case(4, 4)
    for estimator, level, high in OFF_POLICY:
        wanted, _ = row_moments(case, estimator, "none", 1.0)
        mean, variance = off_policy_moments(case, estimator, level, high)
        bias = ((mean - wanted).norm() / wanted.norm()).item()
        cells = [estimator, level, "" if high is None else f"{high:g}", f"{bias if bias > 1e-9 else 0:.3g}"]
        lines.append("| " + " | ".join([*cells, f"{(variance / wanted.square().sum()).item():.3g}"]) + " |")
    return "\n".join(lines)


def table() -> str:
    """Markdown. Bias: |E g - grad J| / |grad J|. Variance: of one trajectory's estimate, in units of |grad J|^2."""
    lines = [
        "| estimator | baseline | gamma | bias, far | variance, far | bias, near | variance, near |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = [make_case(4, 4), make_case(4, 4, near=True)]
    for estimator, baseline, gamma in ROWS:
        cells = []
        for case in cases:
            norm = case.gradient.norm()
            mean, variance = row_moments(case, estimator, baseline, gamma)
            bias = ((mean - case.gradient).norm() / norm).item()
            cells += [f"{bias if bias > 1e-9 else 0:.3g}", f"{(variance / norm**2).item():.3g}"]
        lines.append(" | ".join([f"| {estimator}", baseline, f"{gamma:g}" if gamma < 1 else "", *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), support_table(), bounded_table(), off_policy_table(), sep="\n\n")
