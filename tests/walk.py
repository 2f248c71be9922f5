"""The walk of docs/walk.md, step by step: a campaign on a cluster of four nodes is watched, scaled, and loses a node.

tests/e2e/test_walk.py checks it, and docs/make_walk.py makes the page's pictures from it.
"""

import json
import re
import shlex
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.records.writer import read_jsonl
from tests.documented import commands_of
from tests.local_cluster import ROOT, LocalCluster
from tests.waiting import until

PAGE = "docs/walk.md"


def written(beginning: str) -> list[str]:
    """The words of the page's one command that begins so, without the program."""
    [text] = [text for text in commands_of((ROOT / PAGE).read_text("utf-8")) if text.startswith(beginning)]
    return shlex.split(text)[1:]


class Walk:
    """One campaign on a cluster of its own; each step of the page is a method."""

    def __init__(self, folder: Path):
        """Starts the cluster: a head for learner and teacher, three nodes for one rollout actor each."""
        self.folder, self.run = folder, folder / "walk"
        self.cluster = LocalCluster(folder, PAGE)
        for _ in range(3):
            self.cluster.add_node()

    def submit(self) -> subprocess.CompletedProcess[str]:
        """Submits the campaign as a job."""
        return self._run("understudy submit")

    def _run(self, beginning: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of the page with this cluster's address and this walk's directory."""
        places = {"http://127.0.0.1:8265": self.cluster.address, "/tmp/walk": str(self.folder)}
        words = [re.sub("|".join(places), lambda found: places[found[0]], word) for word in written(beginning)]
        return self.cluster.understudy(*words)

    def until(self, what: str, condition: Callable[[], object]) -> None:
        """Waits. AssertionError with the campaign's events if it ends first."""

        def runs() -> bool:
            return not {"finished", "failed", "stopped"} & set(self.kinds())

        try:
            until(condition, what, runs)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.events()}") from None

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        """The events of the campaign so far, of all kinds or of one."""
        rows = read_jsonl(self.run / "events.jsonl")
        return [row for row in rows if kind in ("", row["kind"])]

    def kinds(self) -> list[str]:
        """The kinds of its events, in their order."""
        return [event["kind"] for event in self.events()]

    def status(self) -> dict[str, Any]:
        """`understudy status RUN --json`."""
        return json.loads(self.cluster.understudy("status", self.run, "--json").stdout)

    def update(self) -> int:
        """The number of the last update."""
        rows = read_jsonl(self.run / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def wait_for_updates(self, more: int) -> None:
        """Waits for this many more updates."""
        wanted = self.update() + more
        self.until(f"update {wanted}", lambda: self.update() >= wanted)

    def scraped(self) -> set[str]:
        """Names of the metrics that the head's node exports for Prometheus."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.cluster.metrics_port}/metrics", timeout=10) as answer:
            return set(re.findall(r"^(ray_understudy_\w+)\{", answer.read().decode(), re.M))

    def scale(self) -> subprocess.CompletedProcess[str]:
        """Adds a rollout actor, on a node of its own."""
        return self._run("understudy scale")

    def wait_for_actor(self, name: str) -> None:
        """Waits until this actor works."""
        self.until(name, lambda: name in [event["actor"] for event in self.events("actor_started")])

    def kill_a_node(self) -> None:
        """Kills a node that has a rollout actor. Another node with room for it is idle."""
        self.cluster.kill(self.cluster.hosts("RolloutActor")[0])

    def wait_for_the_replacement(self) -> None:
        """Waits until the lost actor works again, on the idle node. The campaign pauses, so that updates are left for it."""
        self.until("the loss", lambda: self.events("actor_died"))
        self.wait_for_updates(2)
        self._run("understudy pause")
        self.until("the replacement", lambda: self.events("actor_restarted"))
        self._run("understudy resume")

    def wait_for_the_end(self) -> None:
        """Waits until the campaign has finished and its report is written."""
        self.until("the end", lambda: self.events("finished"))
        until((self.run / "report.html").exists, "the report, which follows that event")

    def close(self) -> None:
        """Ends the cluster."""
        self.cluster.close()
