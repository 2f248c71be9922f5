"""What a campaign has led to, as the terminal and the report show it: the student before and after, and its teacher, of
`evaluation.prompts`. Standard library only.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from cluster.records.metric_table import METRICS, with_interval
from cluster.records.rewards import told_as

WHO = {"start": ("student, before", "before"), "end": ("student, after", "after"), "teacher": ("teacher", "teacher")}
"""How the keys of summary.json end -> the name of the row, and its look."""


class OutcomeRow(NamedTuple):
    """A student or the teacher."""

    name: str
    look: str
    """`before`, `after` or `teacher`."""
    right: float | None
    """The share of right answers; None: not measured."""
    cells: list[str]
    """A text for each column; "-" where nothing was measured."""


class Outcome(NamedTuple):
    """A table."""

    columns: list[str]
    rows: list[OutcomeRow]
    """Empty where only sets, or nothing, were evaluated."""


def outcome(summary: Mapping[str, Any]) -> Outcome:
    """The table. summary: summary.json, or what there is of it."""
    graded = bool(summary.get("graded"))
    told, kl = told_as(graded), METRICS["eval/reverse_kl"].digits
    columns = {"accuracy": (told.name, told.form), "accuracy_sampled": ("sampled", told.form)}
    columns |= {"right": ("right", METRICS["eval/right"].digits)} if graded else {}
    columns |= {"reverse_kl": ("reverse KL", kl)}
    values = {when: [summary.get(f"{key}_{when}") for key in columns] for when in WHO}
    rows = []
    for when, (name, look) in WHO.items() if any(one is not None for of in values.values() for one in of) else ():
        if when == "end" and all(one is None for one in values[when]):
            continue  # it ended before an evaluation
        cells = [_told(summary, f"{key}_{when}", form) for key, (_, form) in columns.items()]
        if when == "teacher" and any(values[other][-1] is not None for other in WHO):
            cells[-1] = "0"  # its distance to itself
        rows.append(OutcomeRow(name, look, summary.get(f"{'right' if graded else 'accuracy'}_{when}"), cells))
    return Outcome([name for name, _ in columns.values()], rows)


def losses(actors: int, because: Mapping[str, int], dropped: int) -> str:
    """What was lost, in one line: `0 actors lost; 3 trajectories dropped (environment 2, stale 1)`.

    actors: faults. because: reason -> trajectories that were dropped for it; empty where an earlier release wrote the run.
    """
    reasons = ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in because.items() if count)
    told = f"{actors:,} actor{'s' * (actors != 1)} lost; {dropped:,} {'trajectory' if dropped == 1 else 'trajectories'} dropped"
    return told + (f" ({reasons})" if reasons else "")


def _told(summary: Mapping[str, Any], key: str, form: str) -> str:
    low, high = (summary.get("intervals") or {}).get(key) or (None, None)
    return with_interval({key: summary.get(key), f"{key}:low": low, f"{key}:high": high}, key, form)
