"""Guards watch one metric of every update and act when it is out of bounds. Pure, standard library only.

The bound is a number, or a multiple of the metric's own running mean. A guard acts after `updates` updates in a row
out of bounds. Its memory, `GuardState`, is saved in the checkpoints, so a resumed campaign decides as one that was
never interrupted.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from actors.config import changing, number
from actors.errors import UserError


@changing("on request")
@dataclass
class GuardConfig:
    """Watches one metric of every update (docs/metrics.md) and acts when it is out of bounds for several updates in a row."""

    metric: str = "???"
    """A metric that docs/metrics.md marks with G, such as `reverse_kl`; not an evaluation's, a total, or a time."""
    above: float | None = None
    """Out of bounds above this."""
    below: float | None = None
    """Out of bounds below this."""
    relative_to_updates: int | None = number(None, minimum=2)
    """The bounds are multiples of the metric's running mean over about this many updates within bounds. The guard does not
    act before it has seen this many, nor while the mean is not positive. Null: the bounds are in the metric's own unit."""
    updates: int = number(1, minimum=1)
    """The guard acts after this many updates in a row out of bounds."""
    action: Literal["none", "warn", "lower_rate", "roll_back", "stop"] = "warn"
    """`warn` records an event. `lower_rate` multiplies the learning rate by `rate_factor`. `roll_back` continues from the
    last checkpoint from before the metric went out of bounds, with a lower rate and other prompts. `stop` ends the
    campaign with an error. `none` turns the guard off."""
    rate_factor: float = number(0.5, above=0, maximum=1)
    """For `lower_rate` and `roll_back`: factor on the learning rate from then on."""
    at_most: int = number(3, minimum=1)
    """For `lower_rate` and `roll_back`: how often the guard may do it. After that it stops the campaign instead."""


def default_guards() -> dict[str, GuardConfig]:
    """The guards of every campaign; the configuration can change them or turn them off.

    They warn, but for weights that stand still: after ten updates that cost and changed nothing, the campaign ends.
    """
    return {
        "kl_rises": GuardConfig("reverse_kl", above=3.0, relative_to_updates=20, updates=3),
        "length_rises": GuardConfig("response_length_mean", above=3.0, relative_to_updates=20, updates=3),
        "truncation": GuardConfig("truncated_fraction", above=0.5, updates=3),
        "repetition": GuardConfig("repetition", above=0.5, updates=3),
        "skipped_steps": GuardConfig("steps_skipped", above=0),
        "no_step": GuardConfig("steps_taken", below=1, updates=3),
        "no_step_for_long": GuardConfig("steps_taken", below=1, updates=10, action="stop"),
        # Last, since of two guards that stop the later one is told: this one knows more.
        "no_token_for_long": GuardConfig("tokens_trained", below=1, updates=10, action="stop"),
    }


@dataclass(frozen=True)
class Watch:
    """The memory of one guard."""

    mean: float = 0.0
    """Running mean of the values within bounds."""
    seen: int = 0
    """Number of values in the mean."""
    streak: int = 0
    """Updates in a row out of bounds, up to now."""
    since: int = 0
    """The first update of the streak."""
    acted: int = 0
    """How often the guard has lowered the rate or rolled back."""


@dataclass(frozen=True)
class GuardState:
    """The memory of all guards, and their factor on the learning rate."""

    watches: dict[str, Watch] = field(default_factory=dict)
    rate_scale: float = 1.0
    """Factor on the learning rate of the schedule."""

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint."""
        watches = {name: dict(vars(watch)) for name, watch in self.watches.items()}
        return {"watches": watches, "rate_scale": self.rate_scale}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "GuardState":
        """The inverse of `to_json`. Checkpoints of releases without guards have {}."""
        watches = {name: Watch(**watch) for name, watch in content.get("watches", {}).items()}
        return cls(watches, content.get("rate_scale", 1.0))

    def rolled_back(self, then: "GuardState") -> "GuardState":
        """The state at an earlier update, but with the number of actions and the rate factor of now."""
        watches = {
            name: replace(then.watches.get(name, Watch()), acted=watch.acted) for name, watch in self.watches.items()
        }
        return GuardState(watches, self.rate_scale)


@dataclass(frozen=True)
class Finding:
    """An action of one guard, and its reason."""

    guard: str
    action: Literal["warn", "lower_rate", "roll_back", "stop"]
    metric: str
    value: float
    bound: float
    """The bound, in the metric's unit."""
    step: int
    """The update that was judged."""
    since: int
    """The first update of those in a row that were out of bounds."""
    reason: str
    """One line: metric, value, bound, for how long; and whether it stops because it has acted too often."""


