"""Measures the loop with actors that sleep (benchmarks/simulated.py), and prints Markdown tables.

python -m benchmarks.pipeline stages            wall time over that of the slowest stage; gain over a synchronous campaign
python -m benchmarks.pipeline staleness         100,000 trajectories with random delays, actors killed meanwhile
python -m benchmarks.pipeline many              processor time of the campaign process with 16 and 256 rollout actors
python -m benchmarks.pipeline plans             predictions of `understudy plan` for other numbers of actors, and measurements
"""

import argparse
import asyncio
import logging
import math
import random
from dataclasses import replace
from typing import Any

import ray

from benchmarks.simulated import Simulation, Times
from cluster.planning.throughput import measured

TAIL = math.log(10) / 2.326
"""Spread of a log-normal distribution whose 99th percentile is ten times its median."""
MEAN_OF_TAIL = math.exp(TAIL**2 / 2)

EVEN = Times()
STAGES = {
    "balanced": EVEN,
    "3:1 skewed, rollout": replace(EVEN, score=EVEN.score / 3, update=EVEN.update / 3),
    "3:1 skewed, teacher": replace(EVEN, response=EVEN.response / 3, update=EVEN.update / 3),
    "3:1 skewed, learner": replace(EVEN, response=EVEN.response / 3, score=EVEN.score / 3),
    "log-normal tail": replace(EVEN, response=EVEN.response / MEAN_OF_TAIL, spread=TAIL),
}


def stages(updates: int) -> None:
    """Four actors of each role but one learner, 64 trajectories an update."""
    print(
        "| stages | K | wall / slowest stage | ideal / slowest | synchronous / asynchronous wall | sum / slowest "
        "| share of that bound |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, times in STAGES.items():
        bound = 4
        ahead = asyncio.run(Simulation(times, updates, max_staleness=bound).run())
        behind = asyncio.run(Simulation(times, updates // 4, max_staleness=0).run())
        slowest, total = max(ahead.stages.values()), sum(ahead.stages.values())
        gain = behind.wall / behind.updates * ahead.updates / ahead.wall
        print(
            f"| {name} | {bound} | {ahead.wall / slowest:.3f} | {ahead.ideal / slowest:.3f} | {gain:.2f} | {total / slowest:.2f} "
            f"| {gain / (total / slowest):.2f} |",
            flush=True,
        )


def staleness(trajectories: int, seed: int) -> None:
    """Random delays; every few seconds an actor is killed."""
    draw = random.Random(seed)

    async def kill(*fleets: Any) -> None:
        while True:
            await asyncio.sleep(draw.uniform(1.0, 4.0))
            alive = [replica for fleet in fleets for replica in fleet.replicas if replica.alive]
            ray.kill(draw.choice(alive).handle)

    print(
        "| K | trajectories | actors killed | trained too late | twice | unscored | dropped |\n|---|---|---|---|---|---|---|"
    )
    for bound in (1, 2, 4):
        times = Times(response=0.05, spread=TAIL, score=0.0005, update=0.05, load=0.01)
        size = 256
        made = Simulation(times, trajectories // 3 // size, size, 4, bound, rollouts=4, teachers=2, seats=64)
        asyncio.run(made.run(kill))
        ledger, found = made.state.ledger, made.found
        print(
            f"| {bound} | {ledger.next_number:,} | {made.faults} | {found['violations']} | {found['repeated']} "
            f"| {found['unscored']} | {ledger.dropped.total() / ledger.next_number:.2%} |",
            flush=True,
        )


def many(updates: int) -> None:
    """The same load on 16 and on 256 rollout actors, in four processes."""
    print("| responses | rollout actors | microseconds of the campaign process for each trajectory |\n|---|---|---|")
    for name, spread in (("equally long", 0.0), ("log-normal tail", TAIL)):
        for actors in (16, 256, 16, 256):
            times = Times(response=0.5, spread=spread, score=0.0001, update=0.01, load=0.001)
            made = Simulation(
                times, updates, 1024, 8, 1, rollouts=actors, teachers=4, seats=2048 // actors, processes=4
            )
            asyncio.run(made.run())
            print(f"| {name} | {actors} | {made.cpu / made.trained * 1e6:.0f} |", flush=True)


def plans(updates: int) -> None:
    """Predicts from a run with two rollout and two teacher actors, and runs what it predicted."""

    def simulated(rollouts: int, teachers: int) -> Simulation:
        return asyncio.run(Simulation(EVEN, updates, max_staleness=4, rollouts=rollouts, teachers=teachers).run())

    first = simulated(2, 2)
    summary = {"updates": updates, "busy": first.state.busy, "loop_seconds": first.wall}
    counts = {"rollout": 2, "teacher": 2, "learner": 1}
    plan = measured(summary, counts, dict.fromkeys(counts, 1.0), overlapped=True)
    print(plan.sentence())
    print("| rollout actors | teacher actors | predicted s/update | measured | predicted / measured |")
    print("|---|---|---|---|---|")
    for rollouts, teachers in ((2, 2), (4, 2), (2, 4), (4, 4), (8, 4)):
        predicted = plan.scaled("rollout", rollouts).scaled("teacher", teachers).update_seconds
        found = first if (rollouts, teachers) == (2, 2) else simulated(rollouts, teachers)
        seconds = found.wall / updates
        print(f"| {rollouts} | {teachers} | {predicted:.2f} | {seconds:.2f} | {predicted / seconds:.2f} |", flush=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stages", "staleness", "many", "plans"])
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--trajectories", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ray.init(
        address="local", include_dashboard=False, num_cpus=2, log_to_driver=False, logging_level=logging.ERROR,
        object_store_memory=1 << 30,
    )  # fmt: skip
    if options.what == "stages":
        stages(options.updates)
    elif options.what == "staleness":
        staleness(options.trajectories, options.seed)
    elif options.what == "many":
        many(options.updates)
    else:
        plans(options.updates)


if __name__ == "__main__":
    main()
