"""From log-probs to costs: what the configuration's objective does with the tokens of a micro-batch or an update.

The formulas are in objective/policy_gradient.py and objective/divergences.py; here they are chosen. Shapes: n tokens, V vocabulary,
K support.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from actors.errors import UserError
from actors.import_path import is_import_path
from learner.collate import Part
from learner.config import ObjectiveConfig
from learner.hidden_states import mixture_logprobs
from learner.objective import divergences
from learner.objective.estimator_table import DIVERGENCES, KEY, estimator_row, own_function
from learner.objective.policy_gradient import (
    coefficient,
    corrected_weights,
    estimator_arguments,
    log_importance_weights,
    position_weights,
    step_discounts,
)


def needs_whole_update(objective: ObjectiveConfig) -> bool:
    """Whether A_t depends on other trajectories, so that it cannot be computed micro-batch by micro-batch."""
    row = estimator_row(objective.estimator)
    return row.needs_whole_update or (row.samples_action and objective.baseline in ("batch_mean", "group_mean"))


def on_support(
    logprobs_nV: Tensor, part: Part, rows: slice | Tensor, objective: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """Student's and teacher's log-probs over the teacher's support, [n, K] each, for some tokens of a part."""
    sources = [mixture_logprobs(part.hidden, rows) if part.hidden else part.support_logprobs[rows]]
    if objective.reference_teacher is not None:
        hidden = part.reference_hidden
        sources.append(mixture_logprobs(hidden, rows) if hidden else part.reference_logprobs[rows])
    if not part.support_ids.shape[1]:
        student, teacher, *reference = divergences.on_shared_rows(logprobs_nV, *sources)
    else:
        # Teacher and student are closed in the same way: two top-k supports as they are would not be distributions, and
        # their KL could be negative.
        close = divergences.with_tail if objective.support == "tail" else divergences.renormalised
        on_entries = divergences.without_missing(logprobs_nV.gather(-1, part.support_ids[rows]), *sources)
        student, teacher, *reference = map(close, on_entries)
    if reference:
        teacher = divergences.extrapolated_teacher(teacher, reference[0], objective.extrapolation)
        if not estimator_row(objective.estimator).samples_action:
            # Extrapolated log-probs do not sum to 1. A divergence needs a distribution; a sum of log-ratios does not.
            teacher = divergences.renormalised(teacher)
    return student, teacher


def exact_kl(logprobs_nV: Tensor, part: Part, rows: slice | Tensor, objective: ObjectiveConfig) -> Tensor:
    """[n] KL(pi || q) at each context."""
    return divergences.reverse_kl(*on_support(logprobs_nV, part, rows, objective))


def full_cost_is_exact_kl(objective: ObjectiveConfig) -> bool:
    """Whether `full_cost` is the exact KL itself, so that it need not be computed a second time to be measured."""
    plain = not has_bounded_cost(objective) and objective.proximal_weight == 1
    return not estimator_row(objective.estimator).samples_action and plain and objective.divergence == "reverse_kl"


def has_bounded_cost(objective: ObjectiveConfig) -> bool:
    """Whether something else takes the place of the plain log-ratio."""
    return any(found is not None for found in (objective.log_ratio_clip, objective.log_ratio_power, objective.cost))


def log_ratio_cost(student: Tensor, teacher: Tensor, objective: ObjectiveConfig) -> Tensor:
    """The cost of each token, any shape, without gradient: the log-ratio, bounded or replaced as configured."""
    if objective.cost is not None:
        return own_function(objective.cost, f"{KEY}.cost")(student.detach(), teacher.detach()).detach()
    return divergences.bounded_cost(student, teacher, power=objective.log_ratio_power, clip=objective.log_ratio_clip)


def check_own_functions(objective: ObjectiveConfig) -> None:
    """Tries each function of the user's own on a small example. UserError: an exception, another shape or type, or NaN."""
    logprobs = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    teacher = logprobs.flip(0)
    mask = torch.tensor([[True] * 5, [True] * 4 + [False], [True] * 2 + [False] * 3])
    row, groups = estimator_row(objective.estimator), torch.tensor([0, 0, 1])
    tried: dict[str, tuple[str | None, Callable[[Callable[..., Tensor]], Tensor], tuple[int, ...]]] = {
        "estimator": (
            objective.estimator,
            lambda own: own(logprobs - teacher, mask, **estimator_arguments(row, teacher.exp(), 0.5, groups)),
            (3, 5),
        ),
        "divergence": (objective.divergence, lambda own: own(logprobs.clone().requires_grad_(), teacher), (3,)),
        "cost": (objective.cost, lambda own: own(logprobs, teacher), (3, 5)),
    }
    # A small ragged example (3 responses, 2 prompts) shows a wrong shape or dtype before a campaign starts.
    for name, (path, call, shape) in tried.items():
        if path is None or not is_import_path(path):
            continue
        key, expected = f"{KEY}.{name}", f"a float tensor {list(shape)} for a small example (docs/extending.md)"
        own = own_function(path, key)
        try:
            found = call(own)
        except (Exception, SystemExit) as error:
            raise UserError(key, f"{path}: {type(error).__name__}: {error}", expected) from error
        if not isinstance(found, Tensor) or not found.is_floating_point() or tuple(found.shape) != shape:
            kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise UserError(key, f"{path}: {kind}", expected)
        # At masked positions an estimator may return anything.
        if not found[mask if name == "estimator" else ...].isfinite().all():
            raise UserError(key, f"{path}: NaN or infinity", "finite numbers for a small example (docs/extending.md)")
        if name == "divergence" and not found.requires_grad:
            raise UserError(
                key, f"{path}: no gradient", "a divergence that is differentiable in the student's log-probs"
            )


