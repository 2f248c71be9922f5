"""Campaigns under faults: every role killed, stopped and made to fail, idle and at work; how soon each has recovered.

    python -m benchmarks.chaos [--every 10] [--rounds 1] [--seed 0] [--pause 1.0] [--faults N]

Two campaigns one after the other, of the same length, with real Ray, fleets, learner and teachers, and light rollout
actors that sleep `--pause` seconds for each update (tests/chaos_campaign.py): one that nothing disturbs, one with a
fault every so many updates. Prints a JSON object: faults, recoveries, times, updates a second, and what is wrong.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cluster.records.writer import read_jsonl
from tests.chaos_campaign import Fault, schedule
from tests.light_campaign import assert_ledger_adds_up, configuration, fingerprint, make_folder

ROOT = Path(__file__).resolve().parent.parent
HANG_SECONDS = 4.0
SIZE = 8


def campaign(folder: Path, name: str, updates: int, faults: list[Fault], pause: float) -> dict[str, Any]:
    """What tests/chaos_campaign.py has found."""
    light = {"replicas": 2, "cpus_per_replica": 0.2}
    config = configuration(
        folder,
        name,
        pipeline={"updates": updates},
        rollout=light,
        learner={"cpus_per_replica": 0.2},
        teachers={"default": {"model": str(folder / "teacher"), "dtype": "float32", **light}},
        evaluation={"every_updates": 1000},
        ray={"hang_timeout_seconds": HANG_SECONDS, "object_store_mebibytes": 100, "max_restarts": 1000},
    )
    planned, result = folder / f"{name}.schedule.json", folder / f"{name}.json"
    planned.write_text(json.dumps([asdict(fault) for fault in faults]))
    command = [sys.executable, "-m", "tests.chaos_campaign", config, planned, result, "--pause", str(pause)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert_ledger_adds_up(folder / "runs" / name, updates, SIZE, 0)
    return json.loads(result.read_text())


def loop_seconds(run_dir: Path) -> float:
    """From the first update's begin to the end, with all that was done twice."""
    at = {event["kind"]: event["time"] for event in reversed(read_jsonl(run_dir / "events.jsonl"))}
    return round(at["finished"] - at["loop_started"], 1)


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Time to recover, without the deadline of hangs, over the time that the new actor took to start."""
    found = [
        (row["seconds_to_recover"] - HANG_SECONDS * (row["kind"] == "stop")) / row["seconds_of_start"] for row in rows
    ]
    return {"faults": len(rows), "median": round(statistics.median(found), 2), "worst": round(max(found), 2)}


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pause", type=float, default=1.0)
    parser.add_argument("--faults", type=int, help="only the first so many")
    options = parser.parse_args()
    faults: list[Fault] = []
    for number in range(options.rounds):
        first = faults[-1].after + options.every if faults else options.every // 2
        faults += [replace(fault) for fault in schedule(options.seed + number, first, options.every)]
    faults = faults[: options.faults]
    updates = faults[-1].after + options.every // 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(Path(temporary))
        campaign(folder, "calm", updates, [], options.pause)
        stormy = campaign(folder, "stormy", updates, faults, options.pause)
        differing = fingerprint(folder / "runs" / "calm") != fingerprint(folder / "runs" / "stormy")
        seconds = {name: loop_seconds(folder / "runs" / name) for name in ("calm", "stormy")}
    rows = [row for row in stormy["faults"] if "seconds_to_recover" in row]
    print(
        json.dumps(
            {
                "updates": updates,
                "faults": len(faults),
                "recovered": len(rows),
                "wedges": sum(row["wedged"] for row in stormy["faults"]) + len(faults) - len(stormy["faults"]),
                "not_recovered": [row for row in stormy["faults"] if row not in rows],
                "orphans": len(stormy["orphans"]),
                "bits_differ": differing,
                "recovery_over_start": {
                    f"{role} {kind}": ratios(mine)
                    for role in ("rollout", "teacher.default", "learner")
                    for kind in ("kill", "stop", "raise")
                    if (mine := [row for row in rows if (row["role"], row["kind"]) == (role, kind)])
                },
                "loop_seconds": seconds,
                "useful_updates_a_second_over_calm": round(seconds["calm"] / seconds["stormy"], 3),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
