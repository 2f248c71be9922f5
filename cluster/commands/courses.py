"""What a comparison says of its runs: curves over seeds, and results at equal cost with paired intervals.

A *course* is what one method did with one seed, as one Run: of one campaign, or of two of which the second begins with the
student that the first has made.
"""

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from cluster.loop.evaluation_statistics import quantile
from cluster.records.metric_table import of_status
from cluster.records.reader import Run, load_run
from cluster.records.rewards import is_graded, told_as
from cluster.records.writer import write_atomically
from cluster.report.page import write_page

CURVES = tuple(of_status("evaluation"))
COSTS = {"tokens_trained_before": "trained tokens", "processor_seconds": "processor seconds"}
"""Key of a course's rows -> what it counts. Methods are compared at equal amounts of each."""
RESULTS = ("eval/accuracy", "eval/accuracy_sampled", "eval/reverse_kl")
"""What methods are compared by."""
ADDED_UP = ("step", "tokens_generated", "processor_seconds", "tokens_trained_before")
"""Counters that go on from where the campaign before has ended."""


def course(run_dirs: Sequence[Path]) -> Run:
    """One campaign, or several of which each begins with the student that the one before has made, as one run.

    Rows get `tokens_trained_before`: trained tokens so far. Start-ups, and the time between campaigns, are left out of
    `wall_seconds`.
    """
    runs = [load_run(path) for path in run_dirs]
    rows: list[dict[str, Any]] = []
    for run in runs:
        last, trained = rows[-1] if rows else {}, 0
        for row in run.metrics:
            trained += row.get("tokens_trained") or 0
            shifted = {"tokens_generated": 0, "processor_seconds": 0.0, **row, "tokens_trained_before": trained}
            if "processor_seconds" not in row and row["step"]:
                del shifted["processor_seconds"]  # of a release that did not measure it
            for key in ADDED_UP:
                if key in shifted:
                    shifted[key] += last.get(key, 0)
            begun = run.metrics[0]["wall_seconds"] - last.get("wall_seconds", 0.0) if last else 0.0
            shifted["wall_seconds"] = row["wall_seconds"] - begun
            if row["step"] or not last:  # the untrained student of a later campaign is the last of the one before
                rows.append(shifted)
    first, end = runs[0].result, runs[-1].summary
    sums = {key: sum(run.result[key] or 0 for run in runs) for key in ("updates", "tokens_generated", "wall_seconds")}
    starts = {key: first[key] for key in ("accuracy_start", "accuracy_sampled_start", "reverse_kl_start")}
    if len(runs) == 1:
        return replace(runs[-1], metrics=rows)
    planned = {**runs[-1].setting("pipeline", {}), "updates": sum(run.setting("pipeline.updates", 0) for run in runs)}
    config = {**runs[-1].config, "pipeline": planned}
    return replace(runs[-1], metrics=rows, summary={**end, **sums, **starts}, config=config)


def evaluated(run: Run) -> list[dict[str, Any]]:
    """The rows of a course that have an evaluation."""
    return [row for row in run.metrics if "eval/accuracy" in row]


def mean_run(method: str, runs: Sequence[Run]) -> Run:
    """One method's curves: at each evaluation the mean over its seeds, the lowest (`<key>:low`) and the highest
    (`<key>:high`) value. Seconds count from the first evaluation, without start-up."""
    rows = [{row["step"]: row for row in evaluated(run)} for run in runs]
    metrics = []
    for step in sorted(set.intersection(*map(set, rows))):  # evaluations that all seeds have
        here = [own[step] for own in rows]
        row: dict[str, Any] = {
            "step": step,
            "tokens_generated": statistics.fmean(r.get("tokens_generated", 0) for r in here),
        }
        started = [own[min(own)]["wall_seconds"] for own in rows]
        row["wall_seconds"] = statistics.fmean(r["wall_seconds"] - s for r, s in zip(here, started, strict=True))
        for key in CURVES:
            values = [r[key] for r in here if key in r]
            if values:
                row |= {key: statistics.fmean(values), f"{key}:low": min(values), f"{key}:high": max(values)}
        metrics.append(row)
    results = [run.result for run in runs]
    numbers = [key for key, value in results[0].items() if isinstance(value, int | float)]
    summary = {key: statistics.fmean(r[key] for r in results if r.get(key) is not None) for key in numbers}
    summary |= {"updates": round(summary["updates"]), "tokens_generated": round(summary["tokens_generated"])}
    return Run(
        runs[0].path, method, metrics, [], [], summary, runs[0].config_text, runs[0].config, runs[0].trajectories
    )


class Reached(NamedTuple):
    """When a run's greedy accuracy first reached the target."""

    updates: int
    tokens: int
    seconds: float
    """From the first evaluation."""


def reached(run: Run, accuracy: float) -> Reached | None:
    """The first evaluation with at least this accuracy; None: there is none."""
    rows = evaluated(run)
    for row in rows:
        if row["eval/accuracy"] >= accuracy:
            return Reached(row["step"], row.get("tokens_generated", 0), row["wall_seconds"] - rows[0]["wall_seconds"])
    return None


