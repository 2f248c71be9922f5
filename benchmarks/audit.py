"""Runs rows of the audited table, and writes docs/results.json and, from it, docs/results.md.

    python -m benchmarks.audit [ROW …] [key=value …] [--seeds 0,1,2] [--out docs] [--runs DIR] [--new-pins]

A row runs the ordinary command once for each method and seed, and once more with the first seed, killed (SIGKILL) halfway
and started again: its weights must have the hash of the campaign that nothing disturbed. Models and prompts are those that
docs/results.json pins by commit or fingerprint; a row that is not there is pinned by its first run. Rows that are not named
stay as they are. Without ROW it lists the rows. `benchmarks/audit_rows.py` has them.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from actors.errors import UserError
from benchmarks.audit_page import markdown
from benchmarks.audit_rows import ROWS, Row
from cluster.config_file import load_config
from cluster.records.reader import load_run
from cluster.records.writer import METRICS_FILE, read_jsonl

ROOT = Path(__file__).resolve().parent.parent
JSON, PAGE = "results.json", "results.md"
POLL_SECONDS = 0.02


class Process(Protocol):
    """A campaign that runs: what `subprocess.Popen` has."""

    def wait(self) -> int:
        """Its exit status."""

    def poll(self) -> int | None:
        """Its exit status; None: it runs."""

    def kill(self) -> None:
        """Ends it at once (SIGKILL)."""


Launch = Callable[[list[str], Path], Process]
"""(arguments of `understudy`, file for what it prints) -> the process."""


def launch(arguments: list[str], log: Path) -> Process:
    """The ordinary command, in a process of its own."""
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, "-m", "cluster", *arguments], cwd=ROOT, stdout=file, stderr=file)


@dataclass(frozen=True)
class Trial:
    """One campaign of a row."""

    row: str
    method: str
    seed: int
    arguments: list[str]
    """Behind `understudy run`."""
    run_dir: Path

    @property
    def command(self) -> str:
        """As a user writes it, without the place of the run."""
        kept = [word for word in self.arguments if not word.startswith(("output_dir=", "name="))]
        return " ".join(["understudy run", *(f"'{word}'" if set(word) & set(" {}\\$;") else word for word in kept)])


def trial_of(
    name: str, row: Row, method: str, seed: int, runs: Path, overrides: Sequence[str] = (), end: str = ""
) -> Trial:
    """The campaign of one method and seed. end: of its name."""
    settings = {"seed": seed, **row.settings, **row.methods[method]}
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    called = f"{name}-{method}-{seed}{end}"
    arguments = [str(row.config), *words, *overrides, f"output_dir={runs}", f"name={called}"]
    return Trial(name, method, seed, arguments, runs / called)


def pins_of(trial: Trial) -> dict[str, dict[str, str]]:
    """Configuration key -> path and fingerprint (or commit) of the models and prompts that a campaign reads."""
    from cluster.inputs import read_inputs
    from cluster.pins import pin
    from cluster.state.same_inputs import fingerprints

    config = load_config(ROOT / trial.arguments[0], trial.arguments[1:])
    pin(config)
    found = read_inputs(config)
    found.close()
    sets = {name: one.prompts for name, one in found.sets.items()}
    return fingerprints(config, found.prompts, found.held_out, sets)


def demand_pinned(name: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """UserError: a model or prompts are others than those that the row has in the results."""
    for key in sorted(before.keys() & now.keys()):
        then, here = before[key]["fingerprint"], now[key]["fingerprint"]
        if then != here:
            found = f"{now[key]['path']} with the fingerprint {here}"
            raise UserError(f"{name}: {key}", found, f"{then}, as in {JSON}; or --new-pins, to measure with these")


def run_to_end(trial: Trial, start: Launch, log: Path) -> None:
    """RuntimeError: it failed; with the end of what it printed."""
    if status := start(["run", *trial.arguments], log).wait():
        end = log.read_text("utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"{trial.run_dir.name} ended with the status {status}:\n{end}")


def run_interrupted(trial: Trial, start: Launch, log: Path, step: int) -> None:
    """Kills the campaign once metrics.jsonl has this step, and runs it to its end. RuntimeError: it ended before."""
    process = start(["run", *trial.arguments], log)
    while process.poll() is None:
        rows = read_jsonl(trial.run_dir / METRICS_FILE)
        if rows and rows[-1]["step"] >= step:
            process.kill()
            process.wait()
            return run_to_end(trial, start, log)
        time.sleep(POLL_SECONDS)
    end = log.read_text("utf-8", errors="replace")[-3000:]
    raise RuntimeError(f"{trial.run_dir.name} ended before it could be interrupted:\n{end}")


def weights_hash(run_dir: Path) -> str:
    """SHA-256 of the weights of the last checkpoint."""
    newest = max((run_dir / "checkpoints").glob("step_*"))
    digest = hashlib.sha256()
    for file in sorted(newest.glob("*.safetensors")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def measured(trial: Trial, row: Row) -> dict[str, Any]:
    """What a finished campaign says: its figures, unrounded, and the course of its evaluations."""
    run = load_run(trial.run_dir)
    summary = run.summary
    if row.measured not in summary["sets"]:
        raise UserError(f"{trial.row}: evaluation.sets", ", ".join(summary["sets"]) or "none", row.measured)
    cost, prefix = summary["cost"], f"eval/{row.measured}/"
    trained, course = 0, []
    evaluations = []
    for line in run.metrics:
        trained += line.get("tokens_trained", 0)
        values = {key.removeprefix(prefix): line[key] for key in line if key.startswith(prefix)}
        if values:
            evaluations.append(values)
            shown = {key: value for key, value in values.items() if key.partition(":")[0] in ("accuracy", "reverse_kl")}
            spent = {"tokens_trained": trained, "processor_seconds": line.get("processor_seconds", 0.0)}
            course.append({"step": line["step"], **spent, **shown})
    return {
        "method": trial.method,
        "seed": trial.seed,
        "command": trial.command,
        # Of metrics.jsonl, which the report reads, too.
        "start": evaluations[0],
        "end": evaluations[-1],
        "updates": summary["updates"],
        "tokens_generated": summary["tokens_generated"],
        "tokens_trained": trained,
        "loop_seconds": summary["loop_seconds"],
        "wall_seconds": summary["wall_seconds"],
        "processor_seconds": run.last("processor_seconds"),
        "cost": {"cpu_hours": cost["cpu_hours"], "gpu_hours": cost["gpu_hours"]},
        "course": course,
        "software": {**summary["software"], "commit": commit()},
    }


def audit(
    name: str,
    row: Row,
    seeds: Sequence[int],
    runs: Path,
    *,
    pinned: dict[str, Any] | None = None,
    overrides: Sequence[str] = (),
    start: Launch = launch,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs the campaigns of a row; returns its entry of results.json.

    pinned: fingerprints that must hold. UserError: they do not, or the set is not there. RuntimeError: a campaign failed.
    """
    first_method = next(iter(row.methods))
    trials = [trial_of(name, row, method, seed, runs, overrides) for seed in seeds for method in row.methods]
    config = load_config(ROOT / trials[0].arguments[0], trials[0].arguments[1:])
    pins = pins_of(trials[0])
    demand_pinned(name, pinned or {}, pins)
    runs.mkdir(parents=True, exist_ok=True)
    found = []
    for trial in trials:
        say(f"{name}: {trial.method}, seed {trial.seed}")
        run_to_end(trial, start, runs / f"{trial.run_dir.name}.log")
        found.append(measured(trial, row))
    again = trial_of(name, row, first_method, seeds[0], runs, overrides, end="-interrupted")
    halfway = config.pipeline.updates // 2
    say(f"{name}: {first_method}, seed {seeds[0]}, killed after update {halfway} and started again")
    run_interrupted(again, start, runs / f"{again.run_dir.name}.log", halfway)
    hashes = [weights_hash(trial.run_dir) for trial in (trials[0], again)]
    return {
        "title": row.title,
        "config": row.config,
        "set": row.measured,
        "samples": config.evaluation.sets[row.measured].samples,
        "prepare": row.prepare,
        "remark": row.remark,
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "pins": pins,
        "campaigns": found,
        "resumed": {
            "method": first_method,
            "seed": seeds[0],
            "killed_after": halfway,
            "updates": config.pipeline.updates,
            "synchronous": config.pipeline.max_staleness == 0,
            "uninterrupted": hashes[0],
            "interrupted": hashes[1],
        },
    }