def judge(
    guards: Mapping[str, GuardConfig], state: GuardState, record: Mapping[str, Any]
) -> tuple[GuardState, list[Finding]]:
    """The guards' state after an update, and the actions that are due. record: the update's line of metrics.jsonl.

    A metric that is absent or NaN leaves its guards unchanged.
    """
    watches, scale, findings = dict(state.watches), state.rate_scale, []
    for name, guard in guards.items():
        value = record.get(guard.metric)
        if guard.action == "none" or value is None or math.isnan(value):
            continue
        watch, side = _seen(guard, watches.get(name, Watch()), float(value), int(record["step"]))
        # A guard warns once for each streak. `>=` for the others: a resumed campaign may have a lower `updates`.
        due = watch.streak == guard.updates if guard.action == "warn" else watch.streak >= guard.updates
        if side and due:
            finding = _finding(name, guard, watch, float(value), side, int(record["step"]))
            findings.append(finding)
            if finding.action in ("lower_rate", "roll_back"):
                watch, scale = replace(watch, streak=0, acted=watch.acted + 1), scale * guard.rate_factor
        watches[name] = watch
    return GuardState(watches, scale), findings


def _seen(guard: GuardConfig, watch: Watch, value: float, step: int) -> tuple[Watch, str]:
    """(the guard's memory with one more value, `above` or `below` for a value out of bounds, else "").

    Values out of bounds are left out of the running mean: otherwise a slow rise would raise its own bound.
    mean_n = mean_(n-1) + (value - mean_(n-1)) / min(n, relative_to_updates).
    """
    side = ""
    if (unit := _unit(guard, watch)) is not None:
        if guard.above is not None and value > guard.above * unit:
            side = "above"
        elif guard.below is not None and value < guard.below * unit:
            side = "below"
    if side:
        since = watch.since if watch.streak else step
        return replace(watch, streak=watch.streak + 1, since=since), side
    if not math.isfinite(value):
        return replace(watch, streak=0), ""
    seen = watch.seen + 1
    mean = watch.mean + (value - watch.mean) / min(seen, guard.relative_to_updates or 1)
    return replace(watch, mean=mean, seen=seen, streak=0), ""


def _unit(guard: GuardConfig, watch: Watch) -> float | None:
    """What the bounds are multiples of; None while the guard has no mean to compare with."""
    if guard.relative_to_updates is None:
        return 1.0
    return watch.mean if watch.seen >= guard.relative_to_updates and watch.mean > 0 else None


def _finding(name: str, guard: GuardConfig, watch: Watch, value: float, side: str, step: int) -> Finding:
    factor = guard.above if side == "above" else guard.below
    unit = _unit(guard, watch)
    assert factor is not None and unit is not None and guard.action != "none"
    relative = f" ({factor:g} times its running mean)" if guard.relative_to_updates else ""
    long = f", the {_ordinal(watch.streak)} update in a row" if guard.updates > 1 else ""
    reason = f"{guard.metric} is {value:.4g}, {side} {factor * unit:.4g}{relative}{long}"
    action = guard.action
    if action in ("lower_rate", "roll_back") and watch.acted == guard.at_most:
        reason += f"; {action} was done {guard.at_most} times before (guards.{name}.at_most)"
        action = "stop"
    return Finding(name, action, guard.metric, value, factor * unit, step, watch.since, reason)


def _ordinal(count: int) -> str:
    ending = "th" if count % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(count % 10, "th")
    return f"{count}{ending}"


def check_guards(guards: Mapping[str, GuardConfig], metrics: Iterable[str], checkpointed_updates: int) -> None:
    """UserError for a guard that cannot work.

    metrics: those that guards may watch in this campaign. checkpointed_updates: a checkpoint from within this many of
    the last updates always exists.
    """
    for name, guard in guards.items():
        key, known = f"guards.{name}", sorted(metrics)
        if guard.action == "none":
            continue
        if guard.metric not in known:
            expected = "a metric that this campaign's updates have (docs/metrics.md)"
            raise UserError(f"{key}.metric", guard.metric, expected, known)
        if guard.above is None and guard.below is None:
            raise UserError(f"{key}.above", "null", f"a number, or one for {key}.below")
        for bound, value in (("above", guard.above), ("below", guard.below)):
            if value is not None and not math.isfinite(value):
                raise UserError(f"{key}.{bound}", value, "a finite number")
            if value is not None and guard.relative_to_updates and value <= 0:
                raise UserError(f"{key}.{bound}", value, "a number > 0: it is a multiple of the running mean")
        if guard.above is not None and guard.below is not None and guard.below >= guard.above:
            raise UserError(f"{key}.below", guard.below, f"less than above={guard.above:g}")
        if guard.action == "roll_back" and guard.updates > checkpointed_updates:
            expected = f"at most {checkpointed_updates} (checkpoint.every_updates x checkpoint.keep_last): older ones are removed"
            raise UserError(f"{key}.updates", guard.updates, expected)
