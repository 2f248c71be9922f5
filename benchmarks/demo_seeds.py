"""Runs the quickstart with several seeds and prints the table of docs/demo.md.

    python benchmarks/demo_seeds.py [--seeds 0 1 2 3 4] [key=value …]

A seed decides the order of the prompts and every sample. The phases of a run are read from its events.jsonl.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(seed: int, overrides: list[str], output: Path) -> dict[str, float]:
    """One whole campaign in a process of its own: its summary, and the seconds of each phase."""
    start, begun = time.perf_counter(), time.time()
    subprocess.run(
        [
            *(sys.executable, "-m", "cluster", "run", "configs/quickstart.yaml"),
            *(f"output_dir={output}", f"name=seed-{seed}", f"seed={seed}", *overrides),
        ],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    summary = json.loads((output / f"seed-{seed}" / "summary.json").read_text())
    events = [json.loads(line) for line in (output / f"seed-{seed}" / "events.jsonl").read_text().splitlines()]
    at = {event["kind"]: event["time"] - begun for event in events}
    return summary | {
        "total": time.perf_counter() - start,
        "ray": at["started"],
        "actors": at["actor_started"] - at["started"],
        "first_evaluation": at["loop_started"] - at["actor_started"],
        "loop": at["finished"] - at["loop_started"],
    }


def main() -> None:
    """Prints a Markdown table, one row a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    print("| seed | accuracy before → after (teacher) | sampled before → after | reverse KL before → after | "
          "Ray | actors | first evaluation | loop | total s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            r = run(seed, options.overrides, Path(folder))
            print(
                f"| {seed} | {r['accuracy_start']:.1%} → {r['accuracy_end']:.1%} ({r['accuracy_teacher']:.1%}) "
                f"| {r['accuracy_sampled_start']:.1%} → {r['accuracy_sampled_end']:.1%} "
                f"| {r['reverse_kl_start']:.3f} → {r['reverse_kl_end']:.4f} "
                f"| {r['ray']:.1f} | {r['actors']:.1f} | {r['first_evaluation']:.1f} | {r['loop']:.1f} | {r['total']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
