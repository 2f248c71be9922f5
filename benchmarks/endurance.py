"""A campaign of many updates, and what grows with their number. Prints Markdown tables.

    python -m benchmarks.endurance [--updates 10000] [--directory DIRECTORY]

The real loop, Ray, records and checkpoints; actors that answer almost at once (benchmarks/simulated.py), so that the campaign
process is the slowest. Then the campaign is resumed for one more update, its report is written, and its status is read.
"""

import argparse
import asyncio
import logging
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from benchmarks.simulated import Simulation, Times
from cluster.console.status import read_status
from cluster.records.writer import EVENTS_FILE, LEDGER_FILE, METRICS_FILE
from cluster.report.page import write_report

SAMPLES = 20
"""Measurements of memory in a campaign."""
QUICK = Times(response=0.002, score=0.0001, update=0.0005, load=0.0002)
MIB = 1 << 20


@dataclass
class Growth:
    """What one campaign takes, measured while it runs."""

    updates: int
    process: psutil.Process = field(default_factory=psutil.Process)
    seconds: list[tuple[float, float]] = field(default_factory=list)
    """Of each update: wall clock and processor seconds since the one before."""
    rows: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    """(update, bytes of this process, of Ray's store, of Ray's processes, open files)."""
    before: tuple[float, float] = (0.0, 0.0)

    def note(self, row: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl was written."""
        now = time.perf_counter(), time.process_time()
        self.seconds.append((now[0] - self.before[0], now[1] - self.before[1]))
        if row["step"] % max(self.updates // SAMPLES, 1) == 0:
            daemons = [one for one in self.process.children() if one.name() in ("raylet", "gcs_server")]
            self.rows.append(
                (row["step"], self.process.memory_info().rss, stored(), sum(one.memory_info().rss for one in daemons),
                 self.process.num_fds())
            )  # fmt: skip
        self.before = time.perf_counter(), time.process_time()

    def tell(self) -> None:
        """Prints what grew from the first quarter of the campaign to its end."""
        print("| update | campaign process, MiB | Ray's object store, MiB | raylet and GCS, MiB | open files |")
        print("|---|---|---|---|---|")
        for step, *sizes, files in self.rows:
            print(f"| {step:,} | {' | '.join(f'{size / MIB:.1f}' for size in sizes)} | {files} |")
        first, last = self.rows[len(self.rows) // 4], self.rows[-1]
        each = [(last[column] - first[column]) / (last[0] - first[0]) for column in (1, 2, 3)]
        print(
            f"\nbytes an update since update {first[0]:,}: process {each[0]:.0f}, store {each[1]:.0f}, Ray {each[2]:.0f}"
        )
        tenth = max(len(self.seconds) // 10, 1)
        begin, end = self.seconds[tenth : 2 * tenth], self.seconds[-tenth:]
        for column, name in enumerate(("wall", "processor")):
            early, late = (median(one[column] for one in part) for part in (begin, end))
            print(
                f"{name} seconds an update: {early:.4f} in the second tenth, {late:.4f} in the last: {late / early:.3f}"
            )


def stored() -> int:
    """Bytes in Ray's object store."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.object_store_bytes_used)


def campaign(folder: Path, updates: int, **options: Any) -> Simulation:
    """Two rollout actors and a teacher, 16 trajectories an update."""
    made = Simulation(
        QUICK, updates, 16, 4, 1, rollouts=2, teachers=1, seats=16, folder=folder, checkpoint_every=100, **options
    )
    return asyncio.run(made.run())


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--directory", type=Path, help="where the run directory stays; an earlier one there goes on")
    options = parser.parse_args()
    ray.init(
        address="local", include_dashboard=False, num_cpus=2, log_to_driver=False, logging_level=logging.ERROR,
        object_store_memory=256 * MIB,
    )  # fmt: skip
    with ExitStack() as stack:
        folder = options.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        growth = Growth(options.updates)
        first = campaign(folder, options.updates, on_metrics=growth.note)
        growth.tell()
        run_dir = first.config(folder).run_dir
        files = {name: (run_dir / name).stat().st_size for name in (METRICS_FILE, LEDGER_FILE, EVENTS_FILE)}
        print("bytes an update on the disk: " + ", ".join(f"{n} {s / options.updates:.0f}" for n, s in files.items()))
        again = campaign(folder, options.updates + 1)
        start = time.perf_counter()
        report = write_report([run_dir], run_dir / "report.html")
        reported = time.perf_counter()
        read_status(run_dir)
        print(
            f"resume: records and checkpoint {again.taken_up:.2f} s; report {reported - start:.2f} s, "
            f"{report.stat().st_size / MIB:.1f} MiB; status {time.perf_counter() - reported:.2f} s"
        )


if __name__ == "__main__":
    main()
