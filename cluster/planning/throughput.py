"""Which role limits a campaign, what another actor of it would give, and how many of each to start. Pure.

A campaign is a pipeline of stages. One update asks of stage s a work of W_s actor-seconds, which its n_s actors share.
Overlapped (pipeline.max_staleness >= 1) an update takes as long as the slowest stage, max_s W_s / n_s; strictly
on-policy the stages wait for one another, and it takes their sum. What scheduling, waiting and transport add is one
factor, `overhead`, measured where there was a run to measure. This is the bottleneck law of a closed queueing network
(Denning and Buzen, 1978, "The operational analysis of queueing network models").
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

ORDINALS = ("", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")


@dataclass(frozen=True)
class Stage:
    """What one role has to do for one update."""

    role: str
    """`rollout`, `teacher` or `learner`."""
    work_seconds: float
    """Seconds that one actor alone would need for one update."""
    replicas: float = 1
    """A mean, where it has changed."""
    gpus_per_replica: float = 1.0

    @property
    def scalable(self) -> bool:
        """Whether another actor would share the work: a learner's ranks are decided by its size."""
        return self.role != "learner"

    @property
    def seconds(self) -> float:
        """Of one update, shared by the actors that there are."""
        return self.work_seconds / self.replicas


@dataclass(frozen=True)
class Plan:
    """A number of actors for each role, and what is to be expected of it."""

    stages: tuple[Stage, ...]
    overlapped: bool
    overhead: float = 1.0
    """Measured seconds of an update over those of this model."""

    @property
    def update_seconds(self) -> float:
        """Predicted wall-clock seconds of one update."""
        seconds = [stage.seconds for stage in self.stages]
        return self.overhead * (max(seconds) if self.overlapped else sum(seconds))

    @property
    def gpus(self) -> float:
        """GPUs that all actors take together."""
        return sum(stage.replicas * stage.gpus_per_replica for stage in self.stages)

    def utilisation(self) -> dict[str, float]:
        """Role -> share of the time that its actors work."""
        return {stage.role: stage.seconds / self.update_seconds for stage in self.stages}

    @property
    def bottleneck(self) -> Stage:
        """The stage that takes longest."""
        return max(self.stages, key=lambda stage: stage.seconds)

    def scaled(self, role: str, replicas: float) -> "Plan":
        """The same with another number of actors of one role."""
        stages = tuple(replace(s, replicas=replicas) if s.role == role else s for s in self.stages)
        return replace(self, stages=stages)

    def gain(self, role: str) -> float:
        """What one more actor of the role would add to the throughput: 0.38 is +38%. 0 where the role does not scale."""
        stage = next(stage for stage in self.stages if stage.role == role)
        if not stage.scalable:
            return 0.0
        return self.update_seconds / self.scaled(role, stage.replicas + 1).update_seconds - 1

    def sentence(self) -> str:
        """The bottleneck in words: `teacher-bound: a second teacher actor would give +38%`."""
        stage = self.bottleneck
        best = max((s for s in self.stages if s.scalable), key=lambda s: self.gain(s.role), default=stage)
        if self.gain(best.role) < 0.005:
            role = f"{stage.role}-bound"
            return f"{role}: more actors of one role alone would not make it faster"
        number = round(best.replicas) + 1
        ordinal = ORDINALS[number] if number < len(ORDINALS) else f"{number}th"
        article = "an" if ordinal.startswith(("e", "8", "11th", "18th")) else "a"
        return f"{stage.role}-bound: {article} {ordinal} {best.role} actor would give +{self.gain(best.role):.0%}"


def measured(
    summary: Mapping[str, Any],
    replicas: Mapping[str, float],
    gpus: Mapping[str, float],
    *,
    overlapped: bool,
    publish_seconds: float = 0.0,
) -> Plan:
    """The plan that a run has followed, from its summary.json: `busy`, `updates`, `loop_seconds`.

    replicas, gpus: by role, of that run. publish_seconds: mean of an update, which the learner spends on it besides.
    ValueError: the run took no update, or a role did nothing.
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
    ideal = Plan(stages, overlapped)
    return replace(ideal, overhead=max(1.0, summary["loop_seconds"] / updates / ideal.update_seconds))


def for_gpus(plan: Plan, gpus: float) -> Plan:
    """The numbers of actors that make the most of so many GPUs: one of each role, then the next where it gives most.

    For overlapped stages, raising the slowest until the GPUs are spent minimises the maximum; for stages in sequence
    the gains diminish, and the largest for each GPU is the best (both are exact where actors take the same number of
    GPUs). ValueError: the GPUs do not suffice for one actor of each role.
    """
    best = replace(plan, stages=tuple(replace(s, replicas=1) if s.scalable else s for s in plan.stages))
    if best.gpus > gpus + 1e-9:
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
    """Whether two scalable stages are the slowest together: one more of either gives nothing, one of each does."""
    slowest = [s for s in plan.stages if s.seconds > plan.bottleneck.seconds * (1 - 1e-9)]
    return plan.overlapped and len(slowest) > 1 and all(stage.scalable for stage in slowest)


def table(plans: Sequence[tuple[str, Plan]]) -> list[list[str]]:
    """Rows for the terminal, a heading first: of each plan its roles, then all of it; [rows][columns] of text."""
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
    """Mean of a metric over the lines that have it; 0 where none has."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else 0.0
