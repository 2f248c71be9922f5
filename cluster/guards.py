"""Guards: what is watched in the metrics of every update, and what is to be done when one of them goes wrong. Pure.

A guard compares one metric with a bound, which is a number or a multiple of the metric's own running mean. When the
metric has been out of bounds for so many updates in a row, the guard acts. Everything that it remembers is in
`GuardState`, which travels in the checkpoints: a campaign that goes on judges as one that was never interrupted.
Standard library only.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from actors.config import number
from actors.errors import UserError


@dataclass
class GuardConfig:
    """Watches one metric of every update (docs/metrics.md), and acts when it is out of bounds for some updates in a row."""

    metric: str = "???"
    """A key of metrics.jsonl, such as `reverse_kl`; not an evaluation's, a total, or a time."""
    above: float | None = None
    """Out of bounds above this."""
    below: float | None = None
    """Out of bounds below this."""
    relative_to_updates: int | None = number(None, minimum=2)
    """The bounds are multiples of the metric's running mean over about so many updates within bounds; until so many have
    been seen, and where the mean is not positive, the guard is silent. Null: the bounds are in the metric's own unit."""
    updates: int = number(1, minimum=1)
    """It acts when the metric is out of bounds in so many updates in a row."""
    action: Literal["none", "warn", "lower_rate", "roll_back", "stop"] = "warn"
    """`warn` writes it down. `lower_rate` multiplies the learning rate by `rate_factor`. `roll_back` goes back to the last
    checkpoint from before the metric went out of bounds, lowers the rate too, and goes on with other prompts. `stop` ends
    the campaign with an error. `none` turns the guard off."""
    rate_factor: float = number(0.5, above=0, maximum=1)
    """For `lower_rate` and `roll_back`: what the learning rate is multiplied by from then on."""
    at_most: int = number(3, minimum=1)
    """For `lower_rate` and `roll_back`: how often. The campaign is stopped where it would have to be done once more."""


def default_guards() -> dict[str, GuardConfig]:
    """What every campaign is told about, unless it turns them off."""
    return {
        "kl_rises": GuardConfig("reverse_kl", above=3.0, relative_to_updates=20, updates=3),
        "length_rises": GuardConfig("response_length_mean", above=3.0, relative_to_updates=20, updates=3),
        "truncation": GuardConfig("truncated_fraction", above=0.5, updates=3),
        "repetition": GuardConfig("repetition", above=0.5, updates=3),
    }


@dataclass(frozen=True)
class Watch:
    """What one guard remembers."""

    mean: float = 0.0
    """Running mean of the values within bounds."""
    seen: int = 0
    """Of how many values."""
    streak: int = 0
    """Updates in a row that were out of bounds."""
    since: int = 0
    """The first update of the streak."""
    acted: int = 0
    """How often the guard has lowered the rate or rolled back."""


@dataclass(frozen=True)
class GuardState:
    """What all guards remember, and what they have changed."""

    watches: dict[str, Watch] = field(default_factory=dict)
    rate_scale: float = 1.0
    """What the learning rate of the schedule is multiplied by."""

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint."""
        watches = {name: dict(vars(watch)) for name, watch in self.watches.items()}
        return {"watches": watches, "rate_scale": self.rate_scale}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "GuardState":
        """The inverse of `to_json`; {} for a checkpoint from before there were guards."""
        watches = {name: Watch(**watch) for name, watch in content.get("watches", {}).items()}
        return cls(watches, content.get("rate_scale", 1.0))

    def rolled_back(self, then: "GuardState") -> "GuardState":
        """As the guards were at an earlier update, but for what they have done since."""
        watches = {
            name: replace(then.watches.get(name, Watch()), acted=watch.acted) for name, watch in self.watches.items()
        }
        return GuardState(watches, self.rate_scale)


@dataclass(frozen=True)
class Finding:
    """One guard that acts, and why."""

    guard: str
    action: Literal["warn", "lower_rate", "roll_back", "stop"]
    metric: str
    value: float
    bound: float
    """What the value was compared with."""
    step: int
    """The update that was judged."""
    since: int
    """The first update of those in a row that were out of bounds."""
    reason: str
    """One line: metric, value, bound, for how long; and that it has acted too often, where that is why it stops."""


def judge(
    guards: Mapping[str, GuardConfig], state: GuardState, record: Mapping[str, Any]
) -> tuple[GuardState, list[Finding]]:
    """The state after an update with these metrics (a line of metrics.jsonl), and what is to be done about them.

    A metric that was not measured, or is no number, leaves its guards as they were.
    """
    watches, scale, findings = dict(state.watches), state.rate_scale, []
    for name, guard in guards.items():
        value = record.get(guard.metric)
        if guard.action == "none" or value is None or math.isnan(value):
            continue
        watch, side = _seen(guard, watches.get(name, Watch()), float(value), int(record["step"]))
        due = watch.streak == guard.updates if guard.action == "warn" else watch.streak >= guard.updates
        if side and due:
            finding = _finding(name, guard, watch, float(value), side, int(record["step"]))
            findings.append(finding)
            if finding.action in ("lower_rate", "roll_back"):
                watch, scale = replace(watch, streak=0, acted=watch.acted + 1), scale * guard.rate_factor
        watches[name] = watch
    return GuardState(watches, scale), findings


def _seen(guard: GuardConfig, watch: Watch, value: float, step: int) -> tuple[Watch, str]:
    """The guard's memory with one more value; `above` or `below` where it is out of bounds. What is out of bounds does
    not move the mean that it is compared with."""
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
    """What the bounds are multiples of; None while there is nothing to compare with."""
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
    """UserError for a guard that cannot work. `metrics` are those that the campaign's updates have; among the last
    `checkpointed_updates` updates there is always a checkpoint."""
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
