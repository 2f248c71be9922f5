"""A campaign on a Ray cluster of two nodes. The node with the rollout actors is taken away, and another one comes.

    python -m tests.node_campaign CONFIG RESULT [--short]

With --short the cluster has no room for the second rollout actor when the campaign begins; later another node comes.

All that actors return lies in the object stores (nothing is small enough to travel with the answer), so a node that is
lost takes with it what its actors have written. RESULT gets the rows of the campaign's events.
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
from actors.heartbeat import beat
from cluster.config_file import load_config
from cluster.fleet.ray_fleet import Fleet
from cluster.records.writer import read_jsonl
from tests.light_engine import LightEngine
from tests.waiting import PATIENCE_SECONDS, until

FLAG = "NODE_FLAG"
"""Environment variable of the actors: a file. The engine that finds it first removes it and never answers again."""


class EngineThatStops(LightEngine):
    """Stops at work, but does not hang, where the flag asks for it."""

    def _generate(self, *arguments: Any) -> Any:
        try:
            os.unlink(os.environ[FLAG])
        except FileNotFoundError:
            return super()._generate(*arguments)
        while True:
            time.sleep(0.05)
            beat()


class FleetThatCounts(Fleet):
    """Says in a file how many answers have arrived while others are still to come."""

    answered = under_way = 0

    async def ask(self, *arguments: Any, **keywords: Any) -> Any:
        """The fleet's own."""
        self.answered = self.answered if self.under_way else 0
        self.under_way += 1
        try:
            answer = await super().ask(*arguments, **keywords)
        finally:
            self.under_way -= 1
        self.answered += 1
        counts = answers_file()
        counts.with_suffix(".new").write_text(str(self.answered if self.under_way else 0))
        counts.with_suffix(".new").rename(counts)
        return answer


def answers_file() -> Path:
    return Path(os.environ[FLAG]).with_suffix(".answers")


def updates_of(run_dir: Path) -> int:
    return len(read_jsonl(run_dir / "metrics.jsonl"))


def kinds_of(run_dir: Path) -> list[str]:
    return [event["kind"] for event in read_jsonl(run_dir / "events.jsonl")]


def disturb(nodes: Cluster, node: Any, run_dir: Path, campaign: subprocess.Popen) -> None:
    """After the third update takes the node away, when one of its actors has written its part of an update and the other
    has not; brings another node when the campaign says that it waits for one."""

    def wait_for(condition: Any, what: str) -> None:
        until(condition, what, lambda: campaign.poll() is None)

    flag = Path(os.environ[FLAG])
    wait_for(lambda: updates_of(run_dir) > 3, "three updates")
    flag.touch()
    wait_for(lambda: not flag.exists(), "an actor at work")
    wait_for(lambda: int(answers_file().read_text()) > 0, "the answer of the other actor")
    nodes.remove_node(node, allow_graceful=False)
    wait_for(lambda: "waiting_for_resources" in kinds_of(run_dir), "a campaign that waits for a node")
    add_node(nodes)


def add_node(nodes: Cluster, actors: int = 2) -> Any:
    """A node with room for this many rollout actors."""
    return nodes.add_node(num_cpus=1, resources={"roll": actors}, object_store_memory=100 << 20)


def extend(nodes: Cluster, run_dir: Path, campaign: subprocess.Popen) -> None:
    """Adds a node to a campaign that has begun without it, and ends the campaign when the actor there has worked."""

    def wait_for(condition: Any, what: str) -> None:
        until(condition, what, lambda: campaign.poll() is None)

    def started() -> list[str]:
        return [event["actor"] for event in read_jsonl(run_dir / "events.jsonl") if event["kind"] == "actor_started"]

    wait_for(lambda: updates_of(run_dir) >= 3, "three updates")
    add_node(nodes, 1)
    wait_for(lambda: "rollout-1" in started(), "the second actor")
    wanted = updates_of(run_dir) + 3
    wait_for(lambda: updates_of(run_dir) >= wanted, "three more updates")
    campaign.send_signal(signal.SIGINT)


def main() -> None:
    """Starts the cluster and the campaign, disturbs or extends it, and writes RESULT."""
    config_file, result = map(Path, sys.argv[1:3])
    short = "--short" in sys.argv
    os.environ |= {
        **{FLAG: str(result.with_suffix(".flag").resolve()), "OMP_NUM_THREADS": "1"},
        **{"RAY_max_direct_call_object_size": "0"},
        **{"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3"},
    }
    answers_file().write_text("0")
    nodes = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "resources": {"home": 3}, "object_store_memory": 100 << 20},
    )
    run_dir = load_config(config_file).run_dir
    first = add_node(nodes, 1 if short else 2)
    # A process of its own: both Ray's nodes and the campaign want the main thread.
    campaign = subprocess.Popen([sys.executable, "-m", __spec__.name, config_file, "--address", nodes.address])
    try:
        if short:
            extend(nodes, run_dir, campaign)
        else:
            disturb(nodes, first, run_dir, campaign)
        assert campaign.wait(PATIENCE_SECONDS) == (130 if short else 0)
    finally:
        campaign.kill()
        nodes.shutdown()
    result.write_text(json.dumps(read_jsonl(run_dir / "events.jsonl")))


def run(config_file: Path, address: str) -> None:
    """The campaign, on this cluster."""
    here: Any = cluster.roles
    here.Fleet = FleetThatCounts
    changes = [f"ray.address={address}", "rollout.backend=tests.node_campaign:EngineThatStops"]
    _, complete = cluster.run.run_campaign(load_config(config_file, changes))
    sys.exit(0 if complete else 130)


if __name__ == "__main__":
    if "--address" in sys.argv:
        run(Path(sys.argv[1]), sys.argv[3])
    else:
        main()
