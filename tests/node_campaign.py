"""A campaign on a Ray cluster of two nodes, of which the one with the rollout actors is taken away and comes back.

    python -m tests.node_campaign CONFIG RESULT [--short]

With --short the cluster has no room for the second rollout actor when the campaign begins; later another node comes.

All that actors return lies in the object stores (nothing is small enough to travel with the answer), so that what the
node had written is gone with it. RESULT gets the rows of the campaign's events.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

import cluster.roles
import cluster.run
from cluster.config_file import load_config
from cluster.records.writer import read_jsonl
from tests.light_campaign import LightRollout

FLAG = "NODE_FLAG"
"""Environment of the actors: a file; whoever finds it first and takes it away writes for five seconds."""


class SlowOnce(LightRollout):
    """As LightRollout."""

    def generate(self, *arguments: Any, **keywords: Any) -> Any:
        """One part of an update is written while the other is not."""
        try:
            os.unlink(os.environ[FLAG])
            time.sleep(5.0)
        except FileNotFoundError:
            pass
        return super().generate(*arguments, **keywords)


def disturb(nodes: Cluster, node: Any, run_dir: Path, flag: Path, campaign: subprocess.Popen) -> None:
    """After the third update takes the node away while it writes; brings another when the campaign says that it waits."""

    def until(condition: Any) -> None:
        while not condition():
            assert campaign.poll() is None, "the campaign has ended"
            time.sleep(0.05)

    until(lambda: len(read_jsonl(run_dir / "metrics.jsonl")) > 3)
    flag.touch()
    until(lambda: not flag.exists())
    time.sleep(1.5)
    nodes.remove_node(node, allow_graceful=False)
    until(lambda: any(event["kind"] == "waiting_for_resources" for event in read_jsonl(run_dir / "events.jsonl")))
    add_node(nodes)


def add_node(nodes: Cluster, actors: int = 2) -> Any:
    """With room for so many rollout actors."""
    return nodes.add_node(num_cpus=1, resources={"roll": actors}, object_store_memory=100 << 20)


def extend(nodes: Cluster, run_dir: Path, campaign: subprocess.Popen) -> None:
    """Brings a node to a campaign that has begun without it, and ends the campaign when the actor there has worked."""

    def wait_for(updates: int) -> None:
        while len(read_jsonl(run_dir / "metrics.jsonl")) < updates:
            assert campaign.poll() is None, "the campaign has ended"
            time.sleep(0.05)

    def started() -> list[str]:
        return [event["actor"] for event in read_jsonl(run_dir / "events.jsonl") if event["kind"] == "actor_started"]

    wait_for(3)
    add_node(nodes, 1)
    while "rollout-1" not in started():
        time.sleep(0.05)
    wait_for(len(read_jsonl(run_dir / "metrics.jsonl")) + 3)
    campaign.send_signal(signal.SIGINT)


def main() -> None:
    """As the module says."""
    config_file, result = map(Path, sys.argv[1:3])
    flag = result.with_suffix(".flag")
    os.environ |= {
        **{FLAG: str(flag), "RAY_max_direct_call_object_size": "0", "OMP_NUM_THREADS": "1"},
        **{"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"},
    }
    nodes = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "resources": {"home": 3}, "object_store_memory": 100 << 20},
    )
    run_dir = load_config(config_file).run_dir
    # A process of its own: both Ray's nodes and the campaign want the main thread.
    first = add_node(nodes, 1 if "--short" in sys.argv else 2)
    campaign = subprocess.Popen([sys.executable, "-m", __spec__.name, config_file, "--address", nodes.address])
    try:
        if "--short" in sys.argv:
            extend(nodes, run_dir, campaign)
        else:
            disturb(nodes, first, run_dir, flag, campaign)
        assert campaign.wait(120) == (130 if "--short" in sys.argv else 0)
    finally:
        campaign.kill()
        nodes.shutdown()
    result.write_text(json.dumps(read_jsonl(run_dir / "events.jsonl")))


def run(config_file: Path, address: str) -> None:
    """The campaign, on this cluster."""
    here: Any = cluster.roles
    here.RolloutActor = SlowOnce
    _, complete = cluster.run.run_campaign(load_config(config_file, [f"ray.address={address}"]))
    sys.exit(0 if complete else 130)


if __name__ == "__main__":
    if "--address" in sys.argv:
        run(Path(sys.argv[1]), sys.argv[3])
    else:
        main()
