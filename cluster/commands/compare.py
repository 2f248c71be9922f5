"""`understudy compare`: runs one task under several methods and seeds, and writes one page about all runs.

Every run is an ordinary campaign: it has its own directory, resumes where it stopped, and is not repeated once finished.

    opd   on-policy distillation, as the configuration has it
    rl    the reward alone: policy gradient with the mean of the prompt's other samples as baseline (RLOO)
    sft   cross entropy on responses that the teacher samples, at the same temperature
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.records.metric_table import of_status
from cluster.records.reader import Run, load_run
from cluster.records.writer import METRICS_FILE, read_jsonl
from cluster.report.page import write_page

WITHOUT_TEACHERS_COST = {
    "learner.objective.reward_weight": 0.0,
    "learner.objective.baseline": "none",
    "learner.objective.divergence": "reverse_kl",
    "learner.objective.gamma": 1.0,
    "learner.objective.position_weight": 0.0,
    "learner.objective.through_log_ratio": "false",
    "learner.objective.log_ratio_clip": "null",
    "learner.objective.log_ratio_power": "null",
    "learner.objective.proximal_weight": 1.0,
}
METHODS: dict[str, dict[str, Any]] = {
    "opd": {},
    "rl": {"learner.objective.estimator": "reward", **WITHOUT_TEACHERS_COST},
    "sft": {"learner.objective.estimator": "sft", **WITHOUT_TEACHERS_COST},
}
"""Method -> the keys that it changes in the configuration."""

RL_SAMPLES = 8
"""Samples of a prompt for `rl` if the configuration has one: a reward is compared with those of other samples."""

CURVES = tuple(of_status("evaluation"))


class Trial(NamedTuple):
    """One campaign of a comparison."""

    method: str
    seed: int
    config: CampaignConfig


def trials(config_file: Path, overrides: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[Trial]:
    """All campaigns, seed by seed. An override `rl:key=value` applies to that method only. UserError: unknown methods,
    or campaigns that cannot be compared."""
    for method in methods:
        if method not in METHODS:
            raise UserError("--methods", method, f"some of {', '.join(METHODS)}", METHODS)
    for key, given in (("--methods", methods), ("--seeds", seeds)):
        if len(set(given)) < len(given):
            raise UserError(key, ",".join(map(str, given)), "each of them once")
    common = [override for override in overrides if override.partition("=")[0].partition(":")[0] not in METHODS]
    found = []
    for seed in seeds:
        for method in methods:
            own = [override.partition(":")[2] for override in overrides if override.startswith(f"{method}:")]
            changes = [f"{key}={value}" for key, value in METHODS[method].items()]
            base = load_config(config_file, common)
            # A reward is compared with those of the prompt's other samples; the number of trajectories stays the same.
            if method == "rl" and base.pipeline.samples_per_prompt == 1:
                prompts = max(base.trajectories_per_update // RL_SAMPLES, 1)
                changes += [f"pipeline.prompts_per_update={prompts}", f"pipeline.samples_per_prompt={RL_SAMPLES}"]
            named = [f"seed={seed}", f"name={base.name}-{method}-{seed}"]
            found.append(Trial(method, seed, load_config(config_file, [*common, *changes, *own, *named])))
    for trial in found:
        if trial.config.evaluation.prompts is None:
            raise UserError("evaluation.prompts", "null", "held-out prompts, on which methods are compared")
        if trial.config.evaluation.prompts.reference_field is None:
            raise UserError("evaluation.prompts.reference_field", "null", "the reference answers that accuracy needs")
        if not trial.config.evaluation.teacher:
            raise UserError("evaluation.teacher", "false", "true: the target is a share of the teacher's accuracy")
        budget, first = trial.config.trajectories_per_update, found[0].config.trajectories_per_update
        if budget != first:
            key = f"{trial.method}:pipeline.prompts_per_update"
            raise UserError(key, f"{budget} trajectories an update", f"{first}, like {found[0].method}")
    return found


def compare(
    found: Sequence[Trial],
    run: Callable[[CampaignConfig], tuple[dict[str, Any], bool]],
    say: Callable[[str], None] = print,
) -> dict[str, list[Path]] | None:
    """Runs the unfinished campaigns; returns method -> run directories, or None: interrupted before the last one."""
    for number, trial in enumerate(found, 1):
        say(f"{number} of {len(found)}: {trial.config.name}")
        _, complete = run(trial.config)
        if not complete:
            return None
    methods = dict.fromkeys(trial.method for trial in found)
    return {method: [t.config.run_dir for t in found if t.method == method] for method in methods}


def mean_run(method: str, run_dirs: Sequence[Path]) -> Run:
    """One method's curves: at each evaluation the mean over its seeds, the lowest (`<key>:low`) and the highest
    (`<key>:high`) value. Seconds count from the first evaluation, without start-up."""
    runs = [load_run(path) for path in run_dirs]
    rows = [{row["step"]: row for row in run.metrics if "eval/accuracy" in row} for run in runs]
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


def reached(run_dir: Path, accuracy: float) -> Reached | None:
    """The first evaluation with at least this accuracy; None: there is none."""
    rows = [row for row in read_jsonl(run_dir / METRICS_FILE, checked=True) if "eval/accuracy" in row]
    for row in rows:
        if row["eval/accuracy"] >= accuracy:
            return Reached(row["step"], row.get("tokens_generated", 0), row["wall_seconds"] - rows[0]["wall_seconds"])
    return None


def table(results: Mapping[str, Sequence[Path]], share: float) -> str:
    """A Markdown table with one row for each method. share: the target, as a share of the teacher's accuracy."""
    head = f"| method | seeds | accuracy before | after | sampled after | reverse KL after | updates to {share:.0%} of the teacher | student tokens | seconds |"
    lines = [head, "|---" * 9 + "|"]
    for method, run_dirs in results.items():
        runs = [load_run(path).result for path in run_dirs]
        hits = [reached(path, share * run["accuracy_teacher"]) for path, run in zip(run_dirs, runs, strict=True)]
        cells = [
            method,
            str(len(runs)),
            _spread([run["accuracy_start"] for run in runs], "{:.1%}"),
            _spread([run["accuracy_end"] for run in runs], "{:.1%}"),
            _spread([run["accuracy_sampled_end"] for run in runs], "{:.1%}"),
            _spread([run["reverse_kl_end"] for run in runs], "{:.3f}"),
            *(
                _of_hits([hit and hit[i] for hit in hits], form)
                for i, form in enumerate(("{:.0f}", "{:,.0f}", "{:.0f}"))
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_comparison(results: Mapping[str, Sequence[Path]], output: Path) -> Path:
    """One page with a line and a band for each method."""
    return write_page([mean_run(method, run_dirs) for method, run_dirs in results.items()], output)


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
