"""The estimators: what each of them needs, and how a user's own estimator, divergence or cost is found.

Standard library only. `learner.objective.estimator` names a row of ESTIMATORS, or a function of the user's own,
`package.module:function`, whose attributes are the fields of its row. Code that has to know what an estimator needs reads
a field of its row; it never compares names.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from actors.errors import UserError
from actors.import_path import import_object, is_import_path


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """What one estimator needs and does. Example: Estimator(needs_distribution=True) for one that adds exact KLs."""

    needs_distribution: bool = False
    """The teacher must send a support: the estimator is given the KL at each context (`kl_BT`)."""
    needs_whole_update: bool = False
    """A_t depends on other trajectories (`group_B`), so it is computed before the first micro-batch."""
    discounts: bool = False
    """It reads `objective.gamma`."""
    is_coefficient: bool = True
    """It has a coefficient A_t that is computed from the teacher's log-ratios."""
    samples_action: bool = True
    """It has one term for each sampled token. False: the gradient of a divergence, closed over the vocabulary."""
    needs_reward: bool = False
    """The coefficient is the reward's cost alone."""
    text_by: str = "student"
    """Who writes the responses that are trained on: "student", or "teacher"."""

    @property
    def has_coefficient(self) -> bool:
        """The loss is the clipped ratio times A_t, from log-ratios or from the reward."""
        return self.is_coefficient or self.needs_reward


ESTIMATORS = {
    "trajectory": Estimator(),
    "to_go": Estimator(),
    "to_go_expected": Estimator(needs_distribution=True, discounts=True),
    "discounted": Estimator(discounts=True),
    "immediate": Estimator(),
    "full": Estimator(needs_distribution=True, is_coefficient=False, samples_action=False),
    "reward": Estimator(is_coefficient=False, needs_reward=True),
    "sft": Estimator(is_coefficient=False, text_by="teacher"),
}
"""The built-in estimators by name; the functions are in policy_gradient.py."""

DIVERGENCES = (
    "reverse_kl",
    "forward_kl",
    "jsd",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "entropy_gated_kl",
)
"""The built-in divergences; the functions are in divergences.py."""

OWN_FIELDS = ("needs_distribution", "needs_whole_update", "discounts")
"""Fields that a function of the user's own may set as attributes. The others have their defaults: it is a coefficient."""
KEY = "learner.objective"


def estimator_row(name: str) -> Estimator:
    """The row of an estimator; imports one of the user's own. UserError: no such estimator, or an unknown attribute."""
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    function = own_function(name, f"{KEY}.estimator", ESTIMATORS)
    others = {field.name for field in fields(Estimator)} - set(OWN_FIELDS)
    if fixed := sorted(name for name in others if hasattr(function, name)):
        raise UserError(f"{KEY}.estimator", f"{name} with the attribute {fixed[0]}", f"only {', '.join(OWN_FIELDS)}")
    needs: dict[str, Any] = {field: bool(getattr(function, field, False)) for field in OWN_FIELDS}
    return Estimator(**needs)


def reads_distribution(objective: Any) -> bool:
    """Whether the objective (ObjectiveConfig) reads the teacher's support, so that the teacher must send one."""
    return estimator_row(objective.estimator).needs_distribution or objective.baseline == "exact_kl"


def own_functions(objective: Any) -> list[str]:
    """The import paths of the user's own functions in an ObjectiveConfig."""
    named = (objective.estimator, objective.divergence, objective.cost)
    return [path for path in named if path is not None and is_import_path(path)]


def own_function(name: str, key: str, built_in: Any = ()) -> Callable[..., Any]:
    """The function of the user's own at the import path `name`. UserError: there is none."""
    if not is_import_path(name):
        expected = f"one of {', '.join(built_in)}, or " if built_in else ""
        raise UserError(key, repr(name), f"{expected}package.module:function of your own", built_in)
    return import_object(name, key, "a function")
