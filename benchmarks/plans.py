"""What `understudy plan` predicts of real campaigns, and what these then do: prints a table.

    python -m benchmarks.plans [configs/quickstart.yaml] [--updates 60]

Real Ray, real vLLM, real models. One strictly on-policy campaign is measured; from its `summary.json` the plan predicts
others, which are then run: overlapped, with half the prompts an update, with twice as many, and both.
All share this machine's cores, of which the plan knows nothing: it takes each actor for one with hardware of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from cluster.commands.plan import from_run
from cluster.config_file import load_config

ROOT = Path(__file__).resolve().parents[1]


def run(config: str, folder: str, name: str, overrides: list[str]) -> dict:
    """The summary of a campaign in a process of its own."""
    where = [f"name={name}", f"output_dir={folder}"]
    command = [sys.executable, "-m", "cluster", "run", config, *where, *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(Path(folder, name, "summary.json").read_text())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("--updates", type=int, default=60)
    options = parser.parse_args()
    prompts = load_config(options.config).pipeline.prompts_per_update
    updates, last = f"pipeline.updates={options.updates}", "every_updates=100000"
    still = [updates, f"evaluation.{last}", f"checkpoint.{last}", "evaluation.prompts.limit=16"]
    variants = {
        "as measured": [],
        "overlapped": ["pipeline.max_staleness=1"],
        "half the prompts an update": [f"pipeline.prompts_per_update={prompts // 2}"],
        "twice the prompts an update": [f"pipeline.prompts_per_update={prompts * 2}"],
        "overlapped, twice the prompts": ["pipeline.max_staleness=1", f"pipeline.prompts_per_update={prompts * 2}"],
    }
    print("| campaign | predicted seconds an update | measured | predicted / measured | limited by |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        for number, (what, changes) in enumerate(variants.items()):
            name = f"run-{number}" if number else base.name
            summary = run(options.config, folder, name, [*still, *changes])
            plan = from_run(load_config(options.config, [*still, *changes]), base)
            measured = summary["loop_seconds"] / summary["updates"]
            ratio = f"{plan.update_seconds / measured:.2f}"
            print(
                f"| {what} | {plan.update_seconds:.3f} | {measured:.3f} | {ratio} | {plan.bottleneck.role} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
