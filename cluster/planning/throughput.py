"""Predicts throughput: the role that limits a campaign, the gain of one more actor, the best numbers of actors. Pure.

A campaign is a pipeline of stages. For one update, stage s has W_s actor-seconds of work, shared by its n_s actors.
Environments are another kind of stage: they answer all episodes that are under way at a time, at most
(max_staleness + 1) updates' worth, whatever their number of actors. With pipeline.max_staleness >= 1 the stages overlap, and an update takes as long as the slowest: max_s W_s / n_s. With
0 they take turns, and an update takes the sum. Scheduling, waiting and transport add one factor, `overhead`, which is
measured where there is a run. This is the bottleneck law of a closed queueing network
(Denning and Buzen, 1978, "The operational analysis of queueing network models").

Where actors share hardware, that is a station of the network too: all work on it, divided by how much of it there is, bounds
an update from below. Roles that share one GPU, or one core, take turns whatever `max_staleness` is.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

ORDINALS = ("", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")


@dataclass(frozen=True)
class Stage:
    """The work of one role for one update."""

    role: str
    """`rollout`, `teacher`, `learner` or `environment`."""
    work_seconds: float
    """Seconds that one actor alone would need for one update."""
    replicas: float = 1
    """Number of actors; the mean, if it changed."""
    gpus_per_replica: float = 1.0
    at_once: float = 0.0
    """Pieces of work that all actors together do at a time, whatever their number; 0: each actor does one."""

    @property
    def scalable(self) -> bool:
        """Whether another actor would share the work. The learner's ranks depend on the model's size instead."""
        return self.role != "learner" and not self.at_once

    @property
    def seconds(self) -> float:
        """Seconds for one update, with all its actors."""
        return self.work_seconds / (self.at_once or self.replicas) if self.work_seconds else 0.0


@dataclass(frozen=True)
class Plan:
    """A number of actors for each role, and the throughput that it gives."""

    stages: tuple[Stage, ...]
    overlapped: bool
    overhead: float = 1.0
    """Measured seconds of an update divided by the predicted ones."""
    cores: int | None = None
    """Processor cores that all actors share, where they compute without a GPU on one machine; None: each has its own."""

    @property
    def update_seconds(self) -> float:
        """Predicted wall-clock seconds of one update."""
        return self.overhead * (max(self._stations) if self.overlapped else self._in_turns)

    @property
    def _in_turns(self) -> float:
        """Seconds of one update whose stages do not overlap, without overhead."""
        cores = self.cores or math.inf
        return sum(max(one.seconds, 0.0 if one.at_once else one.work_seconds / cores) for one in self.stages)

    @property
    def _stations(self) -> list[float]:
        """Seconds of one update at each stage, and at what several of them share."""
        seconds = [stage.seconds for stage in self.stages]
        for stages, count in self._shared:
            seconds.append(sum(stage.work_seconds for stage in stages) / count)
        return seconds

    @property
    def _shared(self) -> list[tuple[list[Stage], int]]:
        """(stages, how many GPUs or cores) for what several stages share."""
        if self.cores is not None:
            return [([stage for stage in self.stages if not stage.at_once], self.cores)]  # those do not compute
        sharing = [stage for stage in self.stages if 0 < stage.gpus_per_replica < 1]
        # Rounded, since sums of fractions have rounding errors.
        cards = math.ceil(round(sum(stage.replicas * stage.gpus_per_replica for stage in sharing), 6))
        return [(sharing, cards)] if len(sharing) > 1 else []

    def sharing(self) -> str:
        """What overlapping gains where roles share hardware, in words; "" where each has its own."""
        if not self._shared:
            return ""
        [(stages, count)] = self._shared
        *first, last = (stage.role for stage in stages)
        unit = "GPU" if self.cores is None else "core"
        whose = f"one {unit}" if count == 1 else f"{count} {unit}s"
        beside = "" if self.cores is None else ", besides one for the campaign process and Ray"
        gain = self._in_turns / max(self._stations) - 1
        told = f"at most {gain:.0%}" if gain >= 0.005 else "nothing"
        return f"{', '.join(first)} and {last} share {whose}{beside}: pipeline.max_staleness above 0 gains {told} there"

    @property
    def gpus(self) -> float:
        """GPUs of all actors together."""
        return sum(stage.replicas * stage.gpus_per_replica for stage in self.stages)

    def utilisation(self) -> dict[str, float]:
        """Role -> share of the time in which its actors work."""
        return {stage.role: stage.seconds / self.update_seconds for stage in self.stages}

    @property
    def bottleneck(self) -> Stage:
        """The slowest stage."""
        return max(self.stages, key=lambda stage: stage.seconds)

    def scaled(self, role: str, replicas: float) -> "Plan":
        """The same plan with another number of actors of one role."""
        stages = tuple(replace(s, replicas=replicas) if s.role == role else s for s in self.stages)
        return replace(self, stages=stages)

    def gain(self, role: str) -> float:
        """Gain in throughput from one more actor of the role: 0.38 is +38%. 0 for a role that cannot be scaled."""
        stage = next(stage for stage in self.stages if stage.role == role)
        if not stage.scalable:
            return 0.0
        return self.update_seconds / self.scaled(role, stage.replicas + 1).update_seconds - 1

    def sentence(self) -> str:
        """The bottleneck in words: `teacher-bound: a second teacher actor would give +38%`."""
        stage = self.bottleneck
        if stage.at_once:
            more = "more episodes under way (pipeline.max_staleness), or more actors where these have no processor time left"
            return f"{stage.role}-bound: quicker answers, {more}"
        best = max((s for s in self.stages if s.scalable), key=lambda s: self.gain(s.role), default=stage)
        if self.gain(best.role) < 0.005:
            role = f"{stage.role}-bound"
            return f"{role}: more actors of one role alone would not make it faster"
        number = round(best.replicas) + 1
        ordinal = ORDINALS[number] if number < len(ORDINALS) else f"{number}th"
        article = "an" if ordinal.startswith(("e", "8", "11th", "18th")) else "a"
        return f"{stage.role}-bound: {article} {ordinal} {best.role} actor would give +{self.gain(best.role):.0%}"


def environments(seconds_of_each: float, trajectories: int, max_staleness: int, replicas: float = 1) -> Stage:
    """The stage of environments that an episode waits for so long, in updates of so many trajectories."""
    at_once = (max_staleness + 1) * trajectories
    return Stage("environment", seconds_of_each * trajectories, replicas, gpus_per_replica=0.0, at_once=at_once)


def measured(
    summary: Mapping[str, Any],
    replicas: Mapping[str, float],
    gpus: Mapping[str, float],
    *,
    overlapped: bool,
    publish_seconds: float = 0.0,
    more: Sequence[Stage] = (),
    cores: int | None = None,
) -> Plan:
    """The plan of a finished run, from `busy`, `updates` and `loop_seconds` of its summary.json.

    replicas, gpus: role -> actors, and GPUs of one of them. publish_seconds: mean seconds for which the learner publishes
    weights after an update. more: stages that are measured otherwise. cores: see Plan. ValueError: the run took no update, or a
    role did nothing.
    """
    updates = summary["updates"]
    if not updates or any(summary["busy"][role] <= 0 for role in replicas):
        raise ValueError("no update to measure")
    stages = tuple(
        Stage(
            role,
            summary["busy"][role] / updates + (publish_seconds if role == "learner" else 0.0),
            replicas=count,
            gpus_per_replica=gpus[role],
        )
        for role, count in replicas.items()
    )
    ideal = Plan((*stages, *more), overlapped, cores=cores)
    return replace(ideal, overhead=max(1.0, summary["loop_seconds"] / updates / ideal.update_seconds))


def for_gpus(plan: Plan, gpus: float) -> Plan:
    """The best numbers of actors for `gpus` GPUs: start with one of each role, then add where it gains most.

    For overlapped stages, adding to the slowest until no GPU is left minimises the maximum. For stages that take turns,
    gains diminish, so the largest gain for each GPU is the best choice. Both are exact if all actors take the same
    number of GPUs. ValueError: `gpus` is not enough for one actor of each role.
    """
    best = replace(plan, stages=tuple(replace(s, replicas=1) if s.scalable else s for s in plan.stages))
    if best.gpus > gpus + 1e-9:  # sums of fractions of a GPU have rounding errors
        raise ValueError(f"one actor of each role takes {best.gpus:g} GPUs")
    while True:
        affordable = [s for s in best.stages if s.scalable and 0 < s.gpus_per_replica <= gpus - best.gpus + 1e-9]
        if plan.overlapped:
            affordable = [s for s in affordable if s.role == best.bottleneck.role]
        gains = {s.role: best.gain(s.role) / s.gpus_per_replica for s in affordable}
        role = max(gains, key=lambda name: gains[name], default=None)
        if role is None or (gains[role] <= 0 and not _tied(best)):
            return best
        best = best.scaled(role, next(s.replicas for s in best.stages if s.role == role) + 1)


def _tied(plan: Plan) -> bool:
    """Whether several scalable stages are equally slow. One more actor of one gains nothing; one of each does."""
    slowest = [s for s in plan.stages if s.seconds > plan.bottleneck.seconds * (1 - 1e-9)]
    return plan.overlapped and len(slowest) > 1 and all(stage.scalable for stage in slowest)


def table(plans: Sequence[tuple[str, Plan]]) -> list[list[str]]:
    """Rows of text for the terminal, [rows][columns]: a heading, then for each plan its roles and a total."""
    rows = [["", "role", "actors", "GPUs", "s/update", "busy", "one more"]]
    for name, plan in plans:
        use = plan.utilisation()
        for stage in plan.stages:
            gain = f"+{plan.gain(stage.role):.0%}" if stage.scalable else "-"
            taken = f"{stage.replicas * stage.gpus_per_replica:g}"
            rows.append(
                [name, stage.role, f"{stage.replicas:g}", taken, f"{stage.seconds:.3g}", f"{use[stage.role]:.0%}", gain]
            )
            name = ""
        actors = f"{sum(stage.replicas for stage in plan.stages):g}"
        rows.append(["", "together", actors, f"{plan.gpus:g}", f"{plan.update_seconds:.3g}", "", ""])
    return rows


def mean_of(rows: Iterable[Mapping[str, Any]], key: str) -> float:
    """Mean of a metric over the lines that have it; 0 without any."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else 0.0
