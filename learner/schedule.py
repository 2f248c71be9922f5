"""The learning rate of each update, also of a campaign whose schedule was planned anew while it ran. Pure.

A campaign that goes on with another number of updates, or other settings of the schedule, has a list of plans. Each holds
from the update after the one where it was made, and all rates in it are absolute: a campaign that goes back to an earlier
checkpoint takes the same rates again.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from learner.config import OptimizerConfig

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Plan:
    """The rates from one update on: a warm-up, if it is not over, then `schedule` from `rate` down to `final_rate`."""

    after: int
    """The update after which it holds; 0 for the first."""
    until: int
    """The campaign's last update."""
    rate: float
    """Rate at the end of the warm-up, or, where that is over, at `after`."""
    final_rate: float
    """Rate at `until`."""
    warmup_updates: int
    schedule: Shape

    def at(self, update: int) -> float:
        """The rate of an update, counted from 1."""
        # w + 1, not w: the first update after the warm-up then continues the line and does not repeat its last rate.
        if update <= self.warmup_updates:
            return self.rate * update / (self.warmup_updates + 1)
        begin = max(self.after, self.warmup_updates)
        progress = min(1.0, (update - begin) / max(1, self.until - begin))
        return self.final_rate + (self.rate - self.final_rate) * _remaining(progress, self.schedule)

    def to_json(self) -> dict[str, Any]:
        """For config.yaml and checkpoints; `Plan(**content)` is the inverse."""
        return asdict(self)


def learning_rate(update: int, total_updates: int, config: OptimizerConfig, plans: Sequence[Plan] = ()) -> float:
    """The learning rate of one update: linear warm-up, then the schedule.

    update: number of the update, counted from 1. With w = warmup_updates, the rate of update u <= w is peak * u / (w + 1). After
    that p = (u - w) / (total_updates - w) goes from 0 to 1, and the rate is peak * (f + (1 - f) * remaining(p)), where f
    is `final_fraction`. A constant schedule has f = 1. plans: of a campaign that was planned anew, in place of this.
    """
    if plans:
        return next((plan for plan in reversed(plans) if plan.after < update), plans[0]).at(update)
    if update <= config.warmup_updates:
        return config.learning_rate * update / (config.warmup_updates + 1)
    progress = min(1.0, (update - config.warmup_updates) / max(1, total_updates - config.warmup_updates))
    floor = 1.0 if config.schedule == "constant" else config.final_fraction
    return config.learning_rate * (floor + (1 - floor) * _remaining(progress, config.schedule))


def planned_again(
    step: int,
    before: tuple[int, OptimizerConfig, Sequence[Plan]],
    after: tuple[int, OptimizerConfig],
    *,
    afresh: bool = False,
) -> list[Plan]:
    """The plans of a campaign that goes on after update `step` with other settings.

    before, after: (updates of the campaign, optimiser, plans). Within the warm-up, the warm-up continues. After it there is
    no second one: the rate goes from that of update `step` to `final_fraction` of the (new) learning rate over the updates
    that are left. Where the learning rate itself is another, or `afresh`, it goes from that one instead.
    """
    (total, old, plans), (until, new) = before, after
    changed = afresh or new.learning_rate != old.learning_rate
    if (until, new.schedule, new.warmup_updates, new.final_fraction) == (
        total,
        old.schedule,
        old.warmup_updates,
        old.final_fraction,
    ) and not changed:
        return list(plans)
    unmoved = old.warmup_updates == new.warmup_updates or step > max(old.warmup_updates, new.warmup_updates)
    constant = old.schedule == new.schedule == "constant" and not changed and not plans and unmoved
    if step == 0 or constant:  # nothing is trained yet, or every rate stays what it is
        return []
    first = [*plans] or [_whole(total, old)]
    warm = step <= new.warmup_updates and step <= old.warmup_updates
    rate = new.learning_rate if changed or warm else learning_rate(step, total, old, plans)
    final = rate if new.schedule == "constant" else new.final_fraction * new.learning_rate
    return [*first, Plan(step, until, rate, final, new.warmup_updates if warm else 0, new.schedule)]


def _whole(total: int, config: OptimizerConfig) -> Plan:
    """The plan that a campaign begins with."""
    fraction = 1.0 if config.schedule == "constant" else config.final_fraction
    peak = config.learning_rate
    return Plan(0, total, peak, fraction * peak, config.warmup_updates, config.schedule)


def _remaining(progress: float, schedule: Shape) -> float:
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[schedule]