def table(results: Mapping[str, Sequence[Run]], share: float) -> str:
    """A Markdown table with one row for each method. share: the target, as a share of the teacher's accuracy."""
    told = told_as(_graded(results))
    form = f"{{:{told.form}}}"
    head = f"| method | seeds | {told.name} before | after | sampled after | reverse KL after | updates to {share:.0%} of the teacher | student tokens | seconds |"
    lines = [head, "|---" * 9 + "|"]
    for method, courses in results.items():
        runs = [run.result for run in courses]
        hits = [reached(one, share * run["accuracy_teacher"]) for one, run in zip(courses, runs, strict=True)]
        cells = [
            method,
            str(len(runs)),
            *(_spread([run[f"accuracy_{when}"] for run in runs], form) for when in ("start", "end", "sampled_end")),
            _spread([run["reverse_kl_end"] for run in runs], "{:.3f}"),
            *(
                _of_hits([hit and hit[i] for hit in hits], count)
                for i, count in enumerate(("{:.0f}", "{:,.0f}", "{:.0f}"))
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def at_cost(run: Run, cost: str, key: str, budget: float) -> float | None:
    """A result when this much was spent, on the straight line between the evaluations before and after; None where the
    course has not measured it. ValueError: the course has spent less."""
    points = [(row[cost], row[key]) for row in evaluated(run) if cost in row and key in row]
    if len(points) < 2:
        return None
    for (before, low), (after, high) in itertools.pairwise(points):
        if before <= budget <= after:
            return low + (high - low) * ((budget - before) / (after - before) if after > before else 1.0)
    raise ValueError(f"{run.name} has spent {points[-1][0]:g}, not {budget:g}")


def common_budget(results: Mapping[str, Sequence[Run]], cost: str) -> float | None:
    """What every course has spent: the most that they can be compared at. None: one has not measured it."""
    spent = [[row[cost] for row in evaluated(run) if cost in row] for runs in results.values() for run in runs]
    return min(map(max, spent)) if all(len(of_run) > 1 for of_run in spent) else None


class Interval(NamedTuple):
    """A mean over seeds, and half the width of its 95% interval by Student's t; None with one seed."""

    mean: float
    half: float | None


def interval(values: Sequence[float]) -> Interval:
    """Of independent values, such as paired differences of seeds."""
    if len(values) < 2:
        return Interval(values[0], None)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(statistics.fmean(values), quantile(len(values) - 1) * error)


def _graded(results: Mapping[str, Sequence[Run]]) -> bool:
    return any(is_graded(row) for runs in results.values() for run in runs for row in run.metrics)


def _figures(graded: bool) -> dict[str, tuple[str, str]]:
    """Each of RESULTS -> its name in the table of equal cost, and its form."""
    told = told_as(graded)
    of_rewards = f"{{:{told.form}}}"
    names = ((told.name, of_rewards), ("sampled", of_rewards), ("reverse KL", "{:.3f}"))
    return dict(zip(RESULTS, names, strict=True))


def equal_cost_table(results: Mapping[str, Sequence[Run]], cost: str) -> str | None:
    """A Markdown table of all methods at the same cost, with the differences from the first method, seed by seed.

    cost: a key of COSTS. None: a course has not measured it.
    """
    budget = common_budget(results, cost)
    if budget is None:
        return None
    first, lines, figures = next(iter(results)), [], _figures(_graded(results))
    head = f"at {budget:,.0f} {COSTS[cost]}"
    lines.append(f"| {head} | " + " | ".join(f"{name} | against {first}" for name, _ in figures.values()) + " |")
    lines.append("|---" * (1 + 2 * len(figures)) + "|")
    for method, runs in results.items():
        cells = [method]
        for key, (_, form) in figures.items():
            pairs = [(at_cost(run, cost, key, budget), at_cost(base, cost, key, budget))
                     for run, base in zip(runs, results[first], strict=True)]  # fmt: skip
            there = [(ours, base) for ours, base in pairs if ours is not None and base is not None]
            if not there:
                cells += ["", ""]
                continue
            cells.append(_with_interval(interval([ours for ours, _ in there]), form))
            apart = interval([ours - base for ours, base in there])
            cells.append("" if method == first else _with_interval(apart, form.replace("{:", "{:+")))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_comparison(results: Mapping[str, Sequence[Run]], output: Path) -> Path:
    """One page with a line and a band for each method, and beside it the evaluations of every course as JSON."""
    keys = ("step", "tokens_generated", "wall_seconds", *COSTS, *CURVES)
    rows = {
        method: [[{key: row[key] for key in keys if key in row} for row in evaluated(run)] for run in runs]
        for method, runs in results.items()
    }
    page = write_page([mean_run(method, runs) for method, runs in results.items()], output)
    write_atomically(page.with_suffix(".json"), json.dumps(rows) + "\n")
    return page


def _with_interval(value: Interval, form: str) -> str:
    """97.7% ± 0.9%, or the value alone."""
    half = "" if value.half is None else f" ± {form.replace('+', '').format(value.half)}"
    return form.format(value.mean) + half


def _spread(values: Sequence[float], form: str) -> str:
    """The mean, and the range if there are several values."""
    mean = form.format(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def _of_hits(values: Sequence[float | None], form: str) -> str:
    """The median of the runs that reached the target, and the number of those that did not."""
    there = [value for value in values if value is not None]
    if not there:
        return "never"
    missing = len(values) - len(there)
    return form.format(statistics.median(there)) + (f" ({missing} of {len(values)} never)" if missing else "")