def commit() -> str:
    """Of the working tree, with `+changes` where it differs in more than the results; `none` outside a clone."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!docs/{JSON}", f":!docs/{PAGE}")
        return git("rev-parse", "HEAD")[:12] + "+changes" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "none"


def machine() -> str:
    """Processor cores and, where there are any, GPUs."""
    cores = f"{os.cpu_count()} cores ({platform.machine()})"
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return cores
    names = [line.partition(": ")[2].partition(" (")[0] for line in listed.splitlines()]
    return f"{cores}, {len(names)} x {names[0]}" if names else cores


def read_results(folder: Path) -> dict[str, Any]:
    """Row -> its entry; {} where nothing was measured."""
    path = folder / JSON
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def write_results(results: dict[str, Any], folder: Path) -> None:
    """Writes both files, rows in the order of ROWS."""
    folder.mkdir(parents=True, exist_ok=True)
    ordered = {name: results[name] for name in sorted(results, key=lambda name: [*ROWS, name].index(name))}
    (folder / JSON).write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")
    (folder / PAGE).write_text(markdown(ordered, ROWS), "utf-8")


def main() -> None:
    """Runs rows and writes the results after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="ROW | key=value", help="rows; and keys that all campaigns set")
    parser.add_argument("--seeds", help="with commas; without it those of the row")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where results.json and results.md are")
    parser.add_argument("--runs", type=Path, help="keeps the campaigns there, and goes on with those that were begun")
    parser.add_argument("--new-pins", action="store_true", help="measure with other models and prompts than before")
    parser.add_argument("--page", action="store_true", help="write results.md from results.json, and run nothing")
    options = parser.parse_args()
    names = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    try:
        for name in names:
            if name not in ROWS:
                raise UserError("ROW", name, f"one of {', '.join(ROWS)}", ROWS)
            if ROWS[name].needs:
                raise UserError(name, "a row that needs " + ", ".join(ROWS[name].needs.values()), "its own command")
        results = read_results(options.out)
        if options.page:
            return write_results(results, options.out)
        if not names:
            print("\n".join(f"{name:24}{row.title}" for name, row in ROWS.items()))
        for name in names:
            row = ROWS[name]
            seeds = [int(word) for word in options.seeds.split(",")] if options.seeds else row.seeds
            pinned = {} if options.new_pins else read_results(ROOT / "docs").get(name, {}).get("pins", {})
            with tempfile.TemporaryDirectory() as folder:
                runs = (options.runs or Path(folder)).expanduser().absolute()
                entry = audit(name, row, seeds, runs, pinned=pinned, overrides=overrides)
            results[name] = entry
            write_results(results, options.out)
            print(markdown({name: entry}, {}))
    except UserError as error:
        parser.exit(2, f"audit: {error}\n")


if __name__ == "__main__":
    main()
