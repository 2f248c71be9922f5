"""How long a campaign takes from its command to the end of its first update, phase by phase, and against another checkout.

    python -m benchmarks.start RUN_DIR
    python -m benchmarks.start --against DIRECTORY [--runs 2] [--config configs/quickstart.yaml]

The first form prints the phases that the run recorded (events.jsonl). The second starts the same campaign from this checkout
and from another one, by turns, each for one update, and prints wall and processor seconds of each start, the latter of the
command and of all processes below it, and the ratio of the medians. Prints JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.watch import newest, rows, updates, used

ROOT = Path(__file__).resolve().parents[1]
LOOK_SECONDS = 0.1


def phases(run_dir: Path) -> dict[str, float]:
    """Phase -> seconds, of the last start that this run has recorded; actors' phases have the actor's name before them."""
    found: dict[str, float] = {}
    actors: dict[str, float] = {}
    for row in rows(run_dir / "events.jsonl"):
        if row["kind"] in ("started", "resumed"):
            actors = {}
        if row["kind"] == "actor_started":
            actors |= {f"{row['actor']}: {what}": seconds for what, seconds in row.get("phases", {}).items()}
        if row["kind"] == "first_update":
            found = {one["phase"]: one["seconds"] for one in row["phases"]} | actors | {"all": row["seconds"]}
    return found


def start_once(checkout: Path, config: Path, folder: Path) -> dict[str, Any]:
    """One campaign of one update from this checkout: seconds until its line of metrics.jsonl, and its phases."""
    overrides = ["name=start", f"output_dir={folder}", "pipeline.updates=1"]
    command = [sys.executable, "-m", "cluster", "run", str(config), *overrides]
    began = time.monotonic()
    seen: dict[int, tuple[str, float]] = {}
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    with subprocess.Popen(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True) as process:
        first, metrics = 0.0, folder / "start" / "metrics.jsonl"
        assert process.stdout is not None
        first_line = process.stdout.readline()
        first = time.monotonic() - began
        for update in updates(process, metrics, LOOK_SECONDS):
            if update:
                break
            with suppress(psutil.Error):
                seen |= used(process.pid)  # those that have ended keep what they used
        wall, ended = time.monotonic() - began, newest(metrics) > 0
        rest = process.stdout.read()
    if not ended or process.returncode:
        sys.exit(f"the campaign failed:\n{first_line}{rest}")
    return {
        "first_output_seconds": round(first, 3),
        "wall_seconds": round(wall, 2),
        "processor_seconds": round(sum(seconds for _, seconds in seen.values()), 2),
        "phases": phases(folder / "start"),
    }


def side_by_side(here: Path, there: Path, config: Path, runs: int) -> dict[str, Any]:
    """Starts both by turns; each start, and the ratios of the medians."""
    found: dict[str, list[dict[str, Any]]] = {"against": [], "here": []}
    for _ in range(runs):
        for name, checkout in (("against", there), ("here", here)):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                found[name].append(start_once(checkout, config, Path(folder)))
                print(name, json.dumps(found[name][-1]), file=sys.stderr, flush=True)
    median = {
        name: {key: statistics.median(one[key] for one in starts) for key in ("wall_seconds", "processor_seconds")}
        for name, starts in found.items()
    }
    ratios = {key: round(median["here"][key] / median["against"][key], 3) for key in median["here"]}
    return {"median": median, "here_over_against": ratios, "starts": found}


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN_DIR")
    parser.add_argument("--against", type=Path, metavar="DIRECTORY")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    options = parser.parse_args()
    if options.against is not None:
        print(json.dumps(side_by_side(ROOT, options.against.resolve(), options.config, options.runs), indent=2))
    elif options.run is not None:
        print(json.dumps(phases(options.run), indent=2))
    else:
        parser.error("expected RUN_DIR, or --against DIRECTORY")


if __name__ == "__main__":
    main()