def full_cost(logprobs_nV: Tensor, part: Part, rows: slice | Tensor, objective: ObjectiveConfig) -> Tensor:
    """[n] D(pi(. | c_t), q(. | c_t)) in nats, the divergence that the estimator `full` minimises at each context.

    logprobs_nV: log pi, with gradient. rows: which tokens of the part. UserError: see `coefficients`.
    """
    student, teacher = on_support(logprobs_nV, part, rows, objective)
    teacher = divergences.proximal_teacher(student, teacher, objective.proximal_weight)
    if has_bounded_cost(objective):
        # A bounded cost has no divergence of its own: its expectation under pi takes the place of sum_v pi_v r_v.
        return divergences.expected_cost(student, log_ratio_cost(student, teacher, objective))
    if objective.divergence not in DIVERGENCES:
        return own_function(objective.divergence, f"{KEY}.divergence")(student, teacher)
    parameters = {
        "jsd": objective.mixture,
        "skewed_forward_kl": objective.mixture,
        "skewed_reverse_kl": objective.mixture,
        "entropy_gated_kl": objective.entropy_threshold,
    }
    extra = [parameters[objective.divergence]] if objective.divergence in parameters else []
    return getattr(divergences, objective.divergence)(student, teacher, *extra)


def importance_of(logprobs: Tensor, part: Part, objective: ObjectiveConfig) -> Tensor:
    """[n] importance weights pi_old / pi_behaviour, truncated or masked (`mismatch.correction`), without unit.

    logprobs: [n] log pi_old, the learner's own at the start of the update. part: holds whole trajectories. The formulas
    are those of `log_importance_weights` and `corrected_weights`. Weights are 0 at tokens that are not trained.
    """
    mismatch = objective.mismatch
    level: str = mismatch.level
    if level == "prefix" and not estimator_row(objective.estimator).samples_action:
        level = "before"  # a divergence samples no action at t: only the context needs the correction
    # `trained`, and not `mask`: a token without a score was sampled all the same, and is in the context of later ones.
    written = part.padded(torch.ones_like(part.mask))
    log_weights = log_importance_weights(part.padded(logprobs - part.behaviour_logprobs), written, level)
    return part.flat(corrected_weights(log_weights, mismatch.correction, mismatch.low, mismatch.high))


def coefficients(
    logprobs: Tensor, kl: Tensor | None, part: Part, groups: Tensor | None, objective: ObjectiveConfig
) -> Tensor:
    """[n] the coefficient A_t of grad log pi(y_t), in nats, without gradient; 0 at masked tokens.

        A_t = w_t (estimator(c) - b)_t + reward_weight reward_cost_t

    c: the cost of each token, its log-ratio log pi - log q unless it is bounded or replaced. b: the baseline. w: the
    position weights. The formulas are in objective/policy_gradient.py. logprobs: [n] log pi of the sampled tokens. kl: [n]
    KL(pi || q) at each context, None where the estimator needs none. part: holds whole trajectories, since A_t sums over
    later tokens. groups: [b] equal for samples of one prompt; None where A_t depends on no other trajectory.
    UserError: a function of the user's own cannot be imported.
    """
    row = estimator_row(objective.estimator)
    if row.needs_reward:
        return part.reward_cost
    student = logprobs.detach()  # A_t is a factor of the score function; its own gradient is not part of the theorem
    teacher = divergences.proximal_teacher(student, part.teacher_logprobs, objective.proximal_weight)
    cost = log_ratio_cost(student, teacher, objective)
    cost = torch.where(part.mask, cost, torch.zeros_like(cost))  # teacher log-probs of masked tokens are placeholders
    mask_BT = part.padded(part.mask)
    gamma: float | Tensor = objective.gamma
    if objective.turn_discount != 1:
        gamma = step_discounts(objective.gamma, objective.turn_discount, part.padded(part.turns))
    found = coefficient(
        objective.estimator,
        part.padded(cost),
        mask_BT,
        kl_BT=None if kl is None else part.padded(torch.where(part.mask, kl, torch.zeros_like(kl))),
        gamma=gamma,
        baseline_name=objective.baseline,
        group_B=groups,
    )
    found = found * position_weights(found, mask_BT, objective.position_weight)
    return part.flat(found) + objective.reward_weight * part.reward_cost
