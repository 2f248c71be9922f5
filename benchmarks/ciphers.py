"""Where on-policy distillation wins: the ciphers (examples/ciphers), measured for docs/compare.md and docs/objective.md.

Each method's learning rate, five methods with five seeds, then every estimator and every trust region, all in one process (benchmarks/methods.py). A
campaign that is finished is not repeated.

    python -m benchmarks.ciphers [rates methods estimators trust_regions] [--seeds 0,1,2,3,4] [--output docs/ciphers.json]

`python -m benchmarks.ciphers_page` then writes the figures and the tables.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods import ENGINE, in_one_process
from cluster.commands.compare import METHODS, Trial, trials
from cluster.commands.courses import COSTS, RESULTS, course, evaluated
from cluster.records.writer import write_atomically
from cluster.run import run_campaign
from examples.ciphers.coverage import coverage
from learner.student.checkpoint import step_directory

CONFIG = Path("examples/ciphers/distill.yaml")
OUTPUT = Path("docs/ciphers.json")
RATES, RATES_SEED = ("5e-3", "1e-2", "2e-2"), 100
"""Each method gets the best of these learning rates, on a seed that is not measured."""
RATE = "learner.optimizer.learning_rate"
OBJECTIVE = "learner.objective"
ESTIMATORS = {
    "trajectory": [f"{OBJECTIVE}.estimator=trajectory"],
    "to_go": [f"{OBJECTIVE}.estimator=to_go"],
    "to_go_expected": [],
    "to_go_expected, no baseline": [f"{OBJECTIVE}.baseline=none"],
    "to_go_expected, exact_kl": [f"{OBJECTIVE}.baseline=exact_kl"],
    "discounted, 0.5": [f"{OBJECTIVE}.estimator=discounted", f"{OBJECTIVE}.gamma=0.5"],
    "immediate": [f"{OBJECTIVE}.estimator=immediate"],
    "full": [f"{OBJECTIVE}.estimator=full", f"{OBJECTIVE}.baseline=none"],
}
"""Curve -> what it changes. The baseline is `batch_mean` where nothing else is said."""
STEPS = ["learner.minibatches_per_update=4", "learner.epochs_per_update=2"]
"""Eight steps an update: a trust region acts from the second on."""
REGION = f"{OBJECTIVE}.trust_region"
TRUST_REGIONS = {
    "none": [f"{OBJECTIVE}.clip_low=null", f"{OBJECTIVE}.clip_high=null"],
    "clip": [],
    "k1": [f"{REGION}.estimator=k1", f"{REGION}.beta=1"],
    "k3": [f"{REGION}.estimator=k3", f"{REGION}.beta=1"],
    "exact": [f"{REGION}.estimator=exact", f"{REGION}.beta=1"],
    "target_kl, 0.01": [f"{REGION}.beta=1", f"{REGION}.target_kl=0.01"],
    "target_kl, 0.1": [f"{REGION}.beta=1", f"{REGION}.target_kl=0.1"],
    "max_kl": [f"{REGION}.max_kl=0.02"],
}
"""Curve -> what it changes. All but the first have the clip."""


def rows_of(trial: Trial) -> list[dict[str, Any]]:
    """The evaluations of one course, once its campaigns are run."""
    for config in trial.campaigns:
        _, complete = run_campaign(config)
        if not complete:
            raise SystemExit("interrupted: the same command goes on from here")
    keys = ("step", *COSTS, *RESULTS)
    rows = evaluated(course([config.run_dir for config in trial.campaigns]))
    return [{key: row[key] for key in keys if key in row} for row in rows]


def rates(common: Sequence[str]) -> dict[str, dict[str, float]]:
    """Method -> learning rate -> right answers, sampled, at the end."""
    found: dict[str, dict[str, float]] = {method: {} for method in METHODS}
    for rate in RATES:
        own = [f"name=ciphers-rate-{rate}", f"{RATE}={rate}"]
        for trial in trials(CONFIG, [*common, *own], tuple(METHODS), [RATES_SEED]):
            found[trial.method][rate] = rows_of(trial)[-1]["eval/accuracy_sampled"]
    return found


def methods(seeds: Sequence[int], common: Sequence[str], tried: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Method -> for each seed its evaluations, and what its last student covers. tried: see `rates`."""
    best = [f"{method}:{RATE}={max(own, key=lambda rate: own[rate])}" for method, own in tried.items()]
    found: dict[str, Any] = {}
    for trial in trials(CONFIG, [*common, *best], tuple(METHODS), seeds):
        rows = rows_of(trial)
        last = step_directory(trial.config.run_dir / "checkpoints", trial.config.pipeline.updates)
        covered = coverage(str(last))._asdict()
        found.setdefault(trial.method, []).append({"seed": trial.seed, "rows": rows, "coverage": covered})
    return found


def variants(kinds: Mapping[str, Sequence[str]], group: str, seeds: Sequence[int], common: Sequence[str]) -> Any:
    """Variant -> for each seed its evaluations."""
    found: dict[str, Any] = {}
    for name, changes in kinds.items():
        own = f"name=ciphers-{group}-{name.replace(', ', '-').replace(' ', '-')}"
        for trial in trials(CONFIG, [*common, *changes, own], ("opd",), seeds):
            found.setdefault(name, []).append({"seed": trial.seed, "rows": rows_of(trial)})
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what is asked for, and replaces these parts of the file. arguments: those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("rates", "methods", "estimators", "trust_regions")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)}; all without one")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="for all campaigns")
    options = parser.parse_args(arguments)
    in_one_process()
    common = [*options.set, *ENGINE]
    seeds = [int(seed) for seed in options.seeds.split(",")]
    found = json.loads(options.output.read_text("utf-8")) if options.output.is_file() else {}
    for part in options.parts or parts:
        if part == "rates":
            found["rates"] = rates(common)
        elif part == "methods":
            models = {name: coverage(f"examples/ciphers/{name}")._asdict() for name in ("teacher", "student")}
            found |= {"models": models, "methods": methods(seeds, common, found["rates"])}
        elif part == "estimators":
            found["estimators"] = variants(ESTIMATORS, part, seeds, common)
        else:
            found["trust_regions"] = variants(TRUST_REGIONS, part, seeds, common + STEPS)
        write_atomically(options.output, json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
